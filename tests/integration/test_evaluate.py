"""Evaluation on the simulator's log and a trained bundle: honest scores, leaks caught, a report."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from export.embed import AsOf, Embeddings, embed_as_of
from export.evaluate import Evaluated, Request, View, evaluate, shuffled_aucs, summary
from export.insight import measure_cost, shaded_history
from export.labels import LabelColumns, read_task
from export.leaks import refuse_early_knowledge
from export.report import render_report
from export.scoring import Features, Judge, predict, weighted_auc
from export.segments import segments
from llm4es.bundle import Bundle
from llm4es.errors import ConfigError
from llm4es.events import Event
from tests.commands import run
from tests.integration.conftest import Sample

QUIET = Console(quiet=True)


def request(sample: Sample, bundle: Path) -> Request:
    return Request(
        bundle=bundle,
        events=sample.events,
        labels=sample.folder / "labels.parquet",
        columns=LabelColumns(),
        folds=3,
        scorers=("logistic",),
        resamples=100,
    )


@pytest.fixture(scope="module")
def evaluated(sample: Sample, bundle_folder: Path) -> Evaluated:
    return evaluate(request(sample, bundle_folder), QUIET)


def test_every_choice_is_scored_and_compared_with_every_baseline(evaluated: Evaluated) -> None:
    found = summary(evaluated)
    ours = {score["features"] for score in found["scores"] if not score["baseline"]}
    baselines = {score["features"] for score in found["scores"] if score["baseline"]}
    assert ours == {
        "embedding", "surprise", "embedding + surprise", "embedding + aggregates",
        "embedding + surprise + aggregates",
    }  # fmt: skip
    assert baselines == {"aggregates", "recency and frequency", "token bag", "TF-IDF of the text"}
    pairs = {(each["ours"], each["theirs"]) for each in found["comparisons"]}
    assert pairs == {(one, other) for one in ours for other in baselines}
    assert found["task"]["kind"] == "point-in-time"
    assert found["task"]["positives"] > 10
    for score in found["scores"]:
        assert 0 <= score["roc_auc"]["low"] <= score["roc_auc"]["high"] <= 1
    assert json.dumps(found, default=list)


def test_shuffled_labels_tell_nothing(evaluated: Evaluated, sample: Sample, tmp_path: Path) -> None:
    """Of frauds there are too few for so narrow a bound: is this payment a large one?"""
    labels = pq.read_table(sample.folder / "labels.parquet").to_pylist()
    middle = float(np.median([row["amount"] for row in labels]))
    path = tmp_path / "labels.parquet"
    large = [{**row, "label": int(row["amount"] > middle)} for row in labels]
    pq.write_table(pa.Table.from_pylist(large), path)
    task = read_task(path, LabelColumns(), entity_field="customer_id")
    assert task.entity_ids == evaluated.task.entity_ids
    some = evaluated.embeddings.vectors[:, ::8]  # all of them take eight times as long to fit
    found = shuffled_aucs(task, Features("embedding", some))
    assert len(found) == len(evaluated.shuffled) == 5
    assert abs(float(np.mean(found)) - 0.5) <= 0.03
    told = predict(
        Features("own", task.labels[:, None].astype(np.float32)), task, task.splits, "logistic"
    )
    assert Judge(task, task.splits, resamples=0).by_fold(told, weighted_auc).mean() == 1.0


class _Later:
    """Embeds each row as it was a day after its label, and may count as if it had not."""

    def __init__(self, *, honest_count: bool) -> None:
        self.honest_count = honest_count

    def __call__(
        self,
        bundle: Bundle,
        histories: Mapping[str, Sequence[Event]],
        asked: Sequence[AsOf],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Embeddings:
        later = [AsOf(one.entity_id, one.before + timedelta(days=1)) for one in asked]
        found = embed_as_of(bundle, histories, later, progress=progress)
        if self.honest_count:
            return found
        counts = [
            sum(event.occurred_at < one.before for event in histories[one.entity_id])
            for one in asked
        ]
        return Embeddings(
            found.vectors, found.surprise, found.surprise_last, found.token_bag, np.array(counts)
        )


@pytest.mark.parametrize("honest_count", [True, False])
def test_an_embedding_that_knows_the_day_after_is_caught(
    sample: Sample, bundle_folder: Path, *, honest_count: bool
) -> None:
    problem = "precede its label" if honest_count else "taken away"
    with pytest.raises(ConfigError, match=problem):
        evaluate(request(sample, bundle_folder), QUIET, embed=_Later(honest_count=honest_count))


def test_the_page_asks_nothing_of_another_server_and_shows_all(evaluated: Evaluated) -> None:
    cost = measure_cost(evaluated)
    assert cost.tokens_per_event > 1
    assert cost.ms_per_event > 0
    page = render_report(evaluated, cost)
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<(script|link|iframe|img)\b", page)
    assert not re.search(r"@import|url\(['\"]?(?!#)", page)
    assert page.count("<svg") >= 4
    for heading in (
        "Against each baseline, paired", "ROC, precision and recall", "Learning curves",
        "The space", "Nearest neighbours", "A history, shaded by surprise", "Segments",
        "What it costs",
    ):  # fmt: skip
        assert f"<h2>{heading}" in page
    shaded = shaded_history(evaluated)
    assert shaded is not None
    assert max(event.surprise for event in shaded.events) > 0
    found = segments(evaluated)
    assert sum(each.entities for each in found) == len(
        {evaluated.task.entity_ids[row] for row in np.flatnonzero(evaluated.embeddings.events)}
    )
    assert any(each.more for each in found)


def test_the_command_judges_users_on_fixed_and_reshuffled_folds(
    sample: Sample, bundle_folder: Path, tmp_path: Path
) -> None:
    customers = sample.customers()
    labels = tmp_path / "users.parquet"
    table = {
        "customer_id": customers,
        "active": [int(sum(map(ord, one))) % 2 for one in customers],
        "fold": [index % 2 for index in range(len(customers))],
    }
    pq.write_table(pa.table(table), labels)
    arguments = [
        "export", "evaluate", "--bundle", str(bundle_folder), "--events", str(sample.events),
        "--labels", str(labels),
    ]  # fmt: skip
    figures, page = tmp_path / "out" / "figures.json", tmp_path / "out" / "page.html"
    done = run(
        [*arguments, "--label", "active", "--repeats", "2", "--scorer", "logistic",
         "--json", str(figures), "--html", str(page)],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "labels shuffled within folds" in done.stdout
    found = json.loads(figures.read_text())
    assert found["task"]["kind"] == "user"
    assert found["task"]["splits"] == "2 folds of column fold"
    assert found["scores"][0]["repeated_roc_auc"]["runs"] == 2
    assert found["cost"]["header_tokens"] > 0
    assert page.read_text().startswith("<!doctype html>")
    refused = run(arguments)
    assert refused.returncode == 2
    assert "has no column 'label'" in refused.stderr


def test_two_views_of_one_entity_are_refused(sample: Sample, bundle_folder: Path) -> None:
    view = View(bundle_folder, sample.events)
    wanted = replace(request(sample, bundle_folder), beside=(view, view))
    with pytest.raises(ConfigError, match="two bundles are of one entity"):
        evaluate(wanted, QUIET)


def test_a_split_by_time_is_not_reshuffled(sample: Sample, bundle_folder: Path) -> None:
    middle = datetime(2026, 1, 25, tzinfo=UTC)
    wanted = replace(request(sample, bundle_folder), test_from=middle, repeats=2)
    with pytest.raises(ConfigError, match="nothing to reshuffle"):
        evaluate(wanted, QUIET)


@pytest.mark.skipif(find_spec("ptls") is not None, reason="the extra is installed")
def test_coles_names_its_extra_where_it_is_not_installed(
    sample: Sample, bundle_folder: Path
) -> None:
    wanted = replace(request(sample, bundle_folder), coles=True)
    with pytest.raises(ConfigError, match="install the extra `coles`"):
        evaluate(wanted, QUIET)


@pytest.mark.skipif(find_spec("ptls") is None, reason="the extra is not installed")
def test_coles_knows_nothing_of_what_came_after(evaluated: Evaluated) -> None:
    from export.coles import Coles  # noqa: PLC0415 - an optional extra

    histories = evaluated.log.histories
    model = Coles(evaluated.bundle.schema, histories, seed=1, steps=2)
    found = model.matrix(histories, evaluated.asked)
    assert found.shape == (len(evaluated.asked), 128)
    assert found[evaluated.embeddings.events > 0].any(axis=1).all()
    refuse_early_knowledge(
        "CoLES", found, model.matrix, evaluated.task, histories, asked=evaluated.asked
    )
