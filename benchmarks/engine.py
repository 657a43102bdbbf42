"""The engine: whole chapters against peers, one more event against reading anew, and a stream.

    python -m benchmarks.engine [--json] [--model PATH] [--only full|increment|domain|stream|worker]

One thread. Seconds are CPU seconds of this process, so that whoever shares the machine distorts
little; baselines are measured in turn with what is compared, and medians are taken. Vectors and
surprise of the stream are checked against full recompute on every event.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoModel

from benchmarks.engine_bundles import DOMAIN, SMOL, bundle_of
from benchmarks.engine_stream import Streamed, stream, worker_seconds
from benchmarks.machine import machine
from benchmarks.peers import LENGTHS, open_peers, rates
from benchmarks.timing import interleaved, seconds
from llm4es.bundle import Bundle
from llm4es.engine.opening import open_graph
from llm4es.engine.reading import ChapterGraph, Reading

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
OURS, OTHER = "llm4es", "llm4es, by OpenVINO"
INCREMENT = 32  # tokens of one event
FEWEST_WORDS = 600  # ids that every vocabulary here has
TOGETHER = 64
STREAMED = {SMOL: 400, DOMAIN: 1200}  # events
WITH_SURPRISE = {SMOL: 100, DOMAIN: 1200}  # the first of those, with surprise and without
HISTORY_TOKENS, DOMAIN_HISTORY_TOKENS = 2000, 200
NAIVE_ROUNDS = 3
ROUNDS = 5
TURNS = 3  # of streams that are compared
WORKER_EVENTS = 1920
_GEMM = ((256, 576, 1536), (512, 1536, 576), (1024, 1024, 1024))
_PARTS = ("full", "increment", "domain", "stream", "worker")

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Places:
    """Where bundles are, and where SmolLM2 comes from."""

    out: Path
    model: str | None

    def bundle(self, name: str, *, surprise: bool) -> Bundle:
        """Build or load one."""
        return bundle_of(name, self.out, surprise=surprise, model=self.model)


def main(
    *,
    out: Annotated[Path, typer.Option(help="Folder for bundles")] = ROOT / "build/engine",
    model: Annotated[str | None, typer.Option(help="SmolLM2-135M: folder or .gguf")] = None,
    only: Annotated[str | None, typer.Option(help=" or ".join(_PARTS))] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Measure, and print ratios."""
    torch.set_num_threads(1)
    places = Places(out, model)
    figures: dict[str, float] = {}
    ratios: dict[str, float] = {}
    measured: dict[str, Callable[[], dict[str, float]]] = {
        "full": lambda: full(places, figures),
        "increment": lambda: increments(places, figures),
        "domain": lambda: together(places, figures),
        "stream": lambda: streams(places, figures),
        "worker": lambda: worker(places, figures),
    }
    for name, part in measured.items():
        if only in {None, name}:
            console.log(name)
            ratios |= part()
    if as_json:
        typer.echo(json.dumps({"ratios": ratios, "figures": figures, "machine": machine()}))
        return
    for title, values in (("engine", ratios), ("behind them", figures)):
        table = Table(title=title)
        table.add_column("figure")
        table.add_column("value", justify="right")
        for name, value in values.items():
            table.add_row(name, f"{value:,.3f}")
        Console().print(table)


def full(places: Places, figures: dict[str, float]) -> dict[str, float]:
    """Whole chapters of SmolLM2-135M, pooled, without surprise: no peer gives that.

    Ours is the provider that `auto` picks; the other one is shown, and is nobody's peer.
    """
    bundle = places.bundle(SMOL, surprise=False)
    ours = {OURS: _windows_read(open_graph(bundle, device="auto", threads=1))}
    if find_spec("openvino") is not None:
        ours[OTHER] = _windows_read(open_graph(bundle, device="openvino", threads=1))
    peers, missing = open_peers(bundle.folder / "model")
    for name in missing:
        console.log(f"not installed, left out: {name}")
    peak = _gemm_peak()
    found = rates({**ours, **peers}, vocabulary=40_000, rounds=3)
    peak = max(peak, _gemm_peak())
    for mix, by_name in found.items():
        figures |= {f"tokens/s, {mix}, {name}": rate for name, rate in by_name.items()}
    lengths = LENGTHS["8x256"]
    work = sum(_operations(bundle, length) for length in lengths)
    achieved = work / (sum(lengths) / found["8x256"][OURS])
    figures |= {"GEMM peak, GFLOP/s": peak / 1e9, "full, GFLOP/s": achieved / 1e9}
    return {
        "full_vs_best_peer": _least(found, list(peers)),
        "full_vs_hf_sdpa": _least(found, ["hf sdpa"]),
        "full_vs_gemm_peak": achieved / peak,
    }


