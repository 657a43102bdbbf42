"""Models and their tokenizers: made from nothing, or loaded from where Hugging Face keeps them."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from export.recipe import Shape
from llm4es.errors import ConfigError
from llm4es.words import split_at

__all__ = [
    "BEGIN",
    "Pretrained",
    "load_pretrained",
    "new_llama",
    "start_from_counts",
    "train_tokenizer",
    "wrap_tokenizer",
]

logger = logging.getLogger(__name__)

BEGIN = "<|begin|>"
_UNKNOWN_LICENCE = "see base model"
_ROUND_POSITIONS = 64
_RANDOM_SHARE = 0.3  # of a new model's random start that is left beside the SVD


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """An existing causal model (fp32), its tokenizer, and what it says of itself."""

    name: str  # without a path: it stands in the manifest, which knows no host
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    licence: str

    @property
    def bos_id(self) -> int | None:
        """What the model was trained to see first, if anything."""
        found: int | None = self.tokenizer.bos_token_id
        return found

    @property
    def positions(self) -> int | None:
        """Longest context, header included; None where the model names no bound."""
        found: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return found


def train_tokenizer(
    lines: Iterable[str], header: str, *, separators: str, vocabulary: int
) -> Tokenizer:
    """Train a byte-level BPE that splits only at the separators of rendered text (`split_at`).

    The terminator stays a token of its own: what it surprises by belongs to no field.

    Lossless for any text: every byte is in its alphabet. The header is repeated until its
    labels are as common as the commonest words. One special token, BEGIN, has id 0.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = split_at(separators)
    tokenizer.decoder = ByteLevelDecoder()
    texts = list(lines)
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        special_tokens=[BEGIN],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *([header] * max(2, len(texts)))], trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Dress a tokenizer of ours for transformers, so that `model/` is a model like any other."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=BEGIN,
        pad_token=BEGIN,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def new_llama(shape: Shape, *, vocabulary: int, positions: int, bos_id: int) -> LlamaForCausalLM:
    """Build a Llama with random weights (from torch's current seed), fp32, embeddings tied."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            # Some room: rotary positions cost nothing, and longer chapters may be tried.
            max_position_embeddings=-(-positions // _ROUND_POSITIONS) * _ROUND_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=bos_id,
            eos_token_id=bos_id,
            pad_token_id=bos_id,
        )
    )


def start_from_counts(
    model: PreTrainedModel, histories: Sequence[NDArray[np.int64]], *, seed: int
) -> None:
    """Start token embeddings from what entities use: the SVD of their TF-IDF weighted counts.

    `histories` are token ids (T,) of one entity each. Components are weighed by their singular
    values and then rotated at random: who standardises features, as most downstream models do,
    would else make the last component as loud as the first (docs/method.md has the numbers).
    """
    table: Any = model.get_input_embeddings().weight
    vocabulary, width = table.shape
    rows = np.repeat(np.arange(len(histories)), [len(ids) for ids in histories])
    counts = csr_matrix(
        (np.ones(len(rows)), (rows, np.concatenate(histories))), (len(histories), vocabulary)
    )
    components = min(width, len(histories) - 1, vocabulary - 1)
    if components < 1:
        return
    weighed = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    with np.errstate(invalid="ignore"):  # a share of no variance, where all entities are alike
        svd = TruncatedSVD(components, random_state=seed).fit(weighed)
    found = np.zeros((vocabulary, width))
    found[:, :components] = svd.components_.T * svd.singular_values_
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    found = found @ rotation
    spread = float(table.detach().std())
    with torch.no_grad():
        # Some of the random start stays: a vector near zero, of a rare token, has an enormous
        # gradient behind a norm.
        table *= _RANDOM_SHARE
        table += torch.from_numpy(found * (spread / found.std())).to(table.dtype)


def load_pretrained(source: str) -> Pretrained:
    """Load a causal model by hub id, from a folder, or from a .gguf file; in fp32.

    Raises ConfigError where there is none, or where its tokenizer is not a fast one.
    """
    place, options, name = _locate(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, use_fast=True, **options)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            "model",
            f"{source} cannot be loaded as a causal language model ({problem})",
            "name a hub id, a folder with config.json, or a .gguf file",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            "model", f"{source} has no fast tokenizer", "choose a model with a tokenizer.json"
        )
    if options:
        _mend_chat_tokens(tokenizer)
    return Pretrained(
        name=name, model=model, tokenizer=tokenizer, licence=_licence(source, options)
    )


def _locate(source: str) -> tuple[str, dict[str, Any], str]:
    """Where transformers shall look, with which options, and a name without a path."""
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError("model", f"{source} is no file", "name a .gguf file")
        return str(path.parent), {"gguf_file": path.name}, path.stem
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                "model", f"{source} holds no config.json", "name a folder made by save_pretrained"
            )
        return str(path), {}, path.resolve().name
    return source, {}, source


def _mend_chat_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """A chat model's GGUF names one token for begin and end, and none for padding."""
    known = tokenizer.get_vocab()
    if tokenizer.eos_token == tokenizer.bos_token and "<|im_end|>" in known:
        tokenizer.eos_token = "<|im_end|>"  # noqa: S105 - a word of its vocabulary
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|endoftext|>" if "<|endoftext|>" in known else tokenizer.eos_token
    tokenizer.padding_side = "right"


def _licence(source: str, options: dict[str, Any]) -> str:
    if options:
        return _gguf_licence(Path(source))
    card = Path(source) / "README.md"
    with suppress(OSError, ValueError, HfHubHTTPError, HFValidationError):
        if Path(source).is_dir():
            found = ModelCard(card.read_text(encoding="utf-8")).data.get("license")
        else:
            found = ModelCard.load(source).data.get("license")
        if isinstance(found, str) and found:
            return found
    return _UNKNOWN_LICENCE


def _gguf_licence(path: Path) -> str:
    from gguf import GGUFReader  # noqa: PLC0415 - only this format needs it

    field = GGUFReader(path).get_field("general.license")
    return str(field.contents()) if field is not None else _UNKNOWN_LICENCE
