"""Online rows of one feature view as a stock client sees them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from llm4es.bundle import Bundle
from llm4es.errors import SinkUnavailable
from llm4es.feast.definitions import FIELDS, ViewSpec
from llm4es.feast.online import OnlineRows, ViewTarget
from llm4es.feast.opening import open_rows, open_target
from llm4es.features import FeatureRow

__all__ = ["OnlineReader", "open_reader"]


class OnlineReader:
    """Reads rows; built by `open_reader`, or by a sink for what it writes."""

    def __init__(self, target: ViewTarget, online: OnlineRows) -> None:
        self._target = target
        self._online = online

    def read(self, entity_ids: Sequence[str]) -> list[FeatureRow | None]:
        """Rows as a stock client sees them; `as_of` as exactly as the store knows it.

        `last_event_time` is in whole seconds. Raises SinkUnavailable.
        """
        if not entity_ids:
            return []
        moments = self._online.as_of(entity_ids)
        view = self._target.view.name
        try:
            found = self._target.store.get_online_features(
                features=[f"{view}:{name}" for name in FIELDS],
                entity_rows=[{self._target.join_key: entity_id} for entity_id in entity_ids],
            ).to_dict()
        except Exception as error:
            # Vendors' errors come through Feast as they are.
            raise SinkUnavailable(f"online store: {error!r}") from error
        return [
            None  # not there, or deleted: then the timestamp stands alone
            if moment is None or found["bundle_id"][index] is None
            else _row(entity_id, moment, found, index)
            for index, (entity_id, moment) in enumerate(zip(entity_ids, moments, strict=True))
        ]

    def close(self) -> None:
        """Release the connection."""
        self._online.close()


def open_reader(
    repo_path: Path, bundle: Bundle | ViewSpec, *, config_file: str = "feature_store.yaml"
) -> OnlineReader:
    """Open the feature view of a bundle for reading: nothing is made, recovered or rolled.

    Raises as `open_sink` does.
    """
    target, _ = open_target(repo_path, bundle, config_file)
    return OnlineReader(target, open_rows(target, read_only=True))


def _row(entity_id: str, as_of: datetime, found: dict[str, list[Any]], index: int) -> FeatureRow:
    return FeatureRow(
        entity_id=entity_id,
        as_of=as_of,
        embedding=np.array(found["embedding"][index], np.float32),
        surprise=np.array(found["surprise"][index], np.float32),
        surprise_last=found["surprise_last"][index],
        event_count=found["event_count"][index],
        last_event_id=found["last_event_id"][index],
        last_event_time=found["last_event_time"][index].astimezone(UTC),
        bundle_id=found["bundle_id"][index],
    )
