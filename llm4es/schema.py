"""Event schemas: which fields of a record are read, what they mean, and how they are worded.

A schema is an allow-list. A field that it does not name is never kept, rendered or logged,
whatever else a producer puts into a record.
"""

import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from llm4es.errors import ConfigError

__all__ = [
    "CategoriesField",
    "CategoryField",
    "EntityKey",
    "EventSchema",
    "EventTime",
    "EventType",
    "FieldSpec",
    "FlagField",
    "FrozenModel",
    "LogBuckets",
    "NumberField",
    "QuantileBuckets",
    "TextField",
    "canonical_json",
    "first_problem",
    "load_schema",
]


class FrozenModel(BaseModel):
    """Unknown keys are refused (a misspelt key must not be ignored), values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Labelled(FrozenModel):
    label: str | None = None  # the word in the header line; the field's own name by default
    nullable: bool = False  # null or absent is accepted, and rendered as nothing
    render: bool = True  # false: checked and kept, never part of the text


class QuantileBuckets(FrozenModel):
    """Edges at equally likely values, learnt on training entities and kept in the bundle.

    `tail` are shares beside them at which there is an edge too: where what matters is rare and
    large, (0.98, 0.99, 0.995, 0.999) tells apart what the topmost bucket would hold.
    """

    quantiles: int = Field(ge=2, le=1024)
    # Left out of a dump where it says nothing: hashes of schemas without it stand.
    tail: tuple[float, ...] = Field(default=(), exclude_if=lambda tail: not tail)

    @field_validator("tail")
    @classmethod
    def _shares_rise(cls, tail: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < share < 1 for share in tail) or not _rises(tail):
            msg = "tail shares lie between 0 and 1 and rise strictly"
            raise ValueError(msg)
        return tail

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of the values below each edge, rising: what the edges are learnt at."""
        equal = {step / self.quantiles for step in range(1, self.quantiles)}
        return tuple(sorted(equal | set(self.tail)))


class LogBuckets(FrozenModel):
    """Buckets at equal ratios, named by their lower edge; they need not be learnt.

    `log` is how many there are between 1 and 10; "natural" is the paper's rule, ln(1 + |x|) cut
    to an integer. A negative number has its sign in front, zero is a bucket of its own.
    """

    log: Literal["natural"] | Annotated[int, Field(ge=1, le=20)]


def _buckets_kind(buckets: object) -> str:
    if isinstance(buckets, LogBuckets) or (isinstance(buckets, Mapping) and "log" in buckets):
        return "log"
    return "quantiles" if isinstance(buckets, QuantileBuckets | Mapping) else "edges"


