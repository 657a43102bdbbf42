"""Building: from a log and a recipe to a sealed bundle, written whole or not at all."""

import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import save_file
from transformers import PreTrainedModel, set_seed

from export.calibrate import calibrate
from export.card import model_card
from export.corpus import (
    Corpus,
    EventLog,
    TrainingChapter,
    cut_corpus,
    held_out_entities,
    learn_buckets,
    read_log,
)
from export.finetune import Trained, mean_nats, train
from export.graphs import export_graph
from export.parity import measure_parity, random_chapters, refuse_disparity
from export.readers import Reader, open_reader
from export.recipe import Recipe
from llm4es.bundle import (
    ARRAYS,
    FULL_GRAPH,
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
from llm4es.engine.embedder import default_threads
from llm4es.engine.session import FullGraph
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
    """What to build a bundle from, and where.

    `model` is a hub id, a folder or a .gguf file; without it a model is trained from scratch.
    """

    events: Path
    schema: Path
    entity: str
    out: Path
    recipe: Recipe
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A bundle that stands in its folder, and what it was made of."""

    bundle: Bundle
    log: EventLog
    corpus: Corpus
    parameters: int
    surprise_columns: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Material:
    """The log, who is held out of it, and what was learnt from the rest for its text."""

    schema: EventSchema
    log: EventLog
    held_out: frozenset[str]
    buckets: dict[str, NDArray[np.float64]]
    renderer: Renderer


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
    with _staged(request.out) as folder:
        with console.status("training the tokenizer, cutting chapters"):
            reader = open_reader(
                request.model,
                recipe,
                material.renderer,
                list(_learnt_from(material.log, material.held_out)),
                folder / TOKENIZER,
            )
            corpus = cut_corpus(material.log, material.held_out, recipe.window, reader.tokens)
        console.print(_told(request, material, corpus))
        trained = train(
            reader.model, reader.tokens.header_ids, corpus.train, recipe.training, console
        )
        pooling = _pooling(recipe, reader.model)
        with console.status("exporting to ONNX, comparing with transformers"):
            graph = _export(folder, reader, pooling, surprise=recipe.surprise is not None)
            parity = measure_parity(
                graph, reader.model, pooling, _parity_chapters(reader, corpus, recipe)
            )
            refuse_disparity(parity)
        with console.status("calibrating surprise on held-out entities"):
            loss = mean_nats(reader.model, reader.tokens.header_ids, corpus.held_out)
            arrays = material.buckets | _calibrated(reader, graph, corpus, request, material)
        manifest = _manifest(request, material, reader, pooling, trained, loss, parity)
        _write(folder, request, reader, manifest, arrays)
        load_bundle(folder)  # what is put into place is what a worker accepts
    bundle = load_bundle(request.out)
    return Built(
        bundle=bundle,
        log=material.log,
        corpus=corpus,
        parameters=sum(each.numel() for each in reader.model.parameters()),
        surprise_columns=SumsLayout(bundle).columns,
        seconds=time.monotonic() - started,
    )


def _read(request: Request) -> _Material:
    schema = load_schema(request.schema)
    log = read_log(request.events, schema, entity=request.entity)
    held_out = held_out_entities(log.histories, request.recipe.training.held_out_share)
    buckets = learn_buckets(schema, _learnt_from(log, held_out))
    renderer = Renderer(schema, request.recipe.rendering, buckets)
    return _Material(schema=schema, log=log, held_out=held_out, buckets=buckets, renderer=renderer)


def _learnt_from(log: EventLog, held_out: frozenset[str]) -> Iterator[tuple[Event, ...]]:
    return (history for entity_id, history in log.histories.items() if entity_id not in held_out)


def _told(request: Request, material: _Material, corpus: Corpus) -> str:
    chapters = len(corpus.train) + len(corpus.held_out)
    return (
        f"{material.log.events:,} events of {len(material.log.histories):,} {request.entity}s "
        f"({len(material.held_out):,} held out), {chapters:,} chapters of "
        f"{corpus.mean_tokens:,.0f} tokens on average, at most "
        f"{request.recipe.window.max_chapter_tokens:,}"
    )


def _pooling(recipe: Recipe, model: PreTrainedModel) -> Pooling:
    """Name layers from the front: a manifest means the same whatever the model's depth."""
    states = int(model.config.num_hidden_layers) + 1
    if any(not -states <= layer < states for layer in recipe.layers):
        raise ConfigError(
            "layers", f"{recipe.layers} of {states} hidden states", "name states that there are"
        )
    return Pooling(
        layers=tuple(layer % states for layer in recipe.layers),
        combine=recipe.combine,
        scales=recipe.scales,
    )


def _export(folder: Path, reader: Reader, pooling: Pooling, *, surprise: bool) -> FullGraph:
    path = folder / FULL_GRAPH
    export_graph(reader.model, pooling, path.parent, surprise=surprise, name=path.name)
    return FullGraph(path, device="cpu", threads=default_threads())


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
    reader: Reader, graph: FullGraph, corpus: Corpus, request: Request, material: _Material
) -> dict[str, NDArray[np.float64]]:
    """What surprise is usual, by the very graph that serves."""
    spec = request.recipe.surprise
    if spec is None:
        return {}
    header = reader.tokens.header_ids

    def read_nats(chapter: TrainingChapter) -> NDArray[np.float32]:
        ids = np.concatenate([header, chapter.tokens.ids])[None]
        _, nats = graph.run(ids, np.zeros((1, 1, ids.shape[1]), dtype=np.float32))
        if nats is None:
            msg = "the graph was exported without surprise"
            raise ValueError(msg)
        return nats[0, len(header) :]

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
            data_sha256=material.log.sha256,
            steps=trained.steps,
            epochs=round(trained.epochs, 3),
            train_loss=round(trained.train_loss, 6),
            held_out_loss=None if held_out_loss is None else round(held_out_loss, 6),
        ),
        pooling=pooling,
        surprise=recipe.surprise,
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
) -> None:
    """Write everything beside graph and tokenizer, and seal it."""
    shutil.copyfile(request.schema, folder / SCHEMA)
    save_file(arrays, folder / ARRAYS)
    reader.model.save_pretrained(folder / MODEL)
    reader.tokenizer.save_pretrained(folder / MODEL)
    sealed = seal_bundle(folder, manifest)
    provenance = {
        "bundle": sealed.id,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "events": request.events.name,
        "seed": request.recipe.training.seed,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": default_threads(),
        "versions": {name: metadata.version(name) for name in _VERSIONS},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    card = model_card(sealed, reader.tokens.renderer.header)
    (folder / "README.md").write_text(card, encoding="utf-8")
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
def _staged(out: Path) -> Iterator[Path]:
    """Give a folder beside `out`, and put it in its place when the block ends well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        staged = Path(scratch) / "bundle"
        staged.mkdir()
        yield staged
        replaced = Path(scratch) / "replaced"
        if out.exists():
            out.rename(replaced)
        staged.rename(out)
