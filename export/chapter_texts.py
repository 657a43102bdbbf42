"""Chapter texts: the training chapters of a log as they are rendered, for whoever rewrites them."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

from export.corpus import EventLog, held_out_entities, learn_buckets
from export.recipe import Recipe
from llm4es.rendering import Renderer
from llm4es.schema import EventSchema
from llm4es.windows import cut_chapters

__all__ = ["ChapterText", "training_texts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChapterText:
    """A training chapter as the trainer has it: behind the header, a line per event."""

    entity_id: str
    first_event: str
    last_event: str
    until: datetime  # of the last event
    header: str
    lines: tuple[str, ...]
    rendering_sha256: str

    @property
    def sha256(self) -> str:
        """Hash of the text, header and lines: what an enriched chapter names as its source."""
        return hashlib.sha256("".join((self.header, *self.lines)).encode()).hexdigest()


def training_texts(
    log: EventLog, schema: EventSchema, recipe: Recipe, *, max_events: int
) -> list[ChapterText]:
    """Chapters that may be learnt from, rendered as the trainer renders them.

    Cut as windows are cut, but by `max_events` instead of tokens: a model that rewrites has a
    tokenizer of its own. Raises ConfigError for a schema and rendering that do not fit.
    """
    held_out = held_out_entities(log.histories, recipe.training.held_out_share)
    before = _in_utc(recipe.training.before)
    histories = {
        entity_id: known
        for entity_id, history in log.histories.items()
        if entity_id not in held_out
        and (known := [e for e in history if before is None or e.occurred_at < before])
    }
    renderer = Renderer(schema, recipe.rendering, learn_buckets(schema, histories.values()))
    policy = recipe.window.model_copy(update={"max_chapter_tokens": max_events})
    return [
        ChapterText(
            entity_id=entity_id,
            first_event=chapter.events[0].event_id,
            last_event=chapter.events[-1].event_id,
            until=chapter.events[-1].occurred_at,
            header=renderer.header,
            lines=tuple(line.text for line in renderer.lines(chapter.events)),
            rendering_sha256=renderer.sha256,
        )
        for entity_id, history in histories.items()
        for chapter in cut_chapters(history, policy, lambda _event, _earlier: 1)
    ]


def _in_utc(moment: datetime | None) -> datetime | None:
    naive = moment is not None and moment.tzinfo is None
    return moment.replace(tzinfo=UTC) if moment is not None and naive else moment
