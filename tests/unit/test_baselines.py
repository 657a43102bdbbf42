"""Baselines against what is counted by hand, and against what came after."""

from datetime import timedelta

import numpy as np
import pytest

from export.baselines import Aggregates, count_terms, event_terms, recency_frequency
from export.embed import AsOf
from export.labels import Splits, Task
from export.leaks import refuse_early_knowledge, refuse_unseen_events
from llm4es.bundle import Bundle
from llm4es.errors import ConfigError
from llm4es.events import Event
from llm4es.testing import modelless_bundle
from llm4es.windows import WindowPolicy
from tests.histories import START, event, schema

DAY = 86_400.0


def bundle() -> Bundle:
    return modelless_bundle(schema(), entity="customer", window=WindowPolicy())


def pay(day: float, amount: float, goods: str = "g1") -> Event:
    return event(
        day * DAY, event_id=f"p{day}", fields={"amount": amount, "goods": goods, "note": None}
    )


HISTORY = (
    pay(0, 10),
    pay(5, 30, "g2"),
    event(5.5 * DAY, kind="login", event_id="l"),
    pay(6, 20),
    pay(9, 1000),
)
AS_OF = AsOf("c1", START + timedelta(days=7))  # three payments and a login before it


def task_of(asked: list[AsOf], *, inclusive: bool = False) -> Task:
    return Task(
        kind="point-in-time",
        name="label",
        entity_ids=tuple(one.entity_id for one in asked),
        labels=np.zeros(len(asked), dtype=np.int8),
        weights=np.ones(len(asked)),
        times=tuple(one.before for one in asked),
        inclusive=inclusive,
        splits=Splits("none", ()),
    )


def aggregated(*asked: AsOf, windows: bool = True) -> list[dict[str, float]]:
    made = Aggregates(schema(), {"c1": HISTORY}, windows=windows)
    matrix = made.matrix({"c1": HISTORY}, asked)
    unlogged = np.sign(matrix) * np.expm1(np.abs(matrix))
    return [dict(zip(made.names, row.tolist(), strict=True)) for row in unlogged]


def test_aggregates_are_those_of_the_events_before() -> None:
    (found,) = aggregated(AS_OF)
    expected = {
        "count payment": 3,
        "count login": 1,
        "share payment": 0.75,
        "count payment.goods=g1": 2,
        "share payment.goods=g2": 0.25,
        "count payment.amount": 3,
        "sum payment.amount": 60,
        "mean payment.amount": 20,
        "std payment.amount": float(np.std([10, 20, 30])),
        "min payment.amount": 10,
        "max payment.amount": 30,
        "sum payment.amount in 1d": 20,
        "mean over all payment.amount in 1d": 1.0,
        "count payment in 7d": 3,
        "count login in 1d": 0,
        "newest payment.amount": 20,
        "newest payment": 1,
        "newest gap": 0.5,
        "days since newest": 1,
        "days since first": 7,
        "days since login": 1.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_an_entity_without_events_gets_zeros() -> None:
    nobody, early = aggregated(AsOf("nobody", AS_OF.before), AsOf("c1", START))
    assert set(nobody.values()) == set(early.values()) == {0.0}
    assert not recency_frequency({"c1": HISTORY}, [AsOf("c1", START)]).any()


def test_users_need_no_time_windows() -> None:
    (found,) = aggregated(AS_OF, windows=False)
    assert not [name for name in found if name.endswith("d") and " in " in name]


def test_recency_and_frequency_are_of_the_events_before() -> None:
    found = np.expm1(recency_frequency({"c1": HISTORY}, [AS_OF]))[0]
    assert found == pytest.approx([4, 4, 4, 1, 1, 7, 1.5, 0.5], rel=1e-4)


def test_terms_are_the_values_and_words_of_the_lines_but_for_time() -> None:
    (terms,) = event_terms(bundle(), [event(0, fields={
        "amount": 5.0, "goods": "g1", "note": "Two words"})])  # fmt: skip
    assert terms == [
        "payment.type=payment",
        "payment.amount=5.00",
        "payment.goods=groceries",
        "payment.note=Two words",
        "payment.note:two",
        "payment.note:words",
    ]


def test_counts_of_terms_follow_the_moments_whatever_their_order() -> None:
    asked = [AsOf("c1", START + timedelta(days=day)) for day in (7, 1, 30, 0)]
    found = count_terms(bundle(), {"c1": HISTORY}, asked, min_rows=1)
    assert found.aligned(["payment.goods=groceries", "payment.goods=g2", "x"]).tolist() == [
        [2, 1, 0], [1, 0, 0], [3, 1, 0], [0, 0, 0],
    ]  # fmt: skip


def test_more_events_than_precede_the_label_are_refused() -> None:
    task = task_of([AS_OF])
    refuse_unseen_events("honest", np.array([4]), task, {"c1": HISTORY})
    with pytest.raises(ConfigError, match="made of 5 events, and 4 precede"):
        refuse_unseen_events("leaky", np.array([5]), task, {"c1": HISTORY})


def test_an_event_at_the_labels_own_time_is_seen_only_where_the_task_says_so() -> None:
    at = AsOf("c1", HISTORY[3].occurred_at)
    seen = np.array([4])
    refuse_unseen_events("inclusive", seen, task_of([at], inclusive=True), {"c1": HISTORY})
    with pytest.raises(ConfigError, match="3 precede"):
        refuse_unseen_events("exclusive", seen, task_of([at]), {"c1": HISTORY})
    end = HISTORY[-1].occurred_at
    assert task_of([at]).asked(end) == [at]
    assert task_of([at], inclusive=True).asked(end)[0].before == at.before + timedelta(
        microseconds=1
    )


def test_features_that_change_when_the_future_is_taken_away_are_refused() -> None:
    task, histories = task_of([AS_OF]), {"c1": HISTORY}
    made = Aggregates(schema(), histories, windows=True)
    asked = [AS_OF]
    honest = made.matrix(histories, asked)
    refuse_early_knowledge("honest", honest, made.matrix, task, histories, asked=asked)
    # The whole history's maximum: one column of many, and no count betrays it.
    leaky = honest.copy()
    leaky[0, made.names.index("max payment.amount")] = np.log1p(1000)
    with pytest.raises(ConfigError, match="taken away"):
        refuse_early_knowledge("leaky", leaky, made.matrix, task, histories, asked=asked)
