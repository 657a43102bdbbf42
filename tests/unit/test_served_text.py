"""What a model is trained on is what a worker renders, byte by byte, for every data set."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from export.corpus import cut_corpus, learn_buckets, read_log
from export.models import BEGIN, train_tokenizer
from llm4es.bundle import Bundle
from llm4es.events import Event, TopicPartition
from llm4es.rendering import Renderer, RenderingSpec
from llm4es.schema import EventSchema, NumberField, load_schema
from llm4es.testing import modelless_bundle
from llm4es.tokens import ChapterTokenizer
from llm4es.windows import Window, WindowPolicy, cut_chapters
from stream_worker.folding import RecordFolder
from stream_worker.sources.files import FileLog, FileRecordSource
from tests.unit.test_datasets import OFFICIAL, made

POLICY = WindowPolicy(chapter_events=4, max_chapter_tokens=160)


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_text_and_ids_that_train_are_those_that_are_served(name: str, tmp_path: Path) -> None:
    folder = made(name, tmp_path).folder
    for schema_file in sorted(folder.glob("schema*.yaml")):
        suffix = schema_file.stem.removeprefix("schema")
        log_file = folder / f"events{suffix}.parquet"
        schema = load_schema(schema_file)
        rendering = every_column(schema)
        for entity in schema.entities:
            log = read_log(log_file, schema, entity=entity)
            buckets = learn_buckets(schema, log.histories.values())
            renderer = Renderer(schema, rendering, buckets)
            tokenizer = train_tokenizer(
                (text for history in log.histories.values() for text in texts(renderer, history)),
                renderer.header,
                separators=renderer.separators,
                vocabulary=400,
            )
            tokens = ChapterTokenizer(renderer, tokenizer, tokenizer.token_to_id(BEGIN))
            trained: dict[str, list[list[int]]] = {}
            for chapter in cut_corpus(log.histories, frozenset(), POLICY, tokens).train:
                trained.setdefault(chapter.entity_id, []).append(chapter.tokens.ids.tolist())

            # As a worker has it: everything read again, from what a bundle holds.
            read = RenderingSpec.model_validate_json(rendering.model_dump_json())
            served = Renderer(load_schema(schema_file), read, dict(buckets))
            bundle = replace(
                modelless_bundle(
                    schema, entity=entity, window=POLICY, rendering=read, arrays=buckets
                ),
                tokens=ChapterTokenizer(served, tokenizer, tokenizer.token_to_id(BEGIN)),
            )
            windows = worker_windows(bundle, log_file)
            assert windows.keys() == trained.keys()
            for entity_id, window in windows.items():
                kept = [chapter.events for chapter in window.chapters]
                ids = [bundle.tokens.tokenize(events).ids.tolist() for events in kept]
                assert ids == trained[entity_id]
                fits = [
                    event
                    for event in log.histories[entity_id]
                    if tokens.measure(event, ()) <= POLICY.max_chapter_tokens
                ]
                assert [texts(bundle.renderer, events) for events in kept] == [
                    texts(renderer, chapter.events)
                    for chapter in cut_chapters(fits, POLICY, tokens.measure)
                ]


def every_column(schema: EventSchema) -> RenderingSpec:
    """All that looks back within a chapter: gaps, ratios of each number, spells of each type."""
    numbers = {
        name
        for kind in schema.types.values()
        for name, field in kind.fields.items()
        if isinstance(field, NumberField)
    }
    return RenderingSpec(
        time=("gap", "hour"),
        ratios=tuple(sorted(numbers)),
        spells=dict.fromkeys(schema.types, timedelta(days=1)),
    )


def texts(renderer: Renderer, events: Sequence[Event]) -> list[str]:
    return [line.text for line in renderer.lines(events)]


def worker_windows(bundle: Bundle, log: Path) -> dict[str, Window]:
    """What a worker's store would hold once it has read the log, had it forgotten nothing."""
    entity = bundle.schema.entity(bundle.manifest.entity)
    source = FileRecordSource(FileLog(path=log, key_field=entity.field))
    source.subscribe(FromTheStart())
    folder = RecordFolder(
        bundle, max_value_bytes=1 << 20, availability_delay=timedelta(0), every_event=False
    )
    windows: dict[str, Window] = {}

    def load(entity_ids: Sequence[str]) -> dict[str, Window]:
        return {id_: windows.get(id_, Window(entity_id=id_)) for id_ in entity_ids}

    while records := source.poll(max_records=7, timeout_s=0.0):
        folding = folder.fold(records, load, {})
        windows |= {entity_id: folding.windows[entity_id] for entity_id in folding.changed}
    source.close()
    return {entity_id: window for entity_id, window in windows.items() if window.chapters}


class FromTheStart:
    """A listener that reads every partition from its first record on."""

    def assigned(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    def revoked(self, partitions: Sequence[TopicPartition]) -> None:
        raise AssertionError(partitions)
