"""Labels: what is to be told apart, as of when, and how rows are split to judge it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from export.embed import AsOf
from llm4es.errors import ConfigError

__all__ = [
    "Kind",
    "LabelColumns",
    "Splits",
    "Task",
    "drawn_splits",
    "read_entity_ids",
    "read_task",
    "shuffle_labels",
]

Kind = Literal["user", "point-in-time"]

_MICROSECOND = timedelta(microseconds=1)
_USUAL = {
    "time": ("event_timestamp", "event_time"),
    "weight": ("weight",),
    "fold": ("fold",),
    "split": ("split",),
    "known": ("label_available_at",),
}
_TRAIN, _TEST = "train", "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelColumns:
    """Names of a label file's columns; None is looked for under its usual names.

    `known` is when a label became known, `only` a boolean column whose rows are kept. `positive`
    is the value of the label that counts as 1, all others as 0; without it they are 0 and 1.
    """

    entity: str | None = None
    label: str = "label"
    time: str | None = None
    weight: str | None = None
    fold: str | None = None
    split: str | None = None
    known: str | None = None
    only: str | None = None
    positive: str | None = None


@dataclass(frozen=True, slots=True)
class Splits:
    """Pairs of training and test rows; a row is tested at most once."""

    name: str
    pairs: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """N label rows, each of an entity, where the task is of moments as of its own.

    Features may be made of events strictly before `times`, or at them too where `inclusive`.
    Without times a row sees its entity's whole history.
    """

    kind: Kind
    name: str
    entity_ids: tuple[str, ...]
    labels: NDArray[np.int8]  # (N,) of 0 and 1
    weights: NDArray[np.float64]  # (N,)
    times: tuple[datetime, ...] | None
    inclusive: bool
    splits: Splits

    def asked(self, end: datetime) -> list[AsOf]:
        """What is to be embedded; `end` is the time of the log's last event."""
        if self.times is None:
            return [AsOf(entity_id, end + _MICROSECOND) for entity_id in self.entity_ids]
        later = _MICROSECOND if self.inclusive else timedelta(0)
        return [
            AsOf(entity_id, time + later)
            for entity_id, time in zip(self.entity_ids, self.times, strict=True)
        ]

    @property
    def groups(self) -> NDArray[np.int64]:
        """Entities (N,) as numbers: what folds keep together and a bootstrap draws."""
        found: NDArray[np.int64] = np.unique(np.array(self.entity_ids), return_inverse=True)[1]
        return found


def read_task(
    path: Path,
    columns: LabelColumns,
    *,
    entity_field: str,
    kind: Kind | None = None,
    inclusive: bool = False,
    folds: int = 5,
    seed: int = 42,
    test_from: datetime | None = None,
) -> Task:
    """Read a .parquet or .csv file of labels, one row each.

    Without `kind` a task is of users where each has one row. Rows are split at `test_from`, else
    by the split column (its values train and test), else by the fold column, else into folds drawn
    with `seed`. Raises ConfigError for what cannot be judged, and for splits that leak.
    """
    table = _Table(path, columns, entity_field)
    entity_ids = tuple(str(value) for value in table.values(table.entity))
    found = kind or ("user" if len(set(entity_ids)) == len(entity_ids) else "point-in-time")
    times = table.moments("time")
    if found == "point-in-time" and times is None:
        raise ConfigError(
            "labels", f"{path} has no column of times", "name it, or use the task user"
        )
    if inclusive and times is None:
        raise ConfigError("labels", "events at no time are to be included", "name a time column")
    bare = Task(
        kind=found,
        name=columns.label if columns.positive is None else f"{columns.label}={columns.positive}",
        entity_ids=entity_ids,
        labels=table.labels(),
        weights=table.weights(),
        times=times,
        inclusive=inclusive,
        splits=Splits("none", ()),
    )
    known = table.moments("known")
    splits = _splits(bare, table, known, folds=folds, seed=seed, test_from=test_from)
    for train, test in splits.pairs:
        if min(len(np.unique(bare.labels[rows])) for rows in (train, test)) < len((0, 1)):
            raise ConfigError(
                "labels", f"{splits.name}: a part has one class only", "use fewer folds, more rows"
            )
    return replace(bare, splits=splits)


def read_entity_ids(path: Path, columns: LabelColumns, entity_field: str) -> tuple[str, ...]:
    """Ids (N,) of another entity that each label row concerns. Raises ConfigError."""
    table = _Table(path, replace(columns, entity=entity_field), entity_field)
    return tuple(str(value) for value in table.values(entity_field))


def drawn_splits(task: Task, *, folds: int, seed: int) -> Splits:
    """Draw stratified folds that keep an entity's rows together."""
    groups = task.groups
    several = len(np.unique(groups)) < len(groups)
    kind = StratifiedGroupKFold if several else StratifiedKFold
    try:
        drawn = kind(folds, shuffle=True, random_state=seed).split(
            np.zeros(len(groups)), task.labels, groups if several else None
        )
        pairs = tuple((train.astype(np.int64), test.astype(np.int64)) for train, test in drawn)
    except ValueError as error:
        raise ConfigError("folds", f"{folds} cannot be drawn ({error})", "use fewer") from error
    return Splits(f"{folds} folds drawn with seed {seed}", pairs)


def shuffle_labels(task: Task, *, seed: int) -> Task:
    """Shuffle labels within each fold's test rows: what is learnt then can only be a leak.

    With one split by time, within its training and its test rows.
    """
    rng = np.random.default_rng(seed)
    labels = task.labels.copy()
    pairs = task.splits.pairs
    for rows in [test for _, test in pairs] if len(pairs) > 1 else pairs[0]:
        labels[rows] = rng.permutation(labels[rows])
    return replace(task, labels=labels)


