"""Both graphs of every architecture we name compute what transformers' own model does."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from export import graphs
from export.parity import measure_parity, random_chapters
from export.rotary import turns_halves
from llm4es.bundle import CACHED_GRAPH, PORTABLE_GRAPH, Pooling
from llm4es.engine.session import open_cpu_graphs

MAX_TOKENS = 96
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama, grouped heads, tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=32),
    "gpt-2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=128),
    "gpt-neox": GPTNeoXConfig(**SHAPE, rotary_pct=0.5),
    "gpt-neox, whole heads turned": GPTNeoXConfig(**SHAPE, rotary_pct=1.0),
}
TURNED_BY_OPERATOR = {"LlamaConfig", "Qwen2Config", "Qwen3Config"}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_an_architecture_survives_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: PretrainedConfig
) -> None:
    torch.manual_seed(3)
    monkeypatch.setattr(graphs, "VOCABULARY_SLICE", 128)  # so that there are several
    model = AutoModelForCausalLM.from_config(config).eval()
    pooling = Pooling(layers=(0, 1, 2), scales=(4.0,))
    graphs.export_graphs(model, pooling, tmp_path, surprise=True)
    parity = measure_parity(
        open_cpu_graphs(tmp_path, threads=1),
        model,
        pooling,
        random_chapters(np.array([5, 6, 7]), vocabulary=300, max_tokens=MAX_TOKENS),
    )
    assert set(parity) == {"pooled", "token_nats"}
    assert max(parity.values()) < 1e-5
    assert _operators(tmp_path / PORTABLE_GRAPH).isdisjoint({"RotaryEmbedding"})
    if type(config).__name__ in TURNED_BY_OPERATOR:
        assert "RotaryEmbedding" in _operators(tmp_path / CACHED_GRAPH)
        # What all layers share is made by the first.
        assert not any("/layers.1/" in asked for asked in _asked_for_shape(tmp_path / CACHED_GRAPH))


def test_a_rotation_of_another_kind_is_told_apart() -> None:
    def interleaved(
        query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def turned(states: torch.Tensor) -> torch.Tensor:
            pairs = torch.stack([-states[..., 1::2], states[..., ::2]], dim=-1).flatten(-2)
            return states * cosines[:, None] + pairs * sines[:, None]

        return turned(query), turned(key)

    assert turns_halves(apply_rotary_pos_emb)
    assert not turns_halves(interleaved)
    assert not turns_halves(lambda states: states)


def _operators(path: Path) -> set[str]:
    return {node.op_type for node in _nodes(path)}


def _asked_for_shape(path: Path) -> set[str]:
    return {node.input[0] for node in _nodes(path) if node.op_type == "Shape"}


def _nodes(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(path, load_external_data=False).graph.node)
