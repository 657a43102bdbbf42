"""Pooling: from a recipe's choice to a graph, and to another bundle of the same weights."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from export.graphs import export_graphs
from export.parity import measure_parity, random_chapters, refuse_disparity
from export.recipe import Pooled
from llm4es.bundle import (
    ARRAYS,
    CACHED_GRAPH,
    SCHEMA,
    TOKENIZER,
    Bundle,
    Pooling,
    load_bundle,
    seal_bundle,
)
from llm4es.engine import default_threads
from llm4es.engine.reading import ChapterGraph, read_whole
from llm4es.engine.session import OnnxGraph, open_cpu_graphs
from llm4es.errors import ConfigError
from llm4es.features import HEADER_STATES, HEADER_TOKENS

__all__ = ["export_bundled", "header_sums", "repool", "resolve_pooling"]

_MODEL = "model"


def resolve_pooling(pooled: Pooled, model: PreTrainedModel) -> Pooling:
    """Name layers from the front: a manifest means the same whatever the model's depth.

    Raises ConfigError for layers that the model does not have.
    """
    states = int(model.config.num_hidden_layers) + 1
    layers = tuple(range(states)) if pooled.layers == "all" else pooled.layers
    if any(not -states <= layer < states for layer in layers):
        raise ConfigError(
            "pooling.layers", f"{layers} of {states} hidden states", "name states that there are"
        )
    return Pooling(
        layers=tuple(layer % states for layer in layers),
        combine=pooled.combine,
        normalise=pooled.normalise,
        scales=pooled.scales,
        tokens=pooled.tokens,
        pool_header=pooled.pool_header,
    )


def export_bundled(
    folder: Path, model: PreTrainedModel, pooling: Pooling, *, surprise: bool
) -> dict[str, OnnxGraph]:
    """Write every graph into a bundle's folder, and open them on the CPU, by name."""
    export_graphs(model, pooling, folder, surprise=surprise)
    return open_cpu_graphs(folder, threads=default_threads())


def header_sums(graph: ChapterGraph, header: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """What the header's own states add to the plain mean."""
    pooled, _ = read_whole(graph, header, np.ones((1, len(header)), dtype=np.float32))
    return {
        HEADER_STATES: pooled[0].astype(np.float64),
        HEADER_TOKENS: np.array([len(header)], dtype=np.float64),
    }


def repool(source: Path, pooled: Pooled, out: Path) -> Bundle:
    """Export a bundle's weights with another pooling: another bundle, at `out`, no training.

    A projection and the snapshot for drift are left out: they are of other vectors. Raises
    ConfigError for a folder that is there, BundleMismatch for a source that is no bundle.
    """
    if out.exists():
        raise ConfigError("out", f"{out} is there", "name another folder")
    bundle = load_bundle(source)
    manifest = bundle.manifest
    model = AutoModelForCausalLM.from_pretrained(source / _MODEL, dtype=torch.float32).eval()
    pooling = resolve_pooling(pooled, model)
    for name in (TOKENIZER, SCHEMA):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, out / name)
    shutil.copytree(source / _MODEL, out / _MODEL)
    graphs = export_bundled(out, model, pooling, surprise=manifest.surprise is not None)
    header = bundle.tokens.header_ids
    chapters = random_chapters(
        header,
        vocabulary=int(model.config.vocab_size),
        max_tokens=manifest.window.max_chapter_tokens,
    )
    parity = measure_parity(graphs, model, pooling, chapters)
    refuse_disparity(parity)
    arrays = {
        name: array
        for name, array in bundle.arrays.items()
        if not name.startswith(("projection.", "header.", "snapshot."))
    }
    if pooling.pool_header:
        arrays |= header_sums(graphs[CACHED_GRAPH], header)
    save_file(arrays, out / ARRAYS)
    sealed = seal_bundle(
        out,
        manifest.model_copy(
            update={
                "pooling": pooling,
                "projected": False,
                "dim": pooling.state_dim(manifest.hidden_size) * len(pooling.scales),
                "parity": parity,
            }
        ),
    )
    provenance = {
        "bundle": sealed.id,
        "pooled_anew_from": manifest.id,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    return load_bundle(out)
