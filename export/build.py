"""Building: from a log and a recipe to a sealed bundle, written whole or not at all."""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import save_file
from transformers import set_seed

from export.beside import LogPlace, OtherLog, read_other
from export.calibrate import calibrate
from export.card import model_card
from export.chapter_texts import text_sha256
from export.corpus import (
    Corpus,
    EventLog,
    TrainingChapter,
    cut_corpus,
    held_out_entities,
    known_before,
    learn_buckets,
    learnt_histories,
    read_log,
)
from export.enriched import EnrichedTexts, read_enriched
from export.finetune import Trained, mean_nats, train
from export.parity import measure_parity, random_chapters, refuse_disparity
from export.pooling import export_bundled, header_sums, resolve_pooling
from export.projection import learn_projection
from export.readers import Reader, open_reader
from export.recipe import Recipe
from export.snapshot import take_snapshot
from llm4es.bundle import (
    ARRAYS,
    CACHED_GRAPH,
    MANIFEST,
    SCHEMA,
    TOKENIZER,
    Bundle,
    Manifest,
    Pooling,
    load_bundle,
    seal_bundle,
)
from llm4es.bundle import Training as TrainingFacts
from llm4es.engine import default_threads
from llm4es.engine.reading import ChapterGraph, read_whole
from llm4es.errors import ConfigError
from llm4es.events import Event
from llm4es.features import SumsLayout
from llm4es.rendering import Renderer
from llm4es.schema import EventSchema, load_schema
from llm4es.surprise import SurpriseTracks

__all__ = ["Built", "Request", "build_bundle"]

