"""Every error this project raises on purpose, and what the process does about it.

    LLM4ESError
      + ConfigError         names field and remedy     -> refuse to start, exit 2
      + BundleMismatch      bundle, view or topic is not what is expected -> refuse to start, exit 3
      + SourceUnavailable   Kafka slow or down         -> at start exit 4, later wait and try again
      + InvalidEvent        bad record                 -> dead letter, continue
      + NonFiniteEmbedding  one event alone causes it  -> dead letter; the model does -> stop
      + SinkUnavailable     a store is slow or down    -> at start exit 4, later rewind, wait, retry
      + SinkRejected        row breaks the view        -> stop: our bug
      + Fenced              another worker owns this   -> drop cache and batch, rewind, rejoin
      + StoreLost           windows behind the offsets -> drop cache, seek back, rebuild
      + Leak                a training row knows the future -> no training set, mend the labels

Adapters translate a vendor's errors into these once, at the module that imports the vendor.
"""

from typing import ClassVar

__all__ = [
    "BundleMismatch",
    "ConfigError",
    "Fenced",
    "InvalidEvent",
    "LLM4ESError",
    "Leak",
    "NonFiniteEmbedding",
    "SinkRejected",
    "SinkUnavailable",
    "SourceUnavailable",
    "StoreLost",
]


class LLM4ESError(Exception):
    """Root of the tree; `exit_code` is what a command ends with when it cannot go on."""

    exit_code: ClassVar[int] = 1


class ConfigError(LLM4ESError):
    """A setting, schema or flag is wrong; `field` names it and `remedy` says what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy


class BundleMismatch(LLM4ESError):
    """Bundle, feature view, window store or topic is not what is expected: refuse to start."""

    exit_code: ClassVar[int] = 3

    def __init__(self, what: str, problem: str, remedy: str) -> None:
        super().__init__(f"{what}: {problem}; {remedy}")
        self.what = what
        self.problem = problem
        self.remedy = remedy


class _Upstream(LLM4ESError):
    exit_code: ClassVar[int] = 4

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SourceUnavailable(_Upstream):
    """The log cannot be read now; worth another try after `retry_after_s` seconds."""


class SinkUnavailable(_Upstream):
    """A store cannot be read or written now; worth another try after `retry_after_s` seconds."""


class InvalidEvent(LLM4ESError):
    """A record that can never become an event; `field` names the culprit, "value" the whole."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class NonFiniteEmbedding(LLM4ESError):
    """The model gave NaN or infinity for the windows at `rows` of the call."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__(f"the model's output is not finite for {len(rows)} window(s)")
        self.rows = rows


class SinkRejected(LLM4ESError):
    """A row breaks the feature view's contract, or did not arrive: a bug of ours, so stop."""


class Fenced(LLM4ESError):
    """Another worker has written this entity's window since it was read."""


class StoreLost(LLM4ESError):
    """The window store holds less than the offsets say it did."""


class Leak(LLM4ESError):
    """A training row would teach a model what it cannot know: the set is refused."""
