"""`inspect`: what is known of one entity, side by side."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec
from rich.console import Console
from rich.table import Table

from llm4es.bundle import Bundle, load_bundle
from llm4es.engine import OnnxEmbedder, open_embedder
from llm4es.errors import ConfigError
from llm4es.events import Event
from llm4es.feast import open_reader
from llm4es.features import FeatureRow
from llm4es.windows import Chapter, Window, visible_chapters
from stream_worker.assembly import open_window_store
from stream_worker.settings import WorkerSettings

__all__ = ["show_entity"]

log = logging.getLogger(__name__)

_SHOWN_VALUES = 6  # of the embedding, as a sign of life
_SHOWN_EVENTS = 40  # newest of a chapter, on a terminal; JSON has them all


@dataclass(frozen=True, slots=True)
class _EventView:
    """An event's text, and its surprise in nats: above its mean by depth, in all and by field."""

    event_id: str
    occurred_at: str
    text: str
    surprise: dict[str, float]


@dataclass(frozen=True, slots=True)
class _ChapterView:
    state: str  # open, closed (its sums are stored), or sealed (its events are forgotten too)
    seen: bool
    count: int
    tokens: int
    first: str
    last: str
    events: list[_EventView]


def show_entity(settings: WorkerSettings, entity_id: str, *, as_json: bool) -> None:
    """Print an entity's window, text, surprise and online row. Raises ConfigError if unknown.

    It looks, beside a worker or without one: nothing is made, recovered or rolled.
    """
    with ExitStack() as stack:
        bundle = load_bundle(settings.bundle)
        store = open_window_store(settings, bundle, read_only=True)
        stack.callback(store.close)
        window = store.read(entity_id)
        if window is None:
            raise ConfigError(
                "entity",
                f"the window store holds no {bundle.manifest.entity} of that id",
                "look at the id, and at --window-store and --bundle",
            )
        if window.deleted:
            raise ConfigError(
                "entity",
                f"was deleted by a tombstone as of {window.as_of}, and has had no event since",
                "there is nothing to show",
            )
        reader = open_reader(settings.feature_repo, bundle, config_file=settings.feature_store_file)
        stack.callback(reader.close)
        online = reader.read([entity_id])[0]
        embedder = open_embedder(bundle, device=settings.device, threads=settings.threads)
        chapters = list(_chapters(bundle, embedder, window))
    if as_json:
        print(msgspec.json.encode(_document(bundle, window, chapters, online)).decode())  # noqa: T201 - the result
    else:
        # Ids and text are data: brackets and colons in them are no markup.
        _print(Console(markup=False, emoji=False), bundle, window, chapters, online)


def _chapters(bundle: Bundle, embedder: OnnxEmbedder, window: Window) -> Iterator[_ChapterView]:
    visible = visible_chapters(window, bundle.manifest.window)
    for index, chapter in enumerate(window.chapters):
        is_open = index == len(window.chapters) - 1
        state = "open" if is_open else "closed" if chapter.events else "sealed"
        yield _ChapterView(
            state=state,
            seen=index in visible,
            count=chapter.count,
            tokens=chapter.tokens,
            first=chapter.first[0].isoformat(),
            last=chapter.last[0].isoformat(),
            events=_events(bundle, embedder, chapter),
        )


def _events(bundle: Bundle, embedder: OnnxEmbedder, chapter: Chapter) -> list[_EventView]:
    if not chapter.events:
        return []
    tokens = bundle.tokens.tokenize(chapter.events)
    types = [event.type for event in chapter.events]
    surprise = embedder.read_chapter(types, tokens, [len(types)])[0].surprise
    names = embedder.layout.tracks.names
    return [
        _EventView(
            event_id=event.event_id,
            occurred_at=event.occurred_at.isoformat(),
            text=line.text.rstrip("\n"),
            surprise={}
            if surprise is None
            else {
                _short(name, event): round(float(surprise.deviation[index, track]), 4)
                for track, name in enumerate(names)
                if surprise.present[index, track]
            },
        )
        for index, (event, line) in enumerate(
            zip(chapter.events, bundle.renderer.lines(chapter.events), strict=True)
        )
    ]


def _short(track: str, event: Event) -> str:
    """A track's name without the event type, which stands in the line already."""
    return track.removeprefix(f"{event.type}_")


def _document(
    bundle: Bundle, window: Window, chapters: list[_ChapterView], online: FeatureRow | None
) -> dict[str, object]:
    sealed = window.sealed
    return {
        "entity": window.entity_id,
        "bundle": bundle.id,
        "as_of": window.as_of,
        "topic": window.topic,
        "partition": window.partition,
        "next_offset": window.next_offset,
        "version": window.version,
        "header": bundle.renderer.header,
        "sealed_history": None
        if sealed is None
        else {"chapters": sealed.chapters, "events": sealed.count},
        "chapters": chapters,
        "online": None
        if online is None
        else {
            "as_of": online.as_of,
            "bundle": online.bundle_id,
            "event_count": online.event_count,
            "last_event_id": online.last_event_id,
            "last_event_time": online.last_event_time,
            "surprise_last": online.surprise_last,
            "surprise": online.surprise.tolist(),
            "embedding": online.embedding.tolist(),
        },
    }


def _print(
    console: Console,
    bundle: Bundle,
    window: Window,
    chapters: list[_ChapterView],
    online: FeatureRow | None,
) -> None:
    console.print(_sides(bundle, window, online))
    console.print(bundle.renderer.header.rstrip(), style="dim", highlight=False)
    for number, chapter in enumerate(chapters):
        seen = "seen" if chapter.seen else "no longer seen"
        console.rule(
            f"chapter {number}: {chapter.state}, {seen}, {chapter.count} events, "
            f"{chapter.tokens} tokens"
        )
        table = Table(show_header=True, box=None)
        table.add_column("event")
        table.add_column("surprise, nats", justify="right")
        table.add_column("by field")
        for event in chapter.events[-_SHOWN_EVENTS:]:
            fields = {name: nats for name, nats in event.surprise.items() if name != "all"}
            told = "  ".join(f"{name} {nats:+.1f}" for name, nats in fields.items())
            table.add_row(event.text, f"{event.surprise.get('all', 0.0):+.2f}", told)
        console.print(table)


def _sides(bundle: Bundle, window: Window, online: FeatureRow | None) -> Table:
    table = Table(title=f"{bundle.manifest.entity} {window.entity_id}")
    for column in ("", "window", "online row"):
        table.add_column(column)
    last = window.last_event
    rows = [
        ("as_of", _text(window.as_of), _text(online and online.as_of)),
        ("bundle", bundle.id, _text(online and online.bundle_id)),
        ("last event", _text(last and last.event_id), _text(online and online.last_event_id)),
        ("occurred at", _text(window.newest), _text(online and online.last_event_time)),
        ("events seen", "", _text(online and online.event_count)),
        ("surprise of the last", "", f"{online.surprise_last:+.2f} nats" if online else "none"),
        (
            "embedding",
            "",
            " ".join(f"{value:+.3f}" for value in online.embedding[:_SHOWN_VALUES]) + " ..."
            if online
            else "none",
        ),
        ("log", f"{window.topic}/{window.partition}, next {window.next_offset}", ""),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _text(value: object) -> str:
    return "none" if value is None else str(value)
