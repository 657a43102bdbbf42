"""Chapter texts: the training chapters of a log as they are rendered, for whoever rewrites them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from export.corpus import EventLog, held_out_entities, learn_buckets
from export.recipe import Recipe
from llm4es.errors import ConfigError
from llm4es.events import Event
from llm4es.rendering import FORMATS, Renderer
from llm4es.schema import EventSchema
from llm4es.windows import cut_chapters

__all__ = ["ChapterText", "other_renderers", "text_sha256", "training_texts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChapterText:
    """A training chapter as the trainer has it: behind the header, a line per event."""

    entity_id: str
    first_event: str
    last_event: str
    until: datetime  # of the last event
    events: tuple[Event, ...]
    header: str
    lines: tuple[str, ...]
    labels: frozenset[str]  # of all columns; some formats write them in every line
    rendering_sha256: str

    @property
    def sha256(self) -> str:
        """Hash of the text, header and lines: what an enriched chapter names as its source."""
        return hashlib.sha256("".join((self.header, *self.lines)).encode()).hexdigest()


def text_sha256(schema: EventSchema, renderer: Renderer) -> str:
    """Hash of all that a line is made of, beside the event: what enriched texts are bound to."""
    return hashlib.sha256(f"{schema.sha256}:{renderer.sha256}".encode()).hexdigest()


def training_texts(
    log: EventLog, schema: EventSchema, recipe: Recipe, *, max_events: int
) -> list[ChapterText]:
    """Chapters that may be learnt from, rendered as the trainer renders them.

    Cut as windows are cut, but by `max_events` instead of tokens: a model that rewrites has a
    tokenizer of its own. Raises ConfigError for a schema and rendering that do not fit.
    """
    histories = _learnt_from(log, recipe)
    renderer = Renderer(schema, recipe.rendering, learn_buckets(schema, histories.values()))
    policy = recipe.window.model_copy(update={"max_chapter_tokens": max_events})
    return [
        ChapterText(
            entity_id=entity_id,
            first_event=chapter.events[0].event_id,
            last_event=chapter.events[-1].event_id,
            until=chapter.events[-1].occurred_at,
            events=chapter.events,
            header=renderer.header,
            lines=tuple(line.text for line in renderer.lines(chapter.events)),
            labels=renderer.labels,
            rendering_sha256=text_sha256(schema, renderer),
        )
        for entity_id, history in histories.items()
        for chapter in cut_chapters(history, policy, lambda _event, _earlier: 1)
    ]


def other_renderers(
    log: EventLog, schema: EventSchema, recipe: Recipe, *, styles: Sequence[str] | None = None
) -> dict[str, Renderer]:
    """Every format but the recipe's own, with what is learnt from the same histories.

    Raises ConfigError for a style that is no such format.
    """
    formats = [name for name in FORMATS if name != recipe.rendering.format]
    unknown = [name for name in styles or () if name not in formats]
    if unknown:
        raise ConfigError(
            "style", f"{unknown[0]!r} is written by no rule", f"choose from: {', '.join(formats)}"
        )
    buckets = learn_buckets(schema, _learnt_from(log, recipe).values())
    return {
        name: Renderer(schema, recipe.rendering.model_copy(update={"format": name}), buckets)
        for name in styles or formats
    }


def _learnt_from(log: EventLog, recipe: Recipe) -> dict[str, list[Event]]:
    held_out = held_out_entities(log.histories, recipe.training.held_out_share)
    before = recipe.training.before
    return {
        entity_id: known
        for entity_id, history in log.histories.items()
        if entity_id not in held_out
        and (known := [e for e in history if before is None or e.occurred_at < before])
    }