def _least(found: Mapping[str, Mapping[str, float]], peers: Sequence[str]) -> float:
    """Ours over the fastest of some peers, in the mix where that is least."""
    return min(by[OURS] / max(by[name] for name in peers) for by in found.values())


def increments(places: Places, figures: dict[str, float]) -> dict[str, float]:
    """One more event of 32 tokens, against reading its window anew, header apart."""
    graph = open_graph(places.bundle(SMOL, surprise=False), device="cpu", threads=1)
    ratios = {}
    for past in (512, 1000):
        header = 32
        calls = {
            "full": _reader(graph, header, past + INCREMENT),
            "increment": _reader(graph, header + past, INCREMENT),
        }
        times = interleaved(calls, ROUNDS)
        figures |= {f"ms, {name} at {past}": spent * 1000 for name, spent in times.items()}
        ratios[f"increment_{past}"] = times["full"] / times["increment"]
    return ratios


def together(places: Places, figures: dict[str, float]) -> dict[str, float]:
    """64 customers' next events in one call, against one by one: domain model, whole engine."""
    bundle = places.bundle(DOMAIN, surprise=True)
    times: dict[int, list[float]] = {1: [], TOGETHER: []}
    for _ in range(TURNS):
        for batch, spent in times.items():
            found = stream(
                bundle,
                events=10 * TOGETHER,
                customers=TOGETHER,
                batch=batch,
                history_tokens=DOMAIN_HISTORY_TOKENS,
                trouble=False,
            )
            spent.extend(found.seconds)
    alone, batched = median(times[1]), median(times[TOGETHER])
    figures |= {"ms, one event alone": alone * 1000, "ms, one of 64": batched * 1000}
    return {"batched_over_alone": batched / alone}


def streams(places: Places, figures: dict[str, float]) -> dict[str, float]:
    """Card payments one by one, some late, some after an eviction, and all of them checked."""
    found: dict[tuple[str, bool], Streamed] = {}
    naive: list[float] = []
    for name in (SMOL, DOMAIN):
        for surprise in (True, False):
            found[name, surprise] = one = stream(
                places.bundle(name, surprise=surprise),
                events=(WITH_SURPRISE if surprise else STREAMED)[name],
                customers=4,
                history_tokens=HISTORY_TOKENS,
                check=True,
            )
            kind = "with" if surprise else "without"
            figures[f"ms, event, {name} {kind} surprise"] = median(one.seconds) * 1000
            figures[f"worst difference, {name} {kind} surprise"] = one.worst_difference
            if name == SMOL:
                naive += _naive_seconds(places.bundle(SMOL, surprise=False))
    smol = found[SMOL, False].seconds
    figures["ms, event, naive worker"] = median(naive) * 1000
    figures["ms, event, mean of the stream"] = mean(smol) * 1000
    return {
        "stream_vs_naive": median(naive) / mean(smol),
        "stream_p99_over_median": _p99(smol) / median(smol),
        "surprise_over_none": max(
            sum(found[name, True].seconds) / sum(found[name, False].seconds[: WITH_SURPRISE[name]])
            for name in (SMOL, DOMAIN)
        ),
        "stream_worst_difference": max(one.worst_difference for one in found.values()),
    }