class NumberField(_Labelled):
    """An integer or float; booleans, strings, NaN and infinities are refused."""

    kind: Literal["number"]
    unit: str | None = None
    decimals: int | None = Field(default=None, ge=0, le=9)  # rounded so when rendered
    # Digits that are kept when rendered. Left out of a dump where it says nothing, as `tail` is.
    significant: int | None = Field(
        default=None, ge=1, le=15, exclude_if=lambda digits: digits is None
    )
    buckets: (
        Annotated[
            Annotated[tuple[float, ...], Field(min_length=1), Tag("edges")]
            | Annotated[QuantileBuckets, Tag("quantiles")]
            | Annotated[LogBuckets, Tag("log")],
            Discriminator(_buckets_kind),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _one_way_to_write(self) -> Self:
        if isinstance(self.buckets, tuple) and not _rises(self.buckets):
            msg = "bucket edges must rise strictly"
            raise ValueError(msg)
        if self.significant is not None and (self.decimals is not None or self.buckets):
            other = "decimals" if self.decimals is not None else "buckets"
            msg = f"significant and {other} exclude each other: name one of them"
            raise ValueError(msg)
        return self


def _rises(values: tuple[float, ...]) -> bool:
    return all(a < b for a, b in pairwise(values))


class CategoryField(_Labelled):
    """One of many codes; `names` gives the words that the model reads in their place."""

    kind: Literal["category"]
    codes: Literal["string", "integer"] = "string"
    names: Mapping[str, str] = Field(default_factory=dict)
    closed: bool = False  # true: a code without a name is a bad record
    max_length: int = Field(default=256, ge=1)


class CategoriesField(_Labelled):
    """A list of string codes, rendered in the record's order."""

    kind: Literal["categories"]
    names: Mapping[str, str] = Field(default_factory=dict)
    max_items: int = Field(default=64, ge=1)
    max_length: int = Field(default=256, ge=1)


class FlagField(_Labelled):
    """A JSON boolean; `words` are what false and true are rendered as."""

    kind: Literal["flag"]
    words: tuple[str, str] = ("no", "yes")


class TextField(_Labelled):
    """Free text, escaped when rendered."""

    kind: Literal["text"]
    max_length: int = Field(default=1024, ge=1)


FieldSpec = Annotated[
    NumberField | CategoryField | CategoriesField | FlagField | TextField,
    Field(discriminator="kind"),
]


class EntityKey(FrozenModel):
    """The record's field that holds one entity's id (a string or an integer)."""

    field: str = Field(min_length=1)
    label: str | None = None


class EventTime(FrozenModel):
    """Where the event time stands: ISO 8601 text, or a number of `unit` since 1970 in UTC."""

    field: str = Field(min_length=1)
    format: Literal["iso8601", "epoch"] = "iso8601"
    unit: Literal["s", "ms", "us", "ns"] = "s"


class EventType(FrozenModel):
    """The fields of one type of event, in the order in which its line shows them."""

    label: str | None = None
    fields: Mapping[str, FieldSpec]


class EventSchema(FrozenModel):
    """What a record of the log means. Built by `load_schema` from YAML."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    entities: Mapping[str, EntityKey] = Field(min_length=1)
    event_id: str | None = None  # the field; without it the record's coordinates identify it
    event_time: EventTime
    type_field: str | None = None  # tells the types apart; needed where there are several
    types: Mapping[str, EventType] = Field(min_length=1)

    @model_validator(mode="after")
    def _types_can_be_told_apart(self) -> Self:
        if self.type_field is None and len(self.types) > 1:
            msg = f"{len(self.types)} event types need a type_field that tells them apart"
            raise ValueError(msg)
        for name in self.entities:
            if not name.isidentifier() or not name.islower():
                msg = f"entity {name!r} must be a lower-case identifier: Feast names come from it"
                raise ValueError(msg)
        labels = [kind.label or name for name, kind in self.types.items()]
        if len(set(labels)) != len(labels):
            msg = "two event types have one label: their lines could not be told apart"
            raise ValueError(msg)
        return self

    @property
    def sha256(self) -> str:
        """Hash of everything the schema says, independent of YAML's spelling."""
        return hashlib.sha256(canonical_json(self)).hexdigest()

    def entity(self, name: str) -> EntityKey:
        """Look an entity up; raises ConfigError that lists those there are."""
        try:
            return self.entities[name]
        except KeyError:
            known = ", ".join(self.entities)
            raise ConfigError(
                "entity", f"schema {self.name!r} has no entity {name!r}", f"choose one of: {known}"
            ) from None


def canonical_json(model: BaseModel) -> bytes:
    """One spelling per meaning: what hashes are taken over (mappings keep their order)."""
    return json.dumps(
        model.model_dump(mode="json"), ensure_ascii=False, separators=(",", ":")
    ).encode()


def first_problem(error: ValidationError) -> tuple[str, str]:
    """The first failing field of a pydantic error as ("types.payment.kind", "what is wrong")."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(str(part) for part in first["loc"]) or "document", first["msg"]


def load_schema(source: Path | str) -> EventSchema:
    """Read a schema from a YAML file (a `Path`) or from YAML text (a `str`).

    Raises ConfigError naming the field and the remedy.
    """
    where = str(source) if isinstance(source, Path) else "schema"
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        document = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(where, f"cannot be read ({error})", "name an event schema") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(where, f"is not YAML ({problem})", "mend the file") from error
    try:
        return EventSchema.model_validate(document)
    except ValidationError as error:
        field, problem = first_problem(error)
        raise ConfigError(
            f"{where}: {field}", problem, "mend the event schema (docs/schema.md lists every key)"
        ) from error