class _Table:
    """A label file's columns by what they are for."""

    def __init__(self, path: Path, columns: LabelColumns, entity_field: str) -> None:
        self._path = path
        self._columns = columns
        self._table = _read(path)
        entity = columns.entity or self._usual(("entity_id", entity_field))
        if entity is None:
            raise ConfigError(
                "labels", f"{path} has neither entity_id nor {entity_field}", "name the column"
            )
        self.entity = entity
        if columns.only is not None:
            self._table = self._table.filter(self._column(columns.only).cast(pa.bool_()))

    def name(self, purpose: str) -> str | None:
        named: str | None = getattr(self._columns, purpose)
        return named or self._usual(_USUAL[purpose])

    def values(self, name: str) -> list[Any]:
        values: list[Any] = self._column(name).to_pylist()
        if None in values:
            raise ConfigError("labels", f"column {name!r} has gaps", "fill them, or drop the rows")
        return values

    def moments(self, purpose: str) -> tuple[datetime, ...] | None:
        name = self.name(purpose)
        if name is None:
            return None
        values = self.values(name)
        if not all(isinstance(value, datetime) for value in values):
            raise ConfigError("labels", f"column {name!r} holds no times", "store timestamps")
        return tuple(
            value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
            for value in values
        )

    def labels(self) -> NDArray[np.int8]:
        values = self.values(self._columns.label)
        if (positive := self._columns.positive) is not None:
            values = [int(str(value) == positive) for value in values]
        if set(values) != {0, 1}:
            raise ConfigError(
                "labels",
                f"column {self._columns.label!r} is not of 0 and 1, both",
                "say which value counts as 1 (positive), or map it",
            )
        return np.array(values, dtype=np.int8)

    def weights(self) -> NDArray[np.float64]:
        name = self.name("weight")
        if name is None:
            return np.ones(self._table.num_rows)
        weights = np.array(self.values(name), dtype=np.float64)
        if not (np.isfinite(weights).all() and (weights > 0).all()):
            raise ConfigError("labels", f"column {name!r} is not above 0 throughout", "mend it")
        return weights

    def _usual(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self._table.column_names), None)

    def _column(self, name: str) -> Any:  # noqa: ANN401 - pyarrow has no types
        if name not in self._table.column_names:
            have = ", ".join(self._table.column_names)
            raise ConfigError("labels", f"{self._path} has no column {name!r}", f"it has: {have}")
        return self._table.column(name)


def _read(path: Path) -> Any:  # noqa: ANN401 - pyarrow has no types
    readers: dict[str, Callable[[Path], Any]] = {
        ".parquet": pq.read_table,
        ".csv": pa_csv.read_csv,
    }
    if path.suffix not in readers:
        raise ConfigError("labels", f"{path} is neither .parquet nor .csv", "name a file of these")
    try:
        return readers[path.suffix](path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError("labels", f"{path} cannot be read ({error})", "name a file") from error


def _splits(
    task: Task,
    table: _Table,
    known: tuple[datetime, ...] | None,
    *,
    folds: int,
    seed: int,
    test_from: datetime | None,
) -> Splits:
    if test_from is not None:
        return _split_at(task, known, test_from)
    if (split := table.name("split")) is not None:
        return _split_by_name(task, table.values(split), known)
    if (fold := table.name("fold")) is None:
        return drawn_splits(task, folds=folds, seed=seed)
    numbers = np.array(table.values(fold))
    placed: dict[str, object] = {}
    for entity_id, number in zip(task.entity_ids, numbers.tolist(), strict=True):
        if placed.setdefault(entity_id, number) != number:
            raise ConfigError(
                "labels", f"entity {entity_id!r} is in two folds", "give each entity one fold"
            )
    pairs = tuple(
        (np.flatnonzero(numbers != number), np.flatnonzero(numbers == number))
        for number in np.unique(numbers)
    )
    if len(pairs) == 1:
        raise ConfigError("labels", f"column {fold!r} has one fold", "name at least two")
    return Splits(f"{len(pairs)} folds of column {fold}", pairs)


def _split_at(task: Task, known: tuple[datetime, ...] | None, moment: datetime) -> Splits:
    """Train on labels that were known before a moment, test on those from it on."""
    times = task.times
    if times is None:
        raise ConfigError("test_from", "the labels have no times", "name their column")
    learnt = [when < moment for when in (known or times)]
    return Splits(
        f"labels known before {moment:%Y-%m-%d %H:%M} against those from then on",
        (
            (
                np.flatnonzero(np.array(learnt) & np.array([when < moment for when in times])),
                np.flatnonzero(np.array([when >= moment for when in times])),
            ),
        ),
    )


def _split_by_name(
    task: Task, names: Sequence[object], known: tuple[datetime, ...] | None
) -> Splits:
    parts = np.array([str(name) for name in names])
    train, test = np.flatnonzero(parts == _TRAIN), np.flatnonzero(parts == _TEST)
    if task.times is not None and len(train) and len(test):
        first = min(task.times[row] for row in test)
        latest = max((known or task.times)[row] for row in train)
        if latest > first:
            raise ConfigError(
                "labels",
                f"a training label became known at {latest}, after the first test row ({first})",
                "leave a gap as long as labels take to become known",
            )
    return Splits(f"{_TRAIN} against {_TEST} of the split column", ((train, test),))
