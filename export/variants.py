"""Variants: a bundle in less precision, let through if it serves nearly what its origin does."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from rich.console import Console

from export.card import model_card
from export.corpus import EventLog, read_log
from export.embed import AsOf
from export.judging import NEIGHBOURS, Likeness, Rows, auc, compare, furthest, served
from export.labels import LabelColumns, Task, read_task
from export.quantize import write_variant
from llm4es.bundle import (
    Bundle,
    CachePrecision,
    Compute,
    ComputePrecision,
    Judged,
    load_bundle,
    seal_bundle,
)
from llm4es.engine import OnnxEmbedder, default_threads
from llm4es.engine.kv_cache import ChapterCache
from llm4es.engine.opening import open_graph
from llm4es.errors import ConfigError, NonFiniteEmbedding
from llm4es.events import Event

__all__ = ["AUC_LOSS", "COSINE", "KEPT_NEIGHBOURS", "Wanted", "make_variant"]

COSINE = 0.99  # what a variant must hold, as the two after it
KEPT_NEIGHBOURS = 0.95
AUC_LOSS = 0.002
_FEWEST = 2 * (NEIGHBOURS + 1)  # entities, below which neighbours say nothing
_COMPARED = 32  # entities on which reading on is compared with reading anew
_SLACK = 2.0  # of the tolerance above the worst that was seen
# Where activations are rounded, noise of 1e-7 seldom tips one over an edge, and then shows as that
# precision's own step: a sample need not have met it.
_LEAST = {"fp16": 1e-3, "bf16": 1e-2, "int8": 1e-2}
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to make of which bundle, and what to judge it on.

    `entities` of the log are drawn for vectors; labels, where there are some, are judged whole.
    """

    bundle: Path
    out: Path
    events: Path
    labels: Path | None = None
    columns: LabelColumns | None = None
    precision: ComputePrecision = "fp32"
    cache: CachePrecision = "fp32"
    keep: str | None = None
    entities: int = 200
    force: bool = False


