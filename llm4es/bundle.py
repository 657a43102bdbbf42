"""Bundles: everything that turns a window into a vector, as one folder with one id.

    manifest.json  graphs/*.onnx + graphs/weights.bin  tokenizer.json  schema.yaml
    arrays.safetensors   and, outside the id: provenance.json, README.md (model card), model/

The id is the first 12 hex digits of a SHA-256 over the sorted (name, file hash) pairs, the
manifest's own taken without the id. No clock, host or path is in it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file

from llm4es.errors import BundleMismatch
from llm4es.rendering import Renderer, RenderingSpec
from llm4es.schema import EventSchema, FrozenModel, first_problem, load_schema
from llm4es.tokens import ChapterTokenizer, load_tokenizer
from llm4es.windows import WindowPolicy

__all__ = [
    "FORMAT",
    "Bundle",
    "CachePrecision",
    "Compute",
    "ComputePrecision",
    "Judged",
    "Manifest",
    "Pooling",
    "SurpriseSpec",
    "Training",
    "hash_files",
    "load_bundle",
    "scale_name",
    "seal_bundle",
]

FORMAT = 2
MANIFEST = "manifest.json"
CACHED_GRAPH = "graphs/cached.onnx"
PORTABLE_GRAPH = "graphs/portable.onnx"
WEIGHTS = "graphs/weights.bin"
TOKENIZER = "tokenizer.json"
SCHEMA = "schema.yaml"
ARRAYS = "arrays.safetensors"
ComputePrecision = Literal["fp32", "fp16", "bf16", "int8", "int8-weights", "int4-weights"]
CachePrecision = Literal["fp32", "fp16", "int8"]
_ID_DIGITS = 12
_BLOCK = 1 << 20
_REMEDY = "export the bundle again, or copy it whole"


class Pooling(FrozenModel):
    """How a token's hidden states become the vector.

    `layers` index the hidden states: 0 is the token embedding, the last is post-norm. `scales`
    are half-lives in events; infinity, written "inf", is the paper's plain mean. `tokens` are
    pooled: all of an event's, or its last alone ("ends"; a scale of 0.01 leaves the newest
    event's last token). `pool_header` counts the header's tokens once, at the scale infinity, as
    the paper does.
    """

    layers: tuple[int, ...] = Field(min_length=1)
    combine: Literal["average", "side_by_side"] = "side_by_side"
    normalise: Literal["none", "rms"] = "rms"
    scales: tuple[float, ...] = Field(min_length=1)
    tokens: Literal["all", "ends"] = "all"
    pool_header: bool = False

    @model_validator(mode="after")
    def _header_has_a_place(self) -> Self:
        if self.pool_header and not any(np.isinf(self.scales)):
            msg = "pool_header counts at the scale inf: name it among the scales"
            raise ValueError(msg)
        return self

    @field_validator("scales")
    @classmethod
    def _half_lives(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if any(not scale > 0 for scale in scales) or len(set(scales)) != len(scales):
            msg = "scales are distinct half-lives above 0, in events"
            raise ValueError(msg)
        return scales

    @field_serializer("scales", when_used="json")
    def _spell_infinity(self, scales: tuple[float, ...]) -> list[float | str]:
        return ["inf" if np.isinf(scale) else scale for scale in scales]

    def state_dim(self, hidden_size: int) -> int:
        """Width of one pooled vector per scale."""
        return hidden_size * (len(self.layers) if self.combine == "side_by_side" else 1)


class SurpriseSpec(FrozenModel):
    """Surprise by depth: means (cells, depth_cap + 1) and percentiles (cells,) are arrays."""

    depth_cap: int = Field(default=16, ge=0)


class Training(FrozenModel):
    """What the model was trained on, and how well it predicts held-out entities."""

    data_sha256: str
    steps: int
    epochs: float
    train_loss: float | None
    held_out_loss: float | None  # nats per token


class Judged(FrozenModel):
    """How a bundle of less precision compares with the fp32 bundle that it was made from.

    Cosines are of vectors less their mean over entities, by their standard deviation over them;
    `neighbours` is the share of the 5 nearest entities that stay; `auc_loss` is what an embedding
    of fp32 is better by on labels, where there were some. `forced` says that it was let through
    although it lost too much.
    """

    origin: str  # the fp32 bundle's id
    entities: int
    cosine: float
    neighbours: float
    surprise_cosine: float | None = None
    auc_loss: float | None = None
    forced: bool = False


class Compute(FrozenModel):
    """What the vectors are computed in; another precision is another bundle.

    fp16 and bf16: matrix products of the model's layers, sums in fp32. int8: those of bytes, with
    a scale for each token and each column. int8-weights and int4-weights: weights alone, with a
    scale for each 32 of them. The cache is of keys and values.
    """

    precision: ComputePrecision = "fp32"
    cache: CachePrecision = "fp32"
    tolerance: float = 1e-5  # relative, of vectors and surprise
    judged: Judged | None = Field(default=None, exclude_if=lambda judged: judged is None)


class Manifest(FrozenModel):
    """What a bundle says of itself. `id` is empty while it is being hashed."""

    id: str = ""
    format: int = FORMAT
    entity: str
    schema_sha256: str
    rendering: RenderingSpec
    rendering_sha256: str
    window: WindowPolicy
    base_model: str
    licence: str
    training: Training
    pooling: Pooling
    surprise: SurpriseSpec | None
    why: str | None = Field(default=None, exclude_if=lambda why: why is None)  # these choices
    projected: bool = False  # arrays projection.mean (n,) and projection.matrix (n, dim)
    hidden_size: int
    dim: int
    bos_id: int | None
    compute: Compute = Compute()
    parity: Mapping[str, float] = Field(default_factory=dict)
    files: Mapping[str, str] = Field(default_factory=dict)  # name -> SHA-256


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle, loaded but for its graphs."""

    folder: Path
    manifest: Manifest
    schema: EventSchema
    arrays: Mapping[str, NDArray[np.float64]]
    tokens: ChapterTokenizer

    @property
    def id(self) -> str:
        """The bundle's id: 12 hex digits."""
        return self.manifest.id

    @property
    def renderer(self) -> Renderer:
        """What makes the text of this bundle's chapters."""
        return self.tokens.renderer

    @property
    def cached_graph(self) -> Path:
        """The graph that keeps keys and values in place, for onnxruntime."""
        return self.folder / CACHED_GRAPH

    @property
    def portable_graph(self) -> Path:
        """The graph in plain operators, for whatever runs no other."""
        return self.folder / PORTABLE_GRAPH


