"""Peers: what else reads whole windows into vectors, on the same model and token ids.

    python -m benchmarks.peers [--json] [--model PATH]

Each peer gives the mean of the last hidden state over its tokens, in fp32 on one thread. It may
read windows one by one or padded in one batch, and counts with what is faster for it; ragged ones
it reads one by one, for padded to the longest it would give a third. A peer that is not installed
is left out, and named. infinity-emb has no place here: it wants numpy before 2, as a service it
would count in another process, and what it runs for such a model is transformers or onnxruntime.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from transformers import AutoModel

from benchmarks.engine_bundles import SMOL, bundle_of
from benchmarks.machine import machine
from benchmarks.timing import interleaved

__all__ = ["LENGTHS", "open_peers", "rates"]

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = {"8x256": (256,) * 8, "ragged": (40, 80, 120, 180, 256, 360, 512, 900)}
_BATCHED = "8x256"  # where nothing is padded
ROUNDS = 3

Peer = Callable[[Sequence[NDArray[np.int64]]], object]


def open_peers(model: Path) -> tuple[dict[str, Peer], list[str]]:
    """Peers that are installed, by name, and the names of those that are not."""
    torch.set_num_threads(1)
    peers: dict[str, Peer] = {
        "hf eager": _transformers(model, "eager"),
        "hf sdpa": _transformers(model, "sdpa"),
    }
    missing = []
    for name, package, opened in (
        ("openvino", "openvino", _openvino),
        ("sentence-transformers onnx", "sentence_transformers", _sentence_transformers),
    ):
        if find_spec(package) is None:
            missing.append(name)
        else:
            peers[name] = opened(model)
    return peers, missing


def rates(peers: dict[str, Peer], vocabulary: int, rounds: int) -> dict[str, dict[str, float]]:
    """Useful tokens per CPU second, by the mix of lengths and by peer; all take turns."""
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, float]] = {}
    for mix, lengths in LENGTHS.items():
        windows = [rng.integers(1, vocabulary, length) for length in lengths]
        calls = {(name, False): _one_by_one(peer, windows) for name, peer in peers.items()}
        if mix == _BATCHED:
            calls |= {(name, True): _batched(peer, windows) for name, peer in peers.items()}
        times = interleaved(calls, rounds)
        found[mix] = {
            name: sum(lengths)
            / min(times[name, way] for way in (False, True) if (name, way) in times)
            for name in peers
        }
    return found


def _one_by_one(peer: Peer, windows: Sequence[NDArray[np.int64]]) -> Callable[[], object]:
    return lambda: [peer([ids]) for ids in windows]


def _batched(peer: Peer, windows: Sequence[NDArray[np.int64]]) -> Callable[[], object]:
    return lambda: peer(windows)


def _padded(windows: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    longest = max(len(ids) for ids in windows)
    ids = np.stack([np.pad(each, (0, longest - len(each))) for each in windows])
    mask = np.stack([np.arange(longest) < len(each) for each in windows]).astype(np.int64)
    return ids, mask


def _transformers(folder: Path, attention: str) -> Peer:
    model: Any = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()

    def read(windows: Sequence[NDArray[np.int64]]) -> object:
        ids, mask = (torch.from_numpy(each) for each in _padded(windows))
        with torch.inference_mode():
            states = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    return read


def _openvino(folder: Path) -> Peer:
    """OpenVINO on optimum's export of the same module, fp32, one thread.

    Its own conversion traces the module, and fails where transformers builds its mask.
    """
    import openvino as ov  # noqa: PLC0415 - an optional peer
    from optimum.exporters.onnx import main_export  # noqa: PLC0415 - heavy

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    with tempfile.TemporaryDirectory() as out:
        main_export(str(folder), out, task="feature-extraction", do_validation=False)
        model = ov.Core().read_model(str(Path(out) / "model.onnx"))
        compiled = ov.Core().compile_model(model, "CPU", settings)
    names = {each.any_name for each in compiled.inputs}

    def read(windows: Sequence[NDArray[np.int64]]) -> object:
        ids, mask = _padded(windows)
        places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        states = compiled({name: inputs[name] for name in names})[0]
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)

    return read


def _sentence_transformers(folder: Path) -> Peer:
    """Sentence-transformers with its ONNX backend, which exports the folder by itself."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - optional
    from sentence_transformers.sentence_transformer.modules import (  # noqa: PLC0415
        Pooling,
        Transformer,
    )

    options: Any = {"provider": "CPUExecutionProvider", "export": True}
    reader = Transformer(str(folder), backend="onnx", model_kwargs=options)
    pooling = Pooling(reader.get_embedding_dimension(), "mean")
    model: Any = SentenceTransformer(modules=[reader, pooling], device="cpu")

    def read(windows: Sequence[NDArray[np.int64]]) -> object:
        ids, mask = (torch.from_numpy(each) for each in _padded(windows))
        # Left out, as it leaves them, optimum refuses a decoder's graph.
        places = torch.arange(ids.shape[1]).expand(ids.shape)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        with torch.inference_mode():
            return model(inputs)["sentence_embedding"]

    return read


def main(
    *,
    out: Annotated[Path, typer.Option(help="Folder for bundles")] = ROOT / "build/engine",
    model: Annotated[str | None, typer.Option(help="SmolLM2-135M: folder or .gguf")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Measure every peer that is installed."""
    bundle = bundle_of(SMOL, out, surprise=False, model=model)
    peers, missing = open_peers(bundle.folder / "model")
    found = rates(peers, vocabulary=40_000, rounds=ROUNDS)
    if as_json:
        typer.echo(json.dumps({"tokens_per_s": found, "missing": missing, "machine": machine()}))
        return
    console = Console()
    for mix, by_peer in found.items():
        for name, rate in by_peer.items():
            console.print(f"{mix:8} {name:28} {rate:8,.0f} tokens/s")
    console.print(f"not installed: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    typer.run(main)