def make_variant(wanted: Wanted, console: Console) -> Bundle:
    """Quantize, judge, seal and put into place; progress goes to `console`.

    Raises ConfigError for a variant that loses too much (unless forced), for one whose vectors are
    not finite, and for what the caller can mend; BundleMismatch for a source that is no bundle.
    """
    source = load_bundle(wanted.bundle)
    _refuse(wanted, source)
    with console.status(f"reading {wanted.events.name}"):
        log = read_log(wanted.events, source.schema, entity=source.manifest.entity)
        task = _task(wanted, source)
        asked = _drawn(log, wanted.entities)
    folder = wanted.out.with_name(f".{wanted.out.name}-variant")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with console.status(f"quantizing to {wanted.precision}"):
            write_variant(source, wanted.precision, folder, keep=wanted.keep)
            bare = Compute(precision=wanted.precision, cache=wanted.cache)
            manifest = source.manifest.model_copy(update={"compute": bare, "parity": {}})
            seal_bundle(folder, manifest)
        with console.status("judging"):
            compute = _judge(source, load_bundle(folder), log, asked, task)
        lost = _lost(compute)
        if lost and not wanted.force:
            raise ConfigError(
                "precision",
                f"{_name(wanted)} loses too much: {'; '.join(lost)}",
                "take another precision, spare products with --keep, or --force it",
            )
        forced = compute.judged and compute.judged.model_copy(update={"forced": bool(lost)})
        sealed = seal_bundle(
            folder,
            manifest.model_copy(update={"compute": compute.model_copy(update={"judged": forced})}),
        )
        provenance = {
            "bundle": sealed.id,
            "quantized_from": source.id,
            "kept_in_fp32": wanted.keep,
            "events": wanted.events.name,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        card = model_card(sealed, source.renderer.header)
        (folder / "README.md").write_text(card, encoding="utf-8")
        load_bundle(folder)  # what is put into place is what a worker accepts
        folder.rename(wanted.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return load_bundle(wanted.out)


def _name(wanted: Wanted) -> str:
    cache = "" if wanted.cache == "fp32" else f" with keys and values in {wanted.cache}"
    return f"{wanted.precision}{cache}"


def _refuse(wanted: Wanted, source: Bundle) -> None:
    compute = source.manifest.compute
    if wanted.out.exists():
        raise ConfigError("out", f"{wanted.out} is there", "name another folder")
    if (compute.precision, compute.cache) != ("fp32", "fp32"):
        made = f"is in {compute.precision}, with a cache in {compute.cache}"
        raise ConfigError(
            "bundle", f"{wanted.bundle} {made}", "name the fp32 bundle it was made of"
        )
    if (wanted.precision, wanted.cache) == ("fp32", "fp32"):
        raise ConfigError("precision", "fp32 is what there is", "name another, or another --cache")


def _task(wanted: Wanted, source: Bundle) -> Task | None:
    if wanted.labels is None:
        return None
    field = source.schema.entity(source.manifest.entity).field
    return read_task(wanted.labels, wanted.columns or LabelColumns(), entity_field=field)


def _drawn(log: EventLog, count: int) -> list[AsOf]:
    """Some entities, drawn alike each time, as of the log's end."""
    known = sorted(entity for entity, history in log.histories.items() if history)
    if len(known) < _FEWEST:
        problem = f"has {len(known)} entities, and neighbours of fewer than {_FEWEST} say nothing"
        raise ConfigError("events", problem, "name a log of more entities")
    chosen = np.random.default_rng(0).permutation(len(known))[: max(count, _FEWEST)]
    return [AsOf(known[index], _end(log)) for index in sorted(chosen.tolist())]


def _end(log: EventLog) -> datetime:
    newest = max(history[-1].occurred_at for history in log.histories.values() if history)
    return newest + _MICROSECOND


def _judge(
    source: Bundle, variant: Bundle, log: EventLog, asked: Sequence[AsOf], task: Task | None
) -> Compute:
    """The variant's compute, with its figures and the tolerance that reading on needs."""
    histories: Mapping[str, Sequence[Event]] = log.histories
    moments = [] if task is None else task.asked(_end(log))
    both = [*asked, *moments]
    try:
        exact, found = (served(_open(one), histories, both) for one in (source, variant))
        some = asked[:_COMPARED]
        anew = served(_open(variant, 0), histories, some)
    except NonFiniteEmbedding as error:
        raise ConfigError(
            "precision", "its vectors are not finite", "take another precision"
        ) from error
    likeness: Likeness = compare(*(_part(one, 0, len(asked)) for one in (exact, found)))
    loss = None
    if task is not None:
        before, after = (auc(_part(one, len(asked), len(both)), task) for one in (exact, found))
        loss = _rounded(before - after)
    surprise = likeness.surprise_cosine
    return Compute(
        precision=variant.manifest.compute.precision,
        cache=variant.manifest.compute.cache,
        tolerance=_tolerance(
            furthest(anew, _part(found, 0, len(some))), variant.manifest.compute.precision
        ),
        judged=Judged(
            origin=source.id,
            entities=len(asked),
            cosine=_rounded(likeness.cosine),
            neighbours=_rounded(likeness.neighbours),
            surprise_cosine=None if surprise is None else _rounded(surprise),
            auc_loss=loss,
        ),
    )


def _open(bundle: Bundle, budget: int = 1 << 30) -> OnnxEmbedder:
    graph = open_graph(bundle, device="auto", threads=default_threads())
    return OnnxEmbedder(bundle, graph, cache=ChapterCache(budget))


def _part(rows: Rows, start: int, end: int) -> Rows:
    return Rows(rows.vectors[start:end], rows.surprise[start:end])


def _lost(compute: Compute) -> list[str]:
    judged = compute.judged
    if judged is None:
        return []
    lost = []
    if not judged.cosine >= COSINE:
        lost.append(f"std-centred cosine {judged.cosine:.4f} (at least {COSINE})")
    if not judged.neighbours >= KEPT_NEIGHBOURS:
        lost.append(f"{NEIGHBOURS}-NN overlap {judged.neighbours:.3f} (at least {KEPT_NEIGHBOURS})")
    if judged.auc_loss is not None and not judged.auc_loss <= AUC_LOSS:
        lost.append(f"ROC-AUC {judged.auc_loss:.4f} lower (at most {AUC_LOSS})")
    return lost


def _tolerance(worst: float, precision: ComputePrecision) -> float:
    """What was seen, and as much again, rounded up to one digit; never below what is usual."""
    bound = max(_SLACK * worst, _LEAST.get(precision, Compute().tolerance))
    unit = 10.0 ** math.floor(math.log10(bound))
    return float(f"{math.ceil(round(bound / unit, 6)) * unit:.0e}")


def _rounded(value: float) -> float:
    """So many digits that noise stays out of the bundle's id."""
    return round(value, 4)
