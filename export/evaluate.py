"""Evaluation: what a bundle's embedding is worth, against baselines that a sceptic would ask for.

Each choice of features is scored by the same two models on the same folds, and compared with each
baseline by a bootstrap over entities. Features that know what came after a label are refused.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from export.baselines import Terms
from export.choices import (
    AGGREGATES,
    EMBEDDING,
    Embed,
    Scene,
    build_choices,
    embed_rows,
    term_rows,
)
from export.corpus import EventLog, read_log
from export.embed import AsOf, Embeddings, embed_as_of
from export.labels import (
    Kind,
    LabelColumns,
    Splits,
    Task,
    drawn_splits,
    read_entity_ids,
    read_task,
    shuffle_labels,
)
from export.scoring import (
    Features,
    Interval,
    Judge,
    Metric,
    ScorerName,
    predict,
    weighted_auc,
    weighted_precision,
)
from llm4es.bundle import Bundle, load_bundle
from llm4es.errors import ConfigError

__all__ = [
    "Comparison",
    "Evaluated",
    "Request",
    "Score",
    "View",
    "evaluate",
    "shuffled_aucs",
    "summary",
]

_By = Literal["auc", "ap"]  # ROC-AUC, average precision
_SHUFFLES = 5
_SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)  # of the training entities


@dataclass(frozen=True, slots=True)
class View:
    """Another entity's bundle and log; its id stands in the labels beside the first one's."""

    bundle: Path
    events: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to evaluate, on what, and how hard to look.

    `beside` are views of other entities, judged alone and together with the first. `choices` are
    the names of the features that are scored; all, without it. `curves` learns from ever more
    entities, too.
    """

    bundle: Path
    events: Path
    labels: Path
    columns: LabelColumns
    beside: tuple[View, ...] = ()
    kind: Kind | None = None
    inclusive: bool = False
    test_from: datetime | None = None
    folds: int = 5
    repeats: int = 0
    scorers: tuple[ScorerName, ...] = ("lightgbm", "logistic")
    choices: tuple[str, ...] | None = None
    coles: bool = False
    resamples: int = 1000
    curves: bool = True
    seed: int = 42
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well one choice of features tells the label, by one scorer."""

    features: str
    columns: int
    baseline: bool
    scorer: ScorerName
    roc_auc: Interval
    average_precision: Interval
    repeated: tuple[float, ...]  # ROC-AUC of each reshuffling, its mean over folds
    repeated_precision: tuple[float, ...]
    predictions: NDArray[np.float32]  # (N,) out of fold


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A choice against a baseline, each by the scorer that does better at the metric."""

    ours: str
    theirs: str
    roc_auc: Interval
    average_precision: Interval

    @property
    def verdict(self) -> str:
        """What the interval of the ROC-AUC's difference allows to say."""
        if self.roc_auc.low > 0:
            return "better"
        return "worse" if self.roc_auc.high < 0 else "tie"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What was found, and what it was found on."""

    bundle: Bundle
    log: EventLog
    task: Task
    asked: Sequence[AsOf]
    embeddings: Embeddings
    terms: Terms
    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]
    shuffled: tuple[float, ...]  # ROC-AUC with labels shuffled within folds: 0.5 is due
    sizes: Mapping[str, tuple[tuple[int, float], ...]]  # training entities -> ROC-AUC
    seconds: float

    def best(self, features: str, *, by: _By = "auc") -> Score:
        """Give the better scorer's result for a choice of features, by ROC-AUC or precision."""
        return _best(self.scores, features, by)

    @property
    def names(self) -> tuple[str, ...]:
        """Choices of features, ours first."""
        return tuple(dict.fromkeys(score.features for score in self.scores))


