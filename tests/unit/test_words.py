"""Ids put together from remembered words are those of the whole text."""

from functools import cache
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from export.models import train_tokenizer
from llm4es.rendering import Renderer, RenderingSpec
from llm4es.rendering.formats import FormatName
from llm4es.testing import byte_tokenizer
from llm4es.words import WordIds, word_starts
from tests.histories import event, schema

FORMATS = get_args(FormatName)


@cache
def trained(form: FormatName) -> tuple[Renderer, Tokenizer, WordIds]:
    """A renderer, a tokenizer learnt on its lines, and the same word by word."""
    renderer = Renderer(schema(), RenderingSpec(format=form))
    lines = [renderer.line(event(n), ()).text for n in range(200)]
    tokenizer = train_tokenizer(
        lines, renderer.header, separators=renderer.separators, vocabulary=400
    )
    tokenizer.encode_special_tokens = True
    starts = word_starts(tokenizer)
    assert starts is not None
    return renderer, tokenizer, WordIds(tokenizer, starts)


@pytest.mark.parametrize("form", FORMATS)
@given(
    note=st.text(st.sampled_from('a1 ,|;:"\\\n</td><td>é{}.-'), max_size=40),
    goods=st.text(st.sampled_from('b2 ,|;:"\\\n'), max_size=12),
)
def test_every_line_has_the_ids_that_the_tokenizer_gives_it(
    form: FormatName, note: str, goods: str
) -> None:
    renderer, tokenizer, words = trained(form)
    written = event(0, fields={"amount": 1.5, "goods": goods, "note": note})
    for text in (renderer.line(written, ()).text, note, renderer.header):
        whole = tokenizer.encode(text, add_special_tokens=False)
        ids, starts = words.encode(text)
        assert ids == whole.ids
        assert starts == [start for start, _ in whole.offsets]
        assert words.count(text) == len(whole.ids)


def split_by(pattern: str, behavior: str = "merged_with_next") -> Tokenizer:
    """A tokenizer of bytes that splits text by a pattern."""
    made = byte_tokenizer()
    made.pre_tokenizer = PreTokenizers(
        [
            Split(Regex(pattern), behavior=behavior),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made


def lowercased() -> Tokenizer:
    """One that changes text before it splits it."""
    made = split_by(", ")
    made.normalizer = Lowercase()
    return made


def dropping() -> Tokenizer:
    """One that draws lots."""
    made = Tokenizer(BPE({"a": 0}, [], dropout=0.1))
    made.pre_tokenizer = split_by(", ").pre_tokenizer
    return made


def forgetful_of_specials() -> Tokenizer:
    """One to which a value that spells a special token is that token."""
    made = split_by(", ")
    made.add_special_tokens(["<|begin|>"])
    return made


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_tokenizer(),
        split_by(r" (?!\S)"),
        split_by(", $"),
        split_by(", ", "isolated"),
        lowercased(),
        dropping(),
        forgetful_of_specials(),
    ],
    ids=["no pattern", "looks ahead", "looks at the end", "other splits", "normalizes", "drops",
         "specials"],
)  # fmt: skip
def test_a_tokenizer_whose_words_cannot_be_put_together_is_told(tokenizer: Tokenizer) -> None:
    assert word_starts(tokenizer) is None
