"""Segments: clusters of entities, described by what tells their events apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from export.evaluate import Evaluated
from export.insight import compressed, known_events
from llm4es.events import Event
from llm4es.schema import NumberField

__all__ = ["Segment", "segments"]

_TELLING = 6
_PRIOR = 0.5  # of a value's share, in percent of events: rare values do not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A cluster of entities, and what tells it apart, as (name, here, elsewhere).

    `means` are of number fields; `more` and `less` are values, by their share of events in percent.
    """

    entities: int
    label_rate: float
    means: tuple[tuple[str, float, float], ...]
    more: tuple[tuple[str, float, float], ...]
    less: tuple[tuple[str, float, float], ...]


def segments(evaluated: Evaluated, *, count: int = 6) -> list[Segment]:
    """K-means over entities, each as its newest row is, described by what their events say."""
    rows = _newest_rows(evaluated)
    count = min(count, len(rows) // 3)
    if count < len((0, 1)):
        return []
    vectors = compressed(evaluated.embeddings.vectors[rows])
    assigned = KMeans(count, n_init=10, random_state=0).fit_predict(vectors)
    names, columns = _telling_terms(evaluated)
    counts = evaluated.terms.counts[rows][:, columns]
    events = [known_events(evaluated, row) for row in rows.tolist()]
    labelled = np.array(evaluated.task.entity_ids)
    found = []
    for cluster in np.argsort(-np.bincount(assigned, minlength=count)).tolist():
        inside = assigned == cluster
        here, elsewhere = (
            100 * np.asarray(counts[part].sum(axis=0)).ravel() / max(_events(events, part), 1)
            for part in (inside, ~inside)
        )
        lift = np.log((here + _PRIOR) / (elsewhere + _PRIOR))
        order = np.argsort(-lift)
        members = {evaluated.task.entity_ids[row] for row in rows[inside]}
        rate = evaluated.task.labels[np.isin(labelled, list(members))].mean()
        means = [
            _means([events[i] for i in np.flatnonzero(part).tolist()]) for part in (inside, ~inside)
        ]
        found.append(
            Segment(
                entities=len(members),
                label_rate=float(rate),
                means=tuple((name, means[0][name], means[1].get(name, 0.0)) for name in means[0]),
                more=_telling(names, here, elsewhere, order[:_TELLING], lift > 0),
                less=_telling(names, here, elsewhere, order[::-1][:_TELLING], lift < 0),
            )
        )
    return found


def _newest_rows(evaluated: Evaluated) -> NDArray[np.int64]:
    newest: dict[str, int] = {}
    for row, one in enumerate(evaluated.asked):
        known = newest.get(one.entity_id)
        if evaluated.embeddings.events[row] and (
            known is None or evaluated.asked[known].before < one.before
        ):
            newest[one.entity_id] = row
    return np.array(sorted(newest.values()), dtype=np.int64)


def _telling_terms(evaluated: Evaluated) -> tuple[list[str], list[int]]:
    """Names and columns of whole values; numbers are told by their means, not by their words."""
    numbers = {
        f"{kind}.{name}"
        for kind, spec in evaluated.bundle.schema.types.items()
        for name, field in spec.fields.items()
        if isinstance(field, NumberField)
    }
    columns = [
        column
        for column, name in enumerate(evaluated.terms.names)
        if "=" in name and name.split("=", 1)[0].removesuffix("_ratio") not in numbers
    ]
    return [evaluated.terms.names[column] for column in columns], columns


def _events(events: Sequence[Sequence[Event]], part: NDArray[np.bool_]) -> int:
    return sum(len(events[index]) for index in np.flatnonzero(part).tolist())


def _means(histories: Sequence[Sequence[Event]]) -> dict[str, float]:
    """Mean of each number field over the events that have it, and of events per entity."""
    values: dict[str, list[float]] = {}
    for event in chain.from_iterable(histories):
        for name, value in event.fields.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(f"{event.type}.{name}", []).append(float(value))
    events = float(np.mean([len(history) for history in histories]))
    return {"events": events, **{name: float(np.mean(values[name])) for name in sorted(values)}}


def _telling(
    names: Sequence[str],
    here: NDArray[np.float64],
    elsewhere: NDArray[np.float64],
    order: NDArray[np.int64],
    wanted: NDArray[np.bool_],
) -> tuple[tuple[str, float, float], ...]:
    return tuple(
        (names[index].replace("=", " = ", 1), float(here[index]), float(elsewhere[index]))
        for index in order.tolist()
        if wanted[index]
    )
