"""Tiny Llamas, exported: random weights, for what the path from windows to vectors must hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from export.graphs import export_graphs
from export.models import new_llama
from export.recipe import Shape
from llm4es.bundle import Bundle, Compute, Pooling, SurpriseSpec, load_bundle, seal_bundle
from llm4es.engine import OnnxEmbedder
from llm4es.engine.kv_cache import ChapterCache
from llm4es.engine.opening import open_graph
from llm4es.events import Event
from llm4es.features import Embedded
from llm4es.rendering import RenderingSpec
from llm4es.surprise import MEANS, PERCENTILES, SurpriseTracks
from llm4es.testing import byte_tokenizer, modelless_bundle
from llm4es.windows import Window, WindowPolicy, fold, is_anchor
from tests.histories import SCHEMA_YAML, event, schema

TOLERANCE = 1e-5  # the manifest's default, relative to the largest value
BOS = 256  # behind the 256 bytes of the tokenizer
SHAPE = Shape(hidden_size=32, layers=2, heads=2, intermediate_size=64, vocabulary=BOS + 1)
CHAPTER_EVENTS = 5
POLICY = WindowPolicy(
    chapter_events=CHAPTER_EVENTS, max_chapter_tokens=300, allowed_lateness=timedelta(hours=1)
)
DEPTH_CAP = 3
POISON = "~"  # a byte that no other value of these events has


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to pool, to be exported and compared."""

    pooling: Pooling
    surprise: bool
    bos_id: int | None = BOS


VARIANTS = {
    "token and last layer, side by side, rms, surprise": Variant(
        Pooling(layers=(0, -1), scales=(math.inf, 16.0, 4.0)), surprise=True
    ),
    "all layers averaged, as they are, surprise, no begin": Variant(
        Pooling(layers=(0, 1, 2), combine="average", normalise="none", scales=(4.0, math.inf)),
        surprise=True,
        bos_id=None,
    ),
    "tokens alone averaged, rms": Variant(
        Pooling(layers=(0,), combine="average", scales=(2.0,)), surprise=False
    ),
    "last two side by side, as they are": Variant(
        Pooling(layers=(1, 2), normalise="none", scales=(math.inf, 1.0)), surprise=False
    ),
}


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle, and the model that it was exported from."""

    bundle: Bundle
    model: Any  # transformers has no types


def make_bundle(
    folder: Path,
    variant: Variant,
    *,
    poison: bool = False,
    seed: int = 1,
    compute: Compute | None = None,
) -> Exported:
    """Export a random Llama and seal a bundle around it, as `export` does after training."""
    torch.manual_seed(seed)
    model = new_llama(
        SHAPE, vocabulary=SHAPE.vocabulary, positions=POLICY.max_chapter_tokens + 200, bos_id=BOS
    ).eval()
    tokenizer = byte_tokenizer()
    if poison:
        with torch.no_grad():
            model.model.embed_tokens.weight[tokenizer.token_to_id(POISON)] = torch.nan
    export_graphs(model, variant.pooling, folder, surprise=variant.surprise)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "schema.yaml").write_text(SCHEMA_YAML)
    rendering = RenderingSpec(ratios=("amount",))
    bare = modelless_bundle(schema(), entity="customer", window=POLICY, rendering=rendering)
    cells = len(SurpriseTracks(bare.schema, bare.renderer).cells)
    rng = np.random.default_rng(2)
    save_file(
        {
            MEANS: rng.uniform(20, 60, (cells, DEPTH_CAP + 1)),
            PERCENTILES: rng.uniform(0, 20, cells),
        },
        folder / "arrays.safetensors",
    )
    scales = len(variant.pooling.scales)
    seal_bundle(
        folder,
        bare.manifest.model_copy(
            update={
                "pooling": variant.pooling,
                "surprise": SurpriseSpec(depth_cap=DEPTH_CAP) if variant.surprise else None,
                "hidden_size": SHAPE.hidden_size,
                "dim": variant.pooling.state_dim(SHAPE.hidden_size) * scales,
                "bos_id": variant.bos_id,
                "compute": compute or Compute(),
            }
        ),
    )
    return Exported(load_bundle(folder), model)


def embedder_of(
    exported: Exported, *, memo_bytes: int = 1 << 20, cache: ChapterCache | None = None
) -> OnnxEmbedder:
    graph = open_graph(exported.bundle, device="cpu", threads=1)
    return OnnxEmbedder(exported.bundle, graph, cache=cache, memo_bytes=memo_bytes)


def events_of(number: int, *, customer: int = 0, note: str | None = None) -> list[Event]:
    """Payments and logins of many lengths, every customer's of its own."""
    rng = np.random.default_rng(customer)
    made = []
    for index in range(number):
        login = rng.random() < 0.3
        made.append(
            event(
                index * 200.0 + float(rng.integers(0, 150)),
                entity_id=f"c{customer}",
                event_id=f"{customer}.{index}",
                kind="login" if login else "payment",
                fields={"device": "d" * int(rng.integers(1, 12)), "ok": bool(rng.random() < 0.5)}
                if login
                else {"amount": float(rng.integers(1, 99_999)) / 100, "goods": "g1", "note": note},
            )
        )
    return sorted(made, key=lambda e: e.key)


def one_chapter(*notes: str | None) -> list[Event]:
    """Payments, none of which opens a chapter by its id."""
    ids = (f"e{number}" for number in count() if not is_anchor(f"e{number}", CHAPTER_EVENTS))
    return [
        event(
            60 * number,
            event_id=event_id,
            fields={"amount": 1.5 * (number + 1), "goods": "g1", "note": note},
        )
        for number, (event_id, note) in enumerate(zip(ids, notes, strict=False))
    ]


def window_of(bundle: Bundle, events: Sequence[Event]) -> Window:
    window = Window(entity_id=events[0].entity_id)
    for arrived in events:
        window = fold(
            window,
            arrived,
            recorded_at=arrived.occurred_at,
            policy=bundle.manifest.window,
            measure=bundle.tokens.measure,
        ).window
    return window


def assert_close(found: Any, expected: Any, *, tolerance: float = TOLERANCE) -> None:  # noqa: ANN401
    """Largest difference over the largest value, as the manifest means its tolerance."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    if expected.size:
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def assert_same(found: Embedded, rows: Sequence[int], other: Embedded) -> None:
    """Rows of one answer against another's, within the manifest's tolerance."""
    for row, index in enumerate(rows):
        assert_close(found.vectors[index], other.vectors[row])
        assert_close(found.surprise[index], other.surprise[row])
        assert_close(found.surprise_last[index], other.surprise_last[row])