def scale_name(scale: float) -> str:
    """Name a half-life in a column: h16, hinf."""
    return f"h{scale:g}"


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that the id covers, the manifest apart, by its name in the folder."""
    names = [TOKENIZER, SCHEMA, ARRAYS]
    names += [path.relative_to(folder).as_posix() for path in sorted((folder / "graphs").iterdir())]
    return {name: _hash_file(folder / name) for name in sorted(names)}


def seal_bundle(folder: Path, manifest: Manifest) -> Manifest:
    """Hash a finished folder, give it its id, and write its manifest."""
    bare = manifest.model_copy(update={"id": "", "files": hash_files(folder)})
    sealed = bare.model_copy(update={"id": _identify(bare)})
    text = json.dumps(sealed.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return sealed


def load_bundle(folder: Path) -> Bundle:
    """Load a bundle and verify every byte that its id covers.

    Raises BundleMismatch naming what differs, and ConfigError for a schema that cannot be read.
    """
    manifest = _read_manifest(folder)
    try:
        found = hash_files(folder)
    except OSError as error:
        raise BundleMismatch(f"bundle {folder}", f"is not whole ({error})", _REMEDY) from error
    for name in sorted({*found, *manifest.files}):
        if found.get(name) != manifest.files.get(name):
            raise BundleMismatch(
                f"bundle {folder}", f"{name} is not the file the manifest names", _REMEDY
            )
    if manifest.id != _identify(manifest.model_copy(update={"id": ""})):
        raise BundleMismatch(f"bundle {folder}", "its manifest was changed", _REMEDY)
    schema = load_schema(folder / SCHEMA)
    try:
        arrays = {
            name: array.astype(np.float64) for name, array in load_file(folder / ARRAYS).items()
        }
    except (OSError, SafetensorError) as error:
        raise BundleMismatch(f"bundle {folder}", f"{ARRAYS}: {error}", _REMEDY) from error
    renderer = Renderer(schema, manifest.rendering, arrays)
    for what, said, is_ in (
        ("schema", manifest.schema_sha256, schema.sha256),
        ("rendering", manifest.rendering_sha256, renderer.sha256),
    ):
        if said != is_:
            raise BundleMismatch(
                f"bundle {folder}", f"its {what} is not the one it was trained with", _REMEDY
            )
    schema.entity(manifest.entity)
    return Bundle(
        folder=folder,
        manifest=manifest,
        schema=schema,
        arrays=arrays,
        tokens=ChapterTokenizer(renderer, load_tokenizer(folder / TOKENIZER), manifest.bos_id),
    )


def _read_manifest(folder: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise BundleMismatch(
            f"bundle {folder}",
            f"has no {MANIFEST} ({error.strerror})",
            "make one: python -m export quickstart",
        ) from error
    except ValidationError as error:
        field, problem = first_problem(error)
        raise BundleMismatch(
            f"bundle {folder}", f"{MANIFEST}: {field}: {problem}", _REMEDY
        ) from error
    if manifest.format != FORMAT:
        raise BundleMismatch(
            f"bundle {folder}", f"has format {manifest.format}, this code reads {FORMAT}", _REMEDY
        )
    return manifest


def _identify(manifest: Manifest) -> str:
    document = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    pairs = {**manifest.files, MANIFEST: hashlib.sha256(document.encode()).hexdigest()}
    joined = "".join(f"{name}\0{digest}\n" for name, digest in sorted(pairs.items()))
    return hashlib.sha256(joined.encode()).hexdigest()[:_ID_DIGITS]


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
