"""The training set: entity rows with what was known then, as a matrix, checked for leaks.

A label row says which entity and when. By default it is joined as of its own time, which is before
the event it labels: an event is known a microsecond after it occurred at the earliest. With
`join="at"` it is joined at its own event's `as_of`: what a model sees that scores an event once it
is seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from feast import FeatureStore, FeatureView
from numpy.typing import NDArray

from llm4es.errors import ConfigError, Leak
from llm4es.feast.definitions import TIMESTAMP_FIELD, join_key_of
from llm4es.feast.offline_log import parts_table
from llm4es.feast.point_in_time import MATCHED, Asked, ask, connect, join, retrying
from llm4es.feast.reader import read_as_of
from llm4es.feast.services import served_view

__all__ = ["EntityFeatures", "Matrix", "TrainingSet", "training_frame"]

_FETCHED = ("embedding", "surprise", "surprise_last", "event_count", "last_event_id", "bundle_id")
_OWN = "__own_as_of"


@dataclass(frozen=True, slots=True)
class EntityFeatures:
    """What one entity's view knew of each of n entity rows; row i belongs to entity row i."""

    view: str
    bundle_id: str
    known: NDArray[np.bool_]  # (n,): whether there was a row
    embedding: NDArray[np.float32]  # (n, dim), NaN where nothing was known
    surprise: NDArray[np.float32]  # (n, columns), likewise
    surprise_columns: tuple[str, ...]
    scalars: pa.Table  # surprise_last, event_count, last_event_id and as_of (microseconds, UTC)

    @property
    def arrow(self) -> pa.FixedSizeListArray:
        """The embedding as (n,) lists of dim float32: the matrix's own memory."""
        flat = pa.array(self.embedding.reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, self.embedding.shape[1])

    def matrix(self, *parts: Literal["embedding", "surprise", "surprise_last"]) -> "Matrix":
        """Columns of some parts side by side, (n, width) float32, and their names."""
        blocks: list[NDArray[np.float32]] = []
        names: list[str] = []
        for part in parts or ("embedding", "surprise", "surprise_last"):
            if part == "embedding":
                blocks.append(self.embedding)
                names += [f"e{index}" for index in range(self.embedding.shape[1])]
            elif part == "surprise":
                blocks.append(self.surprise)
                names += self.surprise_columns
            else:
                last = self.scalars["surprise_last"].to_numpy().astype(np.float32)
                blocks.append(last[:, None])
                names.append("surprise_last")
        values = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
        return Matrix(values, tuple(names))


@dataclass(frozen=True, slots=True)
class Matrix:
    """Data (n, width) float32 and the names of their columns."""

    data: NDArray[np.float32]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Entity rows in the order they were given, and by entity what was known of them.

    `frame` has the caller's columns, those that `training_frame` needed (`label_available_at`,
    `joined_at`), and per entity `<entity>_surprise_last`, `_event_count`, `_as_of` and one column
    for each of its named surprises (`<entity>_amount_h16`).
    """

    frame: pd.DataFrame
    entities: Mapping[str, EntityFeatures]

    def known_by(self, moment: datetime) -> NDArray[np.bool_]:
        """Which rows' labels are known by then (n,): what may be trained on at that time."""
        mask: NDArray[np.bool_] = (self.frame["label_available_at"] <= moment).to_numpy()
        return mask

    def matrix(self, *parts: Literal["embedding", "surprise", "surprise_last"]) -> Matrix:
        """Of all entities side by side; names have the entity in front."""
        found = {entity: each.matrix(*parts) for entity, each in self.entities.items()}
        values = np.concatenate([each.data for each in found.values()], axis=1)
        return Matrix(
            values, tuple(f"{entity}_{n}" for entity, each in found.items() for n in each.names)
        )


def training_frame(
    store: FeatureStore,
    entity_df: pd.DataFrame,
    *,
    entities: Sequence[str],
    join_as: Literal["before", "at"] = "before",
    event_id: str | None = None,
    event_entity: str | None = None,
    label_delay: timedelta = timedelta(0),
    label_available_at: str | None = None,
) -> TrainingSet:
    """Fetch what each entity's stable view knew of each row, for training.

    `entity_df` has a join key per entity (customer -> customer_id), `event_timestamp` (when the
    labelled event occurred), and what else the caller wants to keep. A label is known
    `label_delay` after that, or at the column `label_available_at` names.

    `join_as="at"` needs `event_id`, the column of the labelled events' ids, and joins every entity
    at the event's own `as_of` in the log of `event_entity` (the first of `entities` by default);
    a row whose event has none (late, coalesced away, or not in the log) is joined before it. Where
    `event_id` is given, "before" is checked against the same.

    Raises Leak where a row was known only after the label is, or has seen the very event that it
    must not have seen; ConfigError for columns, entities and stores that do not fit.
    """
    if not entities:
        raise ConfigError("entities", "there are none", "name one, e.g. customer")
    if join_as == "at" and event_id is None:
        raise ConfigError("event_id", 'join_as="at" needs it', "name the column of event ids")
    keys = {entity: join_key_of(entity) for entity in entities}
    _refuse_columns(entity_df, [TIMESTAMP_FIELD, *keys.values()], event_id, label_available_at)
    views = {entity: served_view(store, entity) for entity in entities}
    frame = entity_df.reset_index(drop=True)
    frame[TIMESTAMP_FIELD] = pd.to_datetime(frame[TIMESTAMP_FIELD], utc=True)
    frame["label_available_at"] = (
        frame[TIMESTAMP_FIELD] + label_delay
        if label_available_at is None
        else pd.to_datetime(frame[label_available_at], utc=True)
    )
    of = event_entity or entities[0]
    own = None if event_id is None else _own_as_of(store, frame, of, event_id)
    frame["joined_at"] = frame[TIMESTAMP_FIELD].dt.as_unit("us")
    if join_as == "at" and own is not None:
        frame["joined_at"] = own.fillna(frame["joined_at"])
    asked = ask(frame[[*keys.values(), "joined_at"]], "joined_at", list(keys.values()))
    found = {entity: _features(store, view, asked) for entity, view in views.items()}
    for entity, each in found.items():
        _refuse_leaks(frame, entity, each, own, seen=join_as == "at")
    columns: dict[str, Any] = {}
    for entity, each in found.items():
        for name in ("surprise_last", "event_count", "as_of"):
            columns[f"{entity}_{name}"] = each.scalars[name].to_pandas()
        for index, name in enumerate(each.surprise_columns):
            columns[f"{entity}_{name}"] = each.surprise[:, index]
    return TrainingSet(pd.concat([frame, pd.DataFrame(columns)], axis=1), found)