def evaluate(request: Request, console: Console, *, embed: Embed = embed_as_of) -> Evaluated:
    """Embed, build baselines, refuse leaks, score and compare; progress goes to `console`.

    Raises ConfigError for labels that cannot be judged and for features that leak.
    """
    started = time.monotonic()
    if request.coles:
        import export.coles  # noqa: F401, PLC0415 - refuses now where the extra is not installed
    scene = _scene(request, console)
    task = scene.task
    if request.repeats and len(task.splits.pairs) == 1:
        raise ConfigError(
            "repeats", "a split by time has nothing to reshuffle", "leave it out, or use folds"
        )
    others = {
        other.bundle.manifest.entity: other
        for other in (_seen_beside(request, view, task, console) for view in request.beside)
    }
    if len(others) < len(request.beside):
        raise ConfigError("beside", "two bundles are of one entity", "ask for one at a time")
    found = embed_rows(scene, embed)
    terms = term_rows(scene)
    beside = {entity: embed_rows(other, embed) for entity, other in others.items()}
    choices = build_choices(scene, found, terms, beside)
    judge = Judge(task, task.splits, resamples=request.resamples)
    repeats = [
        drawn_splits(task, folds=request.folds, seed=seed) for seed in range(request.repeats)
    ]
    scores = [
        _score(scene, features, scorer, (judge, repeats), threads=request.threads)
        for features in choices
        if request.choices is None or features.name in request.choices
        for scorer in request.scorers
        if scorer == "logistic" or not features.sparse
    ]
    by_name = {features.name: features for features in choices}
    with console.status("shuffling labels, and learning from fewer entities"):
        shuffled = shuffled_aucs(task, by_name[EMBEDDING], threads=request.threads)
        sizes = {
            name: _by_size(task, by_name[name], judge, request.threads)
            for name in ((EMBEDDING, AGGREGATES) if request.curves else ())
        }
    return Evaluated(
        bundle=scene.bundle,
        log=scene.log,
        task=task,
        asked=scene.asked,
        embeddings=found,
        terms=terms,
        scores=tuple(scores),
        comparisons=tuple(_compared(scores, judge)),
        shuffled=shuffled,
        sizes=sizes,
        seconds=time.monotonic() - started,
    )


def summary(evaluated: Evaluated) -> dict[str, Any]:
    """Everything but the rows, as JSON holds it."""
    task, manifest = evaluated.task, evaluated.bundle.manifest
    return {
        "bundle": manifest.id,
        "entity": manifest.entity,
        "base_model": manifest.base_model,
        "task": {
            "label": task.name,
            "kind": task.kind,
            "events": "at or before the label" if task.inclusive else "before the label",
            "rows": len(task.labels),
            "entities": len(set(task.entity_ids)),
            "positives": int(task.labels.sum()),
            "rows_without_events": int((evaluated.embeddings.events == 0).sum()),
            "splits": task.splits.name,
        },
        "scores": [
            {
                "features": score.features,
                "columns": score.columns,
                "baseline": score.baseline,
                "scorer": score.scorer,
                "roc_auc": asdict(score.roc_auc),
                "average_precision": asdict(score.average_precision),
                "repeated_roc_auc": _spread(score.repeated),
                "repeated_average_precision": _spread(score.repeated_precision),
            }
            for score in evaluated.scores
        ],
        "comparisons": [
            {**asdict(each), "verdict": each.verdict} for each in evaluated.comparisons
        ],
        "shuffled_labels_roc_auc": _spread(evaluated.shuffled),
        "by_training_entities": {
            name: [{"entities": count, "roc_auc": auc} for count, auc in points]
            for name, points in evaluated.sizes.items()
        },
        "seconds": round(evaluated.seconds, 1),
    }


def _scene(request: Request, console: Console) -> Scene:
    bundle = load_bundle(request.bundle)
    entity = bundle.manifest.entity
    with console.status(f"reading {request.events.name}"):
        log = read_log(request.events, bundle.schema, entity=entity)
        task = read_task(
            request.labels,
            request.columns,
            entity_field=bundle.schema.entity(entity).field,
            kind=request.kind,
            inclusive=request.inclusive,
            folds=request.folds,
            seed=request.seed,
            test_from=request.test_from,
        )
    seed = request.seed if request.coles else None
    return Scene(bundle, log, task, task.asked(_end(log)), seed, console)