MODEL = "model"  # the weights as transformers keeps them: for more training, and for parity
_PARITY_CHAPTERS = 6  # real ones, beside the random ones of several lengths
_VERSIONS = ("torch", "transformers", "optimum", "optimum-onnx", "onnxruntime", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to build a bundle from, and where."""

    events: Path
    schema: Path
    entity: str
    out: Path
    recipe: Recipe
    enriched: Path | None = None  # training chapters in other words, by `enrich`
    beside: tuple[LogPlace, ...] = ()  # other logs, learnt with the same tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A bundle that stands in its folder, and what it was made of."""

    bundle: Bundle
    log: EventLog
    corpus: Corpus
    trained: Trained
    parameters: int
    surprise_columns: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Material:
    """The log, who is held out of it, and what was learnt from the rest for its text."""

    schema: EventSchema
    log: EventLog
    held_out: frozenset[str]
    learnt_from: dict[str, tuple[Event, ...]]
    buckets: dict[str, NDArray[np.float64]]
    renderer: Renderer
    enriched: EnrichedTexts
    beside: tuple[OtherLog, ...]


def build_bundle(request: Request, console: Console) -> Built:
    """Read, cut, train, export, compare, calibrate and seal; progress goes to `console`.

    The folder appears by a rename, once all of it holds. Raises ConfigError for what the caller
    can mend, LLM4ESError where training diverges or the model does not survive the export.
    """
    started = time.monotonic()
    recipe = request.recipe
    _refuse_foreign_folder(request.out)
    set_seed(recipe.training.seed)
    torch.set_num_threads(default_threads())
    with console.status(f"reading {request.events.name}"):
        material = _read(request)
    workplace = _workplace(request, material)
    with _staged(workplace / "bundle", request.out) as folder:
        with console.status("training the tokenizer, cutting chapters"):
            reader = open_reader(
                recipe,
                material.renderer,
                list(material.learnt_from.values()),
                folder / TOKENIZER,
                more_lines=material.enriched.lines(),
                beside=material.beside,
            )
            corpus = replace(
                cut_corpus(material.log.histories, material.held_out, recipe.window, reader.tokens),
                beside=tuple(
                    other.corpus(reader.tokens, recipe.window) for other in material.beside
                ),
                enriched=material.enriched.ids(
                    reader.tokens, longest=recipe.window.max_chapter_tokens
                ),
            )
        console.print(_told(request, material, corpus))
        trained = train(
            reader.model,
            reader.tokens.header_ids,
            corpus,
            recipe.training,
            checkpoints=workplace / "checkpoints",
            runs=request.out.with_name(f"{request.out.name}-runs"),
            console=console,
        )
        pooling = resolve_pooling(recipe.pooling, reader.model)
        with console.status("exporting to ONNX, comparing with transformers"):
            surprise = recipe.surprise is not None
            graphs = export_bundled(folder, reader.model, pooling, surprise=surprise)
            parity = measure_parity(
                graphs, reader.model, pooling, _parity_chapters(reader, corpus, recipe)
            )
            graph = graphs[CACHED_GRAPH]
            del graphs  # the portable one's weights
            refuse_disparity(parity)
        with console.status("calibrating surprise on held-out entities"):
            loss = mean_nats(reader.model, reader.tokens.header_ids, corpus.held_out)
            arrays = material.buckets | _calibrated(reader, graph, corpus, request, material)
            if pooling.pool_header:
                arrays |= header_sums(graph, reader.tokens.header_ids)
        manifest = _manifest(request, material, reader, pooling, trained, loss, parity)
        manifest = _write(folder, request, reader, manifest, arrays)
        if recipe.projection is not None:
            with console.status("learning the projection"):
                manifest = _project(folder, request, material, manifest, arrays)
        with console.status("noting what is served of held-out entities"):
            manifest = _note_served(folder, request, material, manifest)
        _describe(folder, request, trained, manifest, reader.tokens.renderer.header)
        load_bundle(folder)  # what is put into place is what a worker accepts
    shutil.rmtree(workplace)
    bundle = load_bundle(request.out)
    return Built(
        bundle=bundle,
        log=material.log,
        corpus=corpus,
        trained=trained,
        parameters=sum(each.numel() for each in reader.model.parameters()),
        surprise_columns=SumsLayout(bundle).columns,
        seconds=time.monotonic() - started,
    )


def _read(request: Request) -> _Material:
    schema = load_schema(request.schema)
    training = request.recipe.training
    log = known_before(read_log(request.events, schema, entity=request.entity), training.before)
    held_out = held_out_entities(log.histories, training.held_out_share)
    learnt_from = learnt_histories(log.histories, held_out)
    buckets = learn_buckets(schema, learnt_from.values())
    renderer = Renderer(schema, request.recipe.rendering, buckets)
    enriched = EnrichedTexts()
    if request.enriched is not None:
        enriched = read_enriched(
            request.enriched,
            rendering=text_sha256(schema, renderer),
            held_out=held_out,
            before=training.before,
        )
    return _Material(
        schema=schema,
        log=log,
        held_out=held_out,
        learnt_from=learnt_from,
        buckets=buckets,
        renderer=renderer,
        enriched=enriched,
        beside=tuple(read_other(place, request.recipe) for place in request.beside),
    )


def _workplace(request: Request, material: _Material) -> Path:
    """Where this run, and no other, keeps what a kill would cost; gone with its end."""
    text = text_sha256(material.schema, material.renderer)
    told = request.recipe.model_dump_json() + _data_sha256(material) + text
    digest = hashlib.sha256(f"{request.entity}:{told}".encode()).hexdigest()[:12]
    return request.out.parent / f".{request.out.name}-training-{digest}"


def _data_sha256(material: _Material) -> str:
    """Hash all that is learnt from: the log, its chapters in other words, and other logs."""
    more = material.enriched.sha256 + "".join(other.sha256 for other in material.beside)
    if not more:
        return material.log.sha256
    return hashlib.sha256((material.log.sha256 + more).encode()).hexdigest()


def _told(request: Request, material: _Material, corpus: Corpus) -> str:
    chapters = len(corpus.train) + len(corpus.held_out)
    others = sum(len(other.chapters) for other in corpus.beside)
    besides = f"; {others:,} chapters of other logs besides" if others else ""
    return (
        f"{material.log.events:,} events of {len(material.log.histories):,} {request.entity}s "
        f"({len(material.held_out):,} held out), {chapters:,} chapters of "
        f"{corpus.mean_tokens:,.0f} tokens on average, at most "
        f"{request.recipe.window.max_chapter_tokens:,}{besides}"
    )


def _parity_chapters(reader: Reader, corpus: Corpus, recipe: Recipe) -> list[NDArray[np.int64]]:
    """Ids of random chapters from one token to the most there may be, and of some real ones."""
    header = reader.tokens.header_ids
    real = (corpus.held_out or corpus.train)[:_PARITY_CHAPTERS]
    return [
        *random_chapters(
            header,
            vocabulary=int(reader.model.config.vocab_size),
            max_tokens=recipe.window.max_chapter_tokens,
        ),
        *(np.concatenate([header, chapter.tokens.ids]) for chapter in real),
    ]


def _calibrated(
    reader: Reader, graph: ChapterGraph, corpus: Corpus, request: Request, material: _Material
) -> dict[str, NDArray[np.float64]]:
    """What surprise is usual, by the very graph that serves."""
    spec = request.recipe.surprise
    if spec is None:
        return {}
    header = reader.tokens.header_ids

    def read_nats(chapter: TrainingChapter) -> NDArray[np.float32]:
        ids = np.concatenate([header, chapter.tokens.ids])
        _, nats = read_whole(graph, ids, np.zeros((1, len(ids)), dtype=np.float32))
        if nats is None:
            msg = "the graph was exported without surprise"
            raise ValueError(msg)
        return nats[len(header) :]

    tracks = SurpriseTracks(material.schema, material.renderer)
    return calibrate(corpus.held_out or corpus.train, tracks, spec, read_nats)


def _manifest(  # noqa: PLR0917 - each is a part of what a bundle says of itself
    request: Request,
    material: _Material,
    reader: Reader,
    pooling: Pooling,
    trained: Trained,
    held_out_loss: float | None,
    parity: dict[str, float],
) -> Manifest:
    recipe = request.recipe
    hidden_size = int(reader.model.config.hidden_size)
    return Manifest(
        entity=request.entity,
        schema_sha256=material.schema.sha256,
        rendering=recipe.rendering,
        rendering_sha256=material.renderer.sha256,
        window=recipe.window,
        base_model=reader.name,
        licence=reader.licence,
        training=TrainingFacts(
            data_sha256=_data_sha256(material),
            steps=trained.steps,
            epochs=round(trained.epochs, 3),
            train_loss=round(trained.train_loss, 6),
            held_out_loss=None if held_out_loss is None else round(held_out_loss, 6),
        ),
        pooling=pooling,
        surprise=recipe.surprise,
        why=recipe.why,
        hidden_size=hidden_size,
        dim=pooling.state_dim(hidden_size) * len(pooling.scales),
        bos_id=reader.bos_id,
        parity=parity,
    )


def _write(
    folder: Path,
    request: Request,
    reader: Reader,
    manifest: Manifest,
    arrays: dict[str, NDArray[np.float64]],
) -> Manifest:
    """Write everything beside graph and tokenizer, and seal it."""
    shutil.copyfile(request.schema, folder / SCHEMA)
    save_file(arrays, folder / ARRAYS)
    reader.model.save_pretrained(folder / MODEL)
    reader.tokenizer.save_pretrained(folder / MODEL)
    return seal_bundle(folder, manifest)


def _project(
    folder: Path,
    request: Request,
    material: _Material,
    manifest: Manifest,
    arrays: dict[str, NDArray[np.float64]],
) -> Manifest:
    """Learn the projection through the sealed bundle, and seal it anew with it."""
    spec = request.recipe.projection
    if spec is None:
        return manifest
    found = learn_projection(
        load_bundle(folder), material.learnt_from, spec, seed=request.recipe.training.seed
    )
    save_file(arrays | found, folder / ARRAYS)
    return seal_bundle(folder, manifest.model_copy(update={"projected": True, "dim": spec.dim}))


def _note_served(
    folder: Path, request: Request, material: _Material, manifest: Manifest
) -> Manifest:
    """Keep what the sealed bundle gives held-out entities, and seal it anew with that."""
    histories = material.log.histories
    held_out = {each: histories[each] for each in material.held_out} or histories
    bundle = load_bundle(folder)
    found = take_snapshot(bundle, held_out, seed=request.recipe.training.seed)
    save_file({**bundle.arrays, **found}, folder / ARRAYS)
    return seal_bundle(folder, manifest)


def _describe(
    folder: Path, request: Request, trained: Trained, manifest: Manifest, header: str
) -> None:
    """Write what the id does not cover: provenance and model card."""
    provenance = {
        "bundle": manifest.id,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "events": request.events.name,
        "recipe": request.recipe.model_dump(mode="json"),
        "curve": [asdict(look) for look in trained.curve],
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": default_threads(),
        "versions": {name: metadata.version(name) for name in _VERSIONS},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(manifest, header), encoding="utf-8")
    for path in folder.rglob("*"):
        # safetensors and onnx write for their owner alone; a worker runs as somebody else.
        path.chmod(0o755 if path.is_dir() else 0o644)


def _refuse_foreign_folder(out: Path) -> None:
    """Replace a bundle or an empty folder, and nothing else."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise ConfigError(
            "out", f"{out} is there and is no bundle", "name another folder, or remove this one"
        )


@contextmanager
def _staged(folder: Path, out: Path) -> Iterator[Path]:
    """Give an empty folder, and put it in the place of `out` when the block ends well."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    replaced = folder.with_name("replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    folder.rename(out)
