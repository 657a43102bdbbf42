"""Logs that a model learns besides the one it serves: one tokenizer, each behind its own header."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from export.chapter_texts import text_sha256
from export.corpus import (
    OtherCorpus,
    cut_corpus,
    held_out_entities,
    known_before,
    learn_buckets,
    learnt_histories,
    read_log,
    rough_chapters,
)
from export.recipe import Recipe
from llm4es.events import Event
from llm4es.rendering import Renderer
from llm4es.schema import load_schema
from llm4es.tokens import ChapterTokenizer
from llm4es.windows import WindowPolicy

__all__ = ["LogPlace", "OtherLog", "read_other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPlace:
    """A log of events, its schema, and whose histories are learnt."""

    events: Path
    schema: Path
    entity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherLog:
    """What is learnt of a log besides: its held-out entities and later times are left out."""

    renderer: Renderer
    histories: dict[str, tuple[Event, ...]]
    sha256: str  # of its files, its entity and its text

    def lines(self, policy: WindowPolicy) -> Iterator[str]:
        """Lines for a tokenizer, the header as common as they are."""
        for history in self.histories.values():
            for chapter in rough_chapters(history, policy):
                for line in self.renderer.lines(chapter):
                    yield self.renderer.header
                    yield line.text

    def corpus(self, like: ChapterTokenizer, policy: WindowPolicy) -> OtherCorpus:
        """Chapters by the tokenizer of the log that is served."""
        tokens = like.of(self.renderer)
        return OtherCorpus(
            header_ids=tokens.header_ids,
            chapters=cut_corpus(self.histories, frozenset(), policy, tokens).train,
        )


def read_other(place: LogPlace, recipe: Recipe) -> OtherLog:
    """Read a log that is learnt besides, by the same recipe. Raises ConfigError."""
    schema = load_schema(place.schema)
    log = known_before(read_log(place.events, schema, entity=place.entity), recipe.training.before)
    held_out = held_out_entities(log.histories, recipe.training.held_out_share)
    histories = learnt_histories(log.histories, held_out)
    renderer = Renderer(schema, recipe.rendering, learn_buckets(schema, histories.values()))
    return OtherLog(
        renderer=renderer,
        histories=histories,
        sha256=f"{log.sha256}:{place.entity}:{text_sha256(schema, renderer)}",
    )
