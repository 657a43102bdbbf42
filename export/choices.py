"""Choices of features: ours and the baselines', none of which may know what came after."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy.sparse import csr_matrix

from export.baselines import Aggregates, Terms, count_terms, recency_frequency
from export.corpus import EventLog
from export.embed import AsOf, Embeddings, embed_as_of
from export.labels import Task
from export.leaks import refuse_early_knowledge, refuse_unseen_events
from export.scoring import Features
from llm4es.bundle import Bundle
from llm4es.events import Event
from llm4es.features import SumsLayout

__all__ = [
    "AGGREGATES",
    "EMBEDDING",
    "SURPRISE",
    "TERMS",
    "TOKEN_BAG",
    "Embed",
    "Scene",
    "build_choices",
    "embed_rows",
    "term_rows",
]

EMBEDDING = "embedding"
AGGREGATES = "aggregates"
SURPRISE = "surprise"
TOKEN_BAG = "token bag"  # noqa: S105 - no password
TERMS = "TF-IDF of the text"
_RECENCY, _COLES = "recency and frequency", "CoLES"


class Embed(Protocol):
    """Something that embeds as `embed_as_of` does: what is judged."""

    def __call__(
        self,
        bundle: Bundle,
        histories: Mapping[str, Sequence[Event]],
        asked: Sequence[AsOf],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Embeddings:
        """Give row i for `asked[i]`, made of the events before `asked[i].before`."""
        ...


@dataclass(frozen=True, slots=True)
class Scene:
    """What is evaluated on what, and where progress goes."""

    bundle: Bundle
    log: EventLog
    task: Task
    asked: Sequence[AsOf]
    coles_seed: int | None  # None: without CoLES
    console: Console


def embed_rows(scene: Scene, embed: Embed) -> Embeddings:
    """Embed what is asked, and refuse what knows too much."""
    histories, task = scene.log.histories, scene.task
    with scene.console.status("embedding") as status:

        def progress(done: int) -> None:
            status.update(f"embedding {done:,} of {len(scene.asked):,} rows")

        found = embed(scene.bundle, histories, scene.asked, progress=progress)
        refuse_unseen_events(EMBEDDING, found.events, task, histories)
        refuse_early_knowledge(
            EMBEDDING,
            _joined(found),
            lambda ended, asked: _joined(embed_as_of(scene.bundle, ended, asked)),
            task,
            histories,
            asked=scene.asked,
        )
    return found


def _joined(found: Embeddings) -> NDArray[np.float32]:
    return np.column_stack([found.vectors, found.surprise, found.surprise_last, found.token_bag])


def term_rows(scene: Scene) -> Terms:
    """Count the terms of each row, and refuse what knows too much."""
    histories = scene.log.histories
    with scene.console.status("counting terms"):
        terms = count_terms(scene.bundle, histories, scene.asked)

        def recompute(
            ended: Mapping[str, Sequence[Event]], asked: Sequence[AsOf]
        ) -> NDArray[np.float32]:
            again = count_terms(scene.bundle, ended, asked, min_rows=1)
            return again.aligned(terms.names)

        refuse_early_knowledge(
            TERMS, _Dense(terms.counts), recompute, scene.task, histories, asked=scene.asked
        )
    return terms


class _Dense:
    """Rows of a sparse matrix, made dense one at a time."""

    def __init__(self, matrix: csr_matrix) -> None:
        self._matrix = matrix

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._matrix[row].toarray()[0]
        return found


def build_choices(
    scene: Scene, embeddings: Embeddings, terms: Terms, beside: Mapping[str, Embeddings]
) -> list[Features]:
    """Ours, then the baselines; `beside` has what other entities' views say of the same rows."""
    histories, asked = scene.log.histories, scene.asked
    with scene.console.status("aggregating"):
        hand_made = Aggregates(scene.bundle.schema, histories, windows=scene.task.times is not None)
        aggregates = hand_made.matrix(histories, asked)
        refuse_early_knowledge(
            AGGREGATES, aggregates, hand_made.matrix, scene.task, histories, asked=asked
        )
        recency = recency_frequency(histories, asked)
    vectors = embeddings.vectors
    ours = [(EMBEDDING, [vectors])]
    surprised = bool(SumsLayout(scene.bundle).columns)
    surprise = np.column_stack([embeddings.surprise, embeddings.surprise_last])
    view = [vectors, surprise] if surprised else [vectors]
    if surprised:
        ours += [
            (SURPRISE, [surprise]),
            (f"{EMBEDDING} + {SURPRISE}", [vectors, surprise]),
            (f"{EMBEDDING} + {SURPRISE} + {AGGREGATES}", [vectors, surprise, aggregates]),
        ]
    ours.append((f"{EMBEDDING} + {AGGREGATES}", [vectors, aggregates]))
    for entity, found in beside.items():
        other = [found.vectors, found.surprise, found.surprise_last[:, None]]
        ours += [(f"{entity} view", other), (f"both views ({entity})", [*view, *other])]
        if surprised:
            ours.append((f"{SURPRISE} + {entity} view", [surprise, *other]))
    theirs = [(AGGREGATES, aggregates), (_RECENCY, recency), (TOKEN_BAG, embeddings.token_bag)]
    if scene.coles_seed is not None:
        theirs.append((_COLES, _coles(scene, scene.coles_seed)))
    return [
        *(Features(name, _varying(np.column_stack(parts))) for name, parts in ours),
        *(Features(name, _varying(matrix), baseline=True) for name, matrix in theirs),
        Features(TERMS, terms.counts, baseline=True),
    ]


def _coles(scene: Scene, seed: int) -> NDArray[np.float32]:
    from export.coles import Coles  # noqa: PLC0415 - an optional extra

    with scene.console.status("training CoLES"):
        histories = scene.log.histories
        model = Coles(scene.bundle.schema, histories, seed=seed)
        found = model.matrix(histories, scene.asked)
        refuse_early_knowledge(
            _COLES, found, model.matrix, scene.task, histories, asked=scene.asked
        )
    return found


def _varying(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Leave out columns that say the same of all rows, but for one where all do."""
    varies = np.ptp(matrix, axis=0) > 0
    varies[0] |= not varies.any()
    found: NDArray[np.float32] = matrix[:, varies]
    return found