def worker(places: Places, figures: dict[str, float]) -> dict[str, float]:
    """The whole worker path against the bare increment in onnxruntime, domain model."""
    bundle = places.bundle(DOMAIN, surprise=True)
    graph = open_graph(bundle, device="cpu", threads=1)
    folder, paths, bare = places.out / "worker", [], []
    for _ in range(TURNS):
        path = worker_seconds(
            bundle, folder, events=WORKER_EVENTS, customers=TOGETHER, batch=TOGETHER
        )
        paths.append(path.seconds)
        call = _reader(graph, path.tokens_before, path.tokens_per_event)
        bare.append(interleaved({"bare": call}, 50)["bare"])
    alone = worker_seconds(bundle, folder, events=300, customers=10, batch=1).seconds
    figures |= {
        "ms, event, whole worker": median(paths) * 1000,
        "ms, event, whole worker, each its own batch": alone * 1000,
        "ms, bare increment": median(bare) * 1000,
    }
    return {"worker_over_bare": median(paths) / median(bare)}


def _windows_read(graph: ChapterGraph) -> Callable[[Sequence[NDArray[np.int64]]], object]:
    """Windows one by one, keys and values in memory that is taken once, as the engine does."""
    kv = graph.kv_shape.empty(1, max(max(lengths) for lengths in LENGTHS.values()))
    return lambda windows: [
        graph.read(_reading(graph, ids, past=0, kv=kv)).pooled for ids in windows
    ]


def _reader(graph: ChapterGraph, past: int, new: int) -> Callable[[], object]:
    """Read new tokens behind a past that is there, again and again."""
    rng = np.random.default_rng(past)
    kv = graph.kv_shape.empty(1, past + new)
    ids = rng.integers(1, FEWEST_WORDS, past + new)
    if past:
        graph.read(_reading(graph, ids[:past], past=0, kv=kv))
    reading = _reading(graph, ids[past:], past=past, kv=kv)
    return lambda: graph.read(reading)


def _reading(
    graph: ChapterGraph, ids: NDArray[np.int64], *, past: int, kv: NDArray[np.float32]
) -> Reading:
    return Reading(
        ids=ids[None],
        weights=np.ones((1, 1, len(ids)), dtype=np.float32),
        past=np.array([past]),
        new=np.array([len(ids)]),
        kv=kv,
        opening=np.zeros((1, graph.hidden), dtype=np.float32),
        ends=np.array([[len(ids) - 1]]),
    )


def _operations(bundle: Bundle, tokens: int) -> float:
    """Floating point operations of reading so many tokens: matrices, and causal attention."""
    config: dict[str, Any] = json.loads((bundle.folder / "model/config.json").read_text())
    hidden, layers, heads = (
        config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    width = config.get("head_dim") or hidden // heads
    key_heads = config.get("num_key_value_heads") or heads
    matrices = hidden * width * 2 * (heads + key_heads) + 3 * hidden * config["intermediate_size"]
    attention = 2 * heads * width * tokens  # half of 2 * 2 * L: causal
    return float(layers * tokens * (2 * matrices + attention))


def _gemm_peak() -> float:
    """Best rate of fp32 matrix products of this core, of numpy's and torch's."""
    rng = np.random.default_rng(0)
    best = 0.0
    for rows, inner, columns in _GEMM:
        a = rng.standard_normal((rows, inner), dtype=np.float32)
        b = rng.standard_normal((inner, columns), dtype=np.float32)
        ta, tb = torch.from_numpy(a), torch.from_numpy(b)
        times = interleaved({"numpy": _product(a, b), "torch": _product(ta, tb)}, 15)
        best = max(best, 2.0 * rows * inner * columns / min(times.values()))
    return best


def _product(a: Any, b: Any) -> Callable[[], object]:  # noqa: ANN401 - arrays of either library
    return lambda: a @ b


def _naive_seconds(bundle: Bundle) -> list[float]:
    """What a user would write: all of the history through Hugging Face sdpa, for each event."""
    model: Any = AutoModel.from_pretrained(
        bundle.folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 40_000, (1, HISTORY_TOKENS)))

    def read() -> object:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).last_hidden_state.mean(dim=1)

    read()
    return [seconds(read) for _ in range(NAIVE_ROUNDS)]


def _p99(times: Sequence[float]) -> float:
    return quantiles(times, n=100)[-1]


if __name__ == "__main__":
    typer.run(main)
