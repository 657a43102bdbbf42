"""Drift is told in standard deviations of what was served when the model was made."""

from dataclasses import replace

import numpy as np
import pytest

from llm4es.bundle import Bundle, SurpriseSpec
from llm4es.features import SNAPSHOT_EMBEDDING, SNAPSHOT_SURPRISE, FeatureRow, SumsLayout
from llm4es.testing import modelless_bundle
from llm4es.windows import WindowPolicy
from stream_worker.ops.drift import measure_drift
from tests.histories import START, schema

WINDOW = WindowPolicy(chapter_events=5, max_chapter_tokens=300)


def snapped() -> Bundle:
    """A bundle whose snapshot has mean 1 and deviation 2 throughout."""
    made = modelless_bundle(schema(), entity="customer", window=WINDOW)
    bare = replace(made, manifest=made.manifest.model_copy(update={"surprise": SurpriseSpec()}))
    columns = len(SumsLayout(bare).columns)
    moments = np.array([[1.0], [2.0]])
    arrays = {
        SNAPSHOT_EMBEDDING: np.repeat(moments, bare.manifest.dim, axis=1),
        SNAPSHOT_SURPRISE: np.repeat(moments, columns, axis=1),
    }
    return replace(bare, arrays={**bare.arrays, **arrays})


def rows(bundle: Bundle, *, at: float, spread: float, nats: float) -> list[FeatureRow]:
    """Two entities, `spread` above and below `at` in each dimension."""
    columns = len(SumsLayout(bundle).columns)
    return [
        FeatureRow(
            entity_id=f"c{side}",
            as_of=START,
            embedding=np.full(bundle.manifest.dim, at + side * spread, np.float32),
            surprise=np.full(columns, nats, np.float32),
            surprise_last=0.0,
            event_count=1,
            last_event_id="e",
            last_event_time=START,
            bundle_id=bundle.id,
        )
        for side in (-1, 1)
    ]


def test_what_is_served_as_it_was_has_not_moved() -> None:
    bundle = snapped()
    drift = measure_drift(bundle, rows(bundle, at=1, spread=2, nats=1))
    assert drift is not None
    assert (drift.rows, drift.embedding_shift, drift.embedding_spread) == (2, 0.0, 1.0)
    assert set(drift.surprise_shift) == set(SumsLayout(bundle).columns)
    assert set(drift.surprise_shift.values()) == {0.0}


def test_a_model_that_has_grown_old_is_surprised_more_and_its_vectors_have_moved() -> None:
    bundle = snapped()
    drift = measure_drift(bundle, rows(bundle, at=7, spread=1, nats=5))
    assert drift is not None
    assert drift.embedding_shift == pytest.approx(3.0)  # (7 - 1) / 2
    assert drift.embedding_spread == pytest.approx(0.5)
    assert set(drift.surprise_shift.values()) == {2.0}


def test_without_a_snapshot_or_rows_enough_nothing_is_said() -> None:
    bundle = snapped()
    assert measure_drift(replace(bundle, arrays={}), rows(bundle, at=1, spread=2, nats=1)) is None
    assert measure_drift(bundle, rows(bundle, at=1, spread=2, nats=1)[:1]) is None
    alike = measure_drift(bundle, rows(bundle, at=1, spread=0, nats=1))
    assert alike is not None
    assert alike.embedding_spread == 0.0