def _features(store: FeatureStore, view: FeatureView, asked: Asked) -> EntityFeatures:
    table = parts_table(store.config, view, _FETCHED)

    def query() -> pa.Table:
        with connect() as connection:
            return join(connection, asked, table)

    found = retrying(query)
    columns = tuple(filter(None, view.tags.get("surprise_columns", "").split(",")))
    known = found[MATCHED].is_valid().to_numpy().astype(np.bool_)
    bundles = set(found["bundle_id"].drop_null().unique().to_pylist())
    bundle_id = view.tags["bundle_id"]
    if other := bundles - {bundle_id}:
        raise ConfigError(
            f"feature view {view.name}",
            f"its log holds rows of bundle {min(other)}",
            "give each bundle a log of its own",
        )
    scalars = pa.table(
        {
            "surprise_last": found["surprise_last"],
            "event_count": found["event_count"],
            "last_event_id": found["last_event_id"],
            "as_of": found[MATCHED].cast(pa.timestamp("us")).cast(pa.timestamp("us", "UTC")),
        }
    )
    return EntityFeatures(
        view=view.name,
        bundle_id=bundle_id,
        known=known,
        embedding=_matrix(found["embedding"], known, int(view.tags["dim"])),
        surprise=_matrix(found["surprise"], known, len(columns)),
        surprise_columns=columns,
        scalars=scalars,
    )


def _matrix(column: pa.ChunkedArray, known: NDArray[np.bool_], width: int) -> NDArray[np.float32]:
    """Lists (n,) of float32 as (n, width): their own memory where every row is known."""
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # of no rows at all
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], column.type)
    values: NDArray[np.float32] = lists.flatten().to_numpy(zero_copy_only=True)
    if len(values) != int(known.sum()) * width:
        raise ConfigError(
            "offline log", f"holds vectors that are not {width} wide", "compact and audit it"
        )
    if known.all():
        return values.reshape(len(known), width)
    spread = np.full((len(known), width), np.nan, np.float32)
    spread[known] = values.reshape(-1, width)
    return spread


def _own_as_of(
    store: FeatureStore, frame: pd.DataFrame, entity: str, event_id: str
) -> "pd.Series[Any]":
    """When each row's own event was known, in the log of its entity; NaT where it has no row."""
    key = join_key_of(entity)
    known = read_as_of(store, entity).rename(columns={"event_id": event_id, "as_of": _OWN})
    merged = frame[[key, event_id]].merge(known, on=[key, event_id], how="left", validate="m:1")
    return merged[_OWN]


def _refuse_columns(frame: pd.DataFrame, needed: Sequence[str], *optional: str | None) -> None:
    for name in (*needed, *filter(None, optional)):
        if name not in frame.columns:
            raise ConfigError("entity_df", f"has no column {name}", f"it has {list(frame.columns)}")


def _refuse_leaks(
    frame: pd.DataFrame,
    entity: str,
    features: EntityFeatures,
    own: "pd.Series[Any] | None",
    *,
    seen: bool,
) -> None:
    as_of = features.scalars["as_of"].to_pandas()
    available = frame["label_available_at"]
    delayed = bool((available > frame[TIMESTAMP_FIELD]).any())
    late = features.known & (
        (as_of > available) if delayed or not seen else (as_of > frame["joined_at"])
    ).to_numpy(dtype=bool)
    _refuse(late, frame, entity, "was known only after the label")
    if own is not None and not seen:
        leaked = features.known & (as_of >= own).to_numpy(dtype=bool)
        _refuse(
            leaked,
            frame,
            entity,
            "has seen the labelled event itself; is event_timestamp when it occurred, in UTC?",
        )


def _refuse(wrong: NDArray[np.bool_], frame: pd.DataFrame, entity: str, problem: str) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        moment = frame[TIMESTAMP_FIELD].iloc[row]
        raise Leak(
            f"{int(wrong.sum())} of {len(wrong)} rows leak: the {entity} row of entity row {row} "
            f"(labelled {moment}) {problem}"
        )