def _seen_beside(request: Request, view: View, task: Task, console: Console) -> Scene:
    """Give the same label rows, as another entity's log sees them."""
    bundle = load_bundle(view.bundle)
    entity = bundle.manifest.entity
    with console.status(f"reading {view.events.name}"):
        log = read_log(view.events, bundle.schema, entity=entity)
        field = bundle.schema.entity(entity).field
        rows = read_entity_ids(request.labels, request.columns, field)
    seen = replace(task, entity_ids=rows)
    return Scene(bundle, log, seen, seen.asked(_end(log)), None, console)


def _end(log: EventLog) -> datetime:
    return max(history[-1].occurred_at for history in log.histories.values())


def _score(
    scene: Scene,
    features: Features,
    scorer: ScorerName,
    judged: tuple[Judge, Sequence[Splits]],
    *,
    threads: int,
) -> Score:
    task = scene.task
    judge, repeats = judged
    with scene.console.status(f"{features.name}: {scorer}"):
        found = predict(features, task, task.splits, scorer, threads=threads)
        again = []
        for splits in repeats:
            scores = predict(features, task, splits, scorer, threads=threads)
            plain = Judge(task, splits, resamples=0)
            again.append(
                tuple(
                    float(plain.by_fold(scores, metric).mean())
                    for metric in (weighted_auc, weighted_precision)
                )
            )
    return Score(
        features=features.name,
        columns=features.matrix.shape[1],
        baseline=features.baseline,
        scorer=scorer,
        roc_auc=judge.interval(found, weighted_auc),
        average_precision=judge.interval(found, weighted_precision),
        repeated=tuple(auc for auc, _ in again),
        repeated_precision=tuple(precision for _, precision in again),
        predictions=found,
    )


def _compared(scores: Sequence[Score], judge: Judge) -> Iterator[Comparison]:
    """Each of ours against each baseline, on the same draws."""
    ours = dict.fromkeys(score.features for score in scores if not score.baseline)
    theirs = dict.fromkeys(score.features for score in scores if score.baseline)

    def difference(one: str, other: str, by: _By, metric: Metric) -> Interval:
        first, second = (_best(scores, features, by).predictions for features in (one, other))
        return judge.difference(first, second, metric)

    for one in ours:
        for other in theirs:
            yield Comparison(
                ours=one,
                theirs=other,
                roc_auc=difference(one, other, "auc", weighted_auc),
                average_precision=difference(one, other, "ap", weighted_precision),
            )


def _best(scores: Sequence[Score], features: str, by: _By) -> Score:
    return max(
        (score for score in scores if score.features == features),
        key=lambda score: (score.roc_auc if by == "auc" else score.average_precision).mean,
    )


def shuffled_aucs(task: Task, features: Features, *, threads: int = 1) -> tuple[float, ...]:
    """ROC-AUC of five evaluations with labels shuffled within folds: what is above 0.5 leaks."""
    found = []
    for seed in range(_SHUFFLES):
        lot = shuffle_labels(task, seed=seed)
        scores = predict(features, lot, lot.splits, "logistic", threads=threads)
        judge = Judge(lot, lot.splits, resamples=0)
        found.append(float(judge.by_fold(scores, weighted_auc).mean()))
    return tuple(found)


def _by_size(
    task: Task, features: Features, judge: Judge, threads: int
) -> tuple[tuple[int, float], ...]:
    """Logistic regression's ROC-AUC on the same test rows, learnt from a share of the entities."""
    rng = np.random.default_rng(0)
    groups = task.groups
    order = rng.permutation(int(groups.max()) + 1)
    found = []
    for share in _SHARES:
        pairs, counts = [], []
        for train, test in task.splits.pairs:
            known = np.unique(groups[train])
            chosen = order[np.isin(order, known)][: max(1, round(share * len(known)))]
            rows = train[np.isin(groups[train], chosen)]
            pairs.append((rows, test))
            counts.append(len(chosen))
        if all(len(np.unique(task.labels[rows])) > 1 for rows, _ in pairs):
            splits = replace(task.splits, pairs=tuple(pairs))
            scores = predict(features, task, splits, "logistic", threads=threads)
            auc = float(judge.by_fold(scores, weighted_auc).mean())
            found.append((round(float(np.mean(counts))), auc))
    return tuple(found)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "runs": len(values)}
