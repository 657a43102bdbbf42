"""What stock Feast does not answer: as of when an event itself was known.

A label row that carries an event id joins at that event's own `as_of`: the row that a model sees
once it has seen the event, and not a microsecond of what came after.
"""

import pandas as pd
import pyarrow as pa
from feast import FeatureStore
from pyarrow import parquet

from llm4es.errors import ConfigError
from llm4es.feast.definitions import TIMESTAMP_FIELD, join_key_of
from llm4es.feast.deletions import pending_deletions, without_deleted
from llm4es.feast.object_store import LogFolder, opened
from llm4es.feast.offline_log import log_folder
from llm4es.feast.parts import list_parts, log_schema
from llm4es.feast.point_in_time import retrying
from llm4es.feast.services import served_view

__all__ = ["read_as_of"]

_EVENT_ID = "last_event_id"


def read_as_of(store: FeatureStore, entity: str) -> pd.DataFrame:
    """Give (join key, event_id, as_of), one row per event that a row was published for.

    The view is the one that the entity's stable service points to. `as_of` is in UTC, exact to
    the microsecond; the oldest comes first. An event id is taken to name one event of an entity.

    Not every event is here:

    - One that arrived late (older than the entity's newest event, folded into its place) was
      never the newest, so no row is its own: it is seen from the next row of its entity on,
      whose `last_event_id` is another's. That row repeats the newest event's id at a later
      `as_of`; the earliest row of an id is the event's own.
    - A worker that coalesces embeds an entity once per batch: events between two rows have none,
      and where a late event shared the newest one's batch, their `as_of` is the later of the
      two. A log written with `--every-event` has a row at every event's own.
    - Rows that are journalled and not rolled yet (seconds, see `journal_roll_s`) cannot be read.

    Raises ConfigError where the registry has no such service, or its log is not on this machine.
    """
    view = served_view(store, entity)
    folder = log_folder(store.config, view.batch_source)
    if folder is None:
        raise ConfigError(
            "offline_path",
            f"view {view.name} has no folder on this machine as its batch source",
            "read where the log stands, or mount its folder here",
        )
    join_key = join_key_of(entity)
    columns = [join_key, _EVENT_ID, TIMESTAMP_FIELD]
    found = retrying(lambda: _read_columns(folder, join_key, columns))
    earliest = (
        found.group_by([join_key, _EVENT_ID])
        .aggregate([(TIMESTAMP_FIELD, "min")])
        .select([join_key, _EVENT_ID, f"{TIMESTAMP_FIELD}_min"])
        .rename_columns([join_key, "event_id", "as_of"])
        .sort_by([("as_of", "ascending"), (join_key, "ascending")])
    )
    frame: pd.DataFrame = earliest.to_pandas()
    return frame


def _read_columns(folder: LogFolder, join_key: str, columns: list[str]) -> pa.Table:
    pending = pending_deletions(folder)  # before parts are listed, see `deletions`
    parts = [parquet.read_table(opened(part), columns=columns) for part in list_parts(folder)]
    rows = pa.concat_tables([log_schema(join_key).empty_table().select(columns), *parts])
    return without_deleted(rows, pending, join_key=join_key, timestamp=TIMESTAMP_FIELD)
