"""Enrichment without a model: what counts as faithful, what an answer is kept by, what is asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import export.datasets
from export.chapter_texts import ChapterText
from export.enrich import AnswerCache, Prompts, load_prompts
from export.faithful import judge
from export.paraphrasers import Endpoint, Sampling
from llm4es.errors import ConfigError
from llm4es.rendering import FormatName, Renderer, RenderingSpec, TimeColumn
from llm4es.schema import load_schema
from tests.histories import START, event, schema

DATASETS = Path(export.datasets.__file__).parent
LINES = ["payment, -, 12h, 9.99, groceries\n", "payment, 1m, 12h, -20.00, books\n"]
TRUE = "Paid 9.99 for groceries at 12h.\nPaid -20 for books at 12h, 1 minute later.\n"


def test_what_was_said_with_the_same_numbers_in_the_same_order_is_kept() -> None:
    assert judge(LINES, TRUE) == (TRUE, None)


def test_fences_and_blank_lines_around_are_taken_off() -> None:
    assert judge(LINES, f"```json\n\n{TRUE}\n```\n") == (TRUE, None)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        ("```\n```", "empty"),
        ("\n".join(reversed(TRUE.splitlines())), "numbers"),
        (TRUE.replace("9.99", "9.98"), "numbers"),
        (TRUE.replace("-20", "20"), "numbers"),
        (TRUE.replace("9.99 for", "nearly ten for"), "numbers"),
        (TRUE.replace("books", "2 books"), "numbers"),
        (TRUE.replace(".\nPaid", ", paid"), "events"),
        (TRUE + "That is all.\n", "events"),
        ("Here is the list:\n" + TRUE, "events"),
        (TRUE + "Summary: spends little.\n", "events"),
        ("".join(LINES), "unchanged"),
    ],
)
def test_what_says_something_else_is_dropped(answer: str, reason: str) -> None:
    assert judge(LINES, answer) == ("", reason)


def test_a_summary_may_repeat_numbers_and_add_none() -> None:
    summed = TRUE + "Summary: never more than 9.99.\n"
    assert judge(LINES, summed, summary=True) == (summed, None)
    assert judge(LINES, TRUE + "Summary: 2 payments.\n", summary=True) == ("", "summary")
    assert judge(LINES, TRUE, summary=True) == (TRUE, None)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("2026-03-01, 5\n", "On 2026-03-01: 5"),
        ("1234567.50\n", "1,234,567.5 EUR"),
        ("a\\, 7\n", "a and 7"),
        ("03h, 1e-05\n", "at 3 o'clock 0.00001"),
        ("x1.4, b12\n", "1.4 times, bucket 12"),
    ],
)
def test_a_number_is_its_value_however_it_is_spelt(line: str, answer: str) -> None:
    assert judge([line], answer).reason is None


AMOUNTS = st.lists(st.integers(-(10**5), 10**5), min_size=1, max_size=6)


@pytest.mark.parametrize("format_name", [name for name in get_args(FormatName) if name != "table"])
@given(amounts=AMOUNTS)
def test_every_format_of_our_own_is_a_faithful_paraphrase(
    format_name: FormatName, amounts: list[int]
) -> None:
    told = rendered(amounts, format_name)
    labels = renderer(format_name).labels
    assert any("log10" in label for label in labels)
    kept = judge(rendered(amounts, "table"), "".join(told), labels=labels)
    assert kept == ("".join(told), None)


@given(amounts=AMOUNTS, data=st.data())
def test_any_other_amount_is_seen(amounts: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(amounts) - 1))
    other = data.draw(st.integers(-(10**5), 10**5).filter(lambda amount: amount != amounts[at]))
    changed = [*amounts[:at], other, *amounts[at + 1 :]]
    answer = "".join(rendered(changed, "markdown"))
    assert judge(rendered(amounts, "table"), answer).reason == "numbers"


def renderer(format_name: FormatName) -> Renderer:
    spec = RenderingSpec(format=format_name, time=get_args(TimeColumn), ratios=("amount",))
    return Renderer(schema(), spec)


def rendered(amounts: Sequence[int], format_name: FormatName) -> list[str]:
    events = [
        event(90 * at, fields={"amount": amount, "goods": "a+b & c", "note": "one\ntwo"})
        for at, amount in enumerate(amounts)
    ]
    return [line.text for line in renderer(format_name).lines(events)]


def test_a_number_of_a_label_is_no_number_of_an_event() -> None:
    answer = TRUE.replace("12h", "12h (log10)")
    assert judge(LINES, answer, labels=("in log10",)).reason == "numbers"
    assert judge(LINES, answer, labels=("log10",)).reason is None
    assert judge(LINES, TRUE.replace("9.99", "10"), labels=("log10",)).reason == "numbers"


def test_every_data_set_has_a_prompt_of_its_own() -> None:
    names = {load_schema(path).name for path in DATASETS.glob("*.yaml") if path.stem != "mcc"}
    assert len(names) > 8
    assert names <= set(load_prompts().logs)


def test_an_answer_is_kept_by_model_sampling_and_prompt() -> None:
    keys = {
        AnswerCache.key(model, sampling, prompt)
        for model in ("one", "two")
        for sampling in (Sampling(), Sampling(temperature=0.7), Sampling(seed=8))
        for prompt in ("a", "b")
    }
    assert len(keys) == 12


@pytest.mark.parametrize("style", load_prompts().styles)
def test_a_prompt_holds_the_chapter_and_no_id_of_whose_it_is(style: str) -> None:
    chapter = chapter_text()
    prompt = load_prompts().ask_for(chapter, log="payments", style=style, summary=True)
    assert prompt.endswith(f"Columns:\n{chapter.header}\nEvents:\n{''.join(LINES)}")
    assert "bank customer" in prompt
    assert "Summary:" in prompt
    assert chapter.entity_id not in prompt
    assert "{" not in prompt.split("Columns:")[0]


def test_an_unknown_log_is_described_in_general() -> None:
    prompt = load_prompts().ask_for(chapter_text(), log="nowhere", style="json", summary=False)
    assert "one user of a service" in prompt


def test_an_unknown_style_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="choose from: json, "):
        load_prompts().ask_for(chapter_text(), log="payments", style="sql", summary=False)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://[x/v1"])
def test_an_endpoint_is_a_url(url: str) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        Endpoint(url, "model", Sampling())


def test_prompts_that_lack_a_part_are_refused() -> None:
    with pytest.raises(ValueError, match="rules"):
        Prompts.model_validate({"task": "x"})


def chapter_text() -> ChapterText:
    return ChapterText(
        entity_id="c-4711",
        first_event="e1",
        last_event="e2",
        until=START,
        events=(),
        header="payment: since previous|hour|amount|goods\n",
        lines=tuple(LINES),
        labels=frozenset({"since previous", "hour", "amount", "goods"}),
        rendering_sha256="f" * 64,
    )
