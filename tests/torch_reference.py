"""Embedding and surprise from transformers' own model, straight from their definition.

Nothing of `llm4es.engine` is used: every token of the history is weighed by its own distance in
events from the newest one, and every event's surprise likewise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llm4es.bundle import Bundle
from llm4es.events import Event
from llm4es.windows import Window, visible_chapters


@dataclass(frozen=True, slots=True)
class Expected:
    """What should be served for a window."""

    embedding: NDArray[np.float64]
    surprise: dict[str, float]  # by column
    surprise_last: float


@dataclass(frozen=True, slots=True)
class _Judged:
    """One event: deviation and excess by track."""

    deviation: dict[str, float]
    excess: dict[str, float]


def load_model(bundle: Bundle) -> Any:  # noqa: ANN401 - transformers has no types
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - heavy

    model = AutoModelForCausalLM.from_pretrained(bundle.folder / "model", dtype=torch.float32)
    model.eval()
    return model


def expect(bundle: Bundle, model: Any, window: Window) -> Expected:  # noqa: ANN401
    """Read every chapter that the window shows; its events must all still be there."""
    states, token_events = [], []
    judged: list[_Judged] = []
    for index in visible_chapters(window, bundle.manifest.window):
        events = window.chapters[index].events
        chapter_states, nats, offsets = _read(bundle, model, events)
        states.append(chapter_states)
        token_events.append(offsets + len(judged))
        judged += _judge(bundle, events, nats)
    after = len(judged) - 1 - np.concatenate(token_events)
    tokens = np.concatenate(states)
    vector = []
    for scale in bundle.manifest.pooling.scales:
        weights = 0.5 ** (after / scale)
        vector.append(weights @ tokens / weights.sum())
    return Expected(
        embedding=np.concatenate(vector),
        surprise=_means(bundle, judged),
        surprise_last=judged[-1].deviation["all"],
    )


def _read(
    bundle: Bundle,
    model: Any,  # noqa: ANN401
    events: Sequence[Event],
) -> tuple[NDArray[np.float64], list[dict[str, float]], NDArray[np.int64]]:
    """Token states (T, d), each event's nats by field, and each token's event (T,)."""
    chapter = bundle.tokens.tokenize(events)
    header = len(bundle.tokens.header_ids)
    ids = np.concatenate([bundle.tokens.header_ids, chapter.ids])
    with torch.no_grad():
        out = model(torch.from_numpy(ids)[None], output_hidden_states=True)
    pooling = bundle.manifest.pooling
    layers = []
    for layer in pooling.layers:
        state = out.hidden_states[layer][0, header:].double().numpy()
        if pooling.normalise == "rms":
            state = state / np.sqrt((state**2).mean(axis=1, keepdims=True) + 1e-6)
        layers.append(state)
    states = (
        np.mean(layers, axis=0) if pooling.combine == "average" else np.concatenate(layers, axis=1)
    )
    scores = torch.log_softmax(out.logits[0].double(), dim=-1).numpy()
    nats: list[dict[str, float]] = [{"all": 0.0} for _ in events]
    for place, (id_, event, owner) in enumerate(
        zip(chapter.ids, chapter.events, chapter.owners, strict=True)
    ):
        value = -scores[header + place - 1, id_]
        nats[event]["all"] += value
        if owner >= 0:
            field = bundle.renderer.fields(events[event].type)[owner]
            nats[event][field] = nats[event].get(field, 0.0) + value
    return states, nats, chapter.events


def _judge(
    bundle: Bundle, events: Sequence[Event], nats: Sequence[dict[str, float]]
) -> list[_Judged]:
    spec = bundle.manifest.surprise
    assert spec is not None
    several = len(bundle.schema.types) > 1
    cells: dict[tuple[str, str], int] = {}
    for kind in bundle.schema.types:
        for field in ("all", *bundle.renderer.fields(kind)):
            cells[kind, field] = len(cells)
    judged = []
    for depth, (event, found) in enumerate(zip(events, nats, strict=True)):
        deviation, excess = {}, {}
        for field in ("all", *bundle.renderer.fields(event.type)):
            cell = cells[event.type, field]
            mean = bundle.arrays["surprise.means"][cell, min(depth, spec.depth_cap)]
            track = f"{event.type}_{field}" if several and field != "all" else field
            deviation[track] = found.get(field, 0.0) - mean
            excess[track] = max(0.0, deviation[track] - bundle.arrays["surprise.p95"][cell])
        judged.append(_Judged(deviation, excess))
    return judged


def _means(bundle: Bundle, judged: Sequence[_Judged]) -> dict[str, float]:
    """Weighted means over the events that have the track, by the names of the manifest."""
    tracks = ["all"]
    for kind in bundle.schema.types:
        several = len(bundle.schema.types) > 1
        tracks += [f"{kind}_{f}" if several else f for f in bundle.renderer.fields(kind)]
    means = {}
    for track in tracks:
        for suffix, statistic in (("", "deviation"), ("_excess", "excess")):
            for scale in bundle.manifest.pooling.scales:
                total = weight = 0.0
                for index, event in enumerate(judged):
                    values = getattr(event, statistic)
                    if track in values:
                        own = 0.5 ** ((len(judged) - 1 - index) / scale)
                        total += own * values[track]
                        weight += own
                means[f"{track}{suffix}_h{scale:g}"] = total / weight if weight else 0.0
    return means
