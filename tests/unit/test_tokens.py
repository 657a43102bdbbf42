"""Ids: line by line, owned by fields, and never special."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from llm4es.errors import ConfigError
from llm4es.rendering import Renderer, RenderingSpec
from llm4es.tokens import ALL_FIELDS, ChapterTokenizer, load_tokenizer
from tests.histories import event, schema


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    alphabet = sorted(ByteLevel.alphabet())
    made = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_special_tokens([AddedToken("<|begin|>", special=True)])
    made.enable_truncation(8)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def tokens(tokenizer_json: Path) -> ChapterTokenizer:
    renderer = Renderer(schema(), RenderingSpec())
    return ChapterTokenizer(renderer, load_tokenizer(tokenizer_json), 256)


def test_the_header_opens_with_the_models_first_token(tokens: ChapterTokenizer) -> None:
    assert tokens.header_ids[0] == 256
    assert len(tokens.header_ids) == 1 + len(tokens.renderer.header.encode())


def test_a_value_that_spells_a_special_token_stays_text(tokens: ChapterTokenizer) -> None:
    forged = event(0, fields={"amount": 1, "goods": "<|begin|>", "note": "<|begin|>"})
    assert 256 not in tokens.tokenize([forged]).ids


def test_a_truncation_kept_in_the_file_cuts_nothing(tokens: ChapterTokenizer) -> None:
    chapter = tokens.tokenize([event(0), event(1)])
    text = "".join(line.text for line in tokens.renderer.lines([event(0), event(1)]))
    assert len(chapter.ids) == len(text.encode())


def test_an_appended_event_leaves_all_ids_before_it(tokens: ChapterTokenizer) -> None:
    short = tokens.tokenize([event(0), event(1)])
    longer = tokens.tokenize([event(0), event(1), event(2, kind="login")])
    assert longer.ids[: len(short.ids)].tolist() == short.ids.tolist()
    assert longer.events.max() == 2


def test_a_token_belongs_to_the_field_of_its_first_byte(tokens: ChapterTokenizer) -> None:
    noted = event(0, fields={"amount": 1.5, "goods": "é", "note": "n"})
    chapter = tokens.tokenize([noted])
    line = tokens.renderer.lines([noted])[0].text.encode()
    owned = {
        field: bytes(
            letter for letter, owner in zip(line, chapter.owners, strict=True) if owner == index
        ).decode()
        for index, field in enumerate(tokens.renderer.fields("payment"))
    }
    assert owned == {
        "type": "payment", "gap": ", -", "hour": ", 12h",
        "amount": ", 1.50", "goods": ", é", "note": ", n",
    }  # fmt: skip
    assert chapter.owners[-1] == ALL_FIELDS


def test_measure_counts_what_tokenize_gives(tokens: ChapterTokenizer) -> None:
    events = [event(0), event(4000), event(4000.5, kind="login")]
    counted = [tokens.measure(e, events[:index]) for index, e in enumerate(events)]
    assert counted == np.bincount(tokens.tokenize(events).events).tolist()


def test_a_file_that_is_no_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(tmp_path / "absent.json")
