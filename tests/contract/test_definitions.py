"""What Feast keeps of our definitions, its commands on them as they are, and what is refused."""

import json
import logging
import re
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from feast import FeatureService, FeatureStore, FeatureView, FileSource, KafkaSource, PushSource
from feast.data_format import JsonFormat
from feast.errors import FeatureViewNotFoundException
from google.protobuf.json_format import MessageToDict

from dev.processes import LOOPBACK, ServerProcess, is_free, on_a_free_port
from llm4es.errors import BundleMismatch, ConfigError
from llm4es.feast import (
    ViewSpec,
    define,
    define_all,
    drop_view,
    open_sink,
    read_pairs,
    served_view,
    switch_service,
)
from llm4es.feast.definitions import view_tags
from llm4es.features import view_name
from tests.feast_parts import (
    BUNDLE_ID,
    ROOT,
    apply,
    feast,
    feast_command,
    make_repo,
    make_spec,
    row,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ibis"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]

VIEW = view_name("customer", BUNDLE_ID)
OTHER_ID = "ba9876543210"
ENV = {
    "LLM4ES_TOPIC": "payments",
    "LLM4ES_BOOTSTRAP_SERVERS": "kafka-1:9092,kafka-2:9092",
    "LLM4ES_OFFLINE_LOG": "data/log",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundle")


@pytest.fixture(scope="module")
def spec(bundle: Path) -> ViewSpec:
    return make_spec(bundle)


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory, bundle: Path, spec: ViewSpec) -> Path:
    """`feature_repo` after `feast apply`, with a row in it."""
    repo = make_repo(tmp_path_factory.mktemp("repo"))
    done = feast(repo, "apply", LLM4ES_BUNDLE=str(bundle), **ENV)
    assert done.returncode == 0, done.stderr
    sink = open_sink(repo, spec, writer_id="w")
    sink.publish([row(spec, "c1", last_event_id="known")])
    sink.close()
    return repo


def registered(repo: Path) -> dict[str, Any]:
    """All that the registry says of our objects, but for the order of fields and its clock."""

    def plain(value: Any) -> Any:  # noqa: ANN401 - a protobuf as JSON
        if isinstance(value, list):
            return sorted(map(plain, value), key=json.dumps)
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items() if "Timestamp" not in name}
        return value

    store = FeatureStore(repo_path=str(repo))
    listed: dict[str, list[Any]] = {
        "entities": store.list_entities(),
        "data sources": store.list_data_sources(),
        "stream feature views": store.list_stream_feature_views(),
        "feature views": store.list_feature_views(),
        "feature services": store.list_feature_services(),
    }
    return {
        kind: plain([MessageToDict(each.to_proto()) for each in found])
        for kind, found in listed.items()
    }


def test_what_we_define_survives_the_registry(applied: Path, spec: ViewSpec) -> None:
    store = FeatureStore(repo_path=str(applied))
    view = store.get_stream_feature_view(VIEW)
    source = view.stream_source
    assert isinstance(source, KafkaSource)
    assert source.kafka_options.topic == "payments"
    assert source.kafka_options.kafka_bootstrap_servers == "kafka-1:9092,kafka-2:9092"
    watermark = spec.manifest.window.allowed_lateness
    assert source.kafka_options.watermark_delay_threshold == watermark
    assert isinstance(source.kafka_options.message_format, JsonFormat)
    assert json.loads(source.kafka_options.message_format.schema_json) == {
        "name": "payments", "fields": {"amount": "number", "shop": "category"},
    }  # fmt: skip
    assert source.timestamp_field == "event_timestamp"
    assert source.tags == {"event_time_field": "at"}
    assert view.tags == view_tags(spec)
    assert view.tags["scales"] == "inf,16.0"
    assert view.tags["surprise_columns"].split(",") == list(spec.surprise_columns)
    assert isinstance(view.batch_source, FileSource)
    assert view.batch_source.path == f"data/log/{VIEW}"
    assert view.batch_source.tags == {"join_key": "customer_id"}
    assert (view.ttl, view.online, view.join_keys) == (timedelta(0), True, ["customer_id"])
    assert store.get_entity("customer").join_key == "customer_id"
    service = store.get_feature_service("customer_llm4es")
    assert [each.name for each in service.feature_view_projections] == [VIEW]
    assert service.tags == {"bundle_id": BUNDLE_ID}


def test_the_sink_takes_topic_and_brokers_from_the_registry(applied: Path, spec: ViewSpec) -> None:
    sink = open_sink(applied, spec, writer_id="w")
    assert (sink.topic, sink.bootstrap_servers) == ("payments", "kafka-1:9092,kafka-2:9092")
    sink.close()


def test_feast_apply_once_more_changes_nothing_and_keeps_the_rows(
    applied: Path, bundle: Path, spec: ViewSpec
) -> None:
    before = registered(applied)
    done = feast(applied, "apply", LLM4ES_BUNDLE=str(bundle), **ENV)
    assert done.returncode == 0, done.stderr
    assert registered(applied) == before
    assert {kind: len(found) for kind, found in before.items()} == {
        "entities": 1,
        "data sources": 2,
        "stream feature views": 1,
        "feature views": 0,
        "feature services": 1,
    }
    sink = open_sink(applied, spec, writer_id="w")
    (found,) = sink.read(["c1"])
    sink.close()
    assert found is not None
    assert found.last_event_id == "known"


@pytest.fixture(scope="module")
def servers(applied: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Feast's UI and feature server over the repository: by name, where they answer."""
    probes = {"ui": "/", "serve": "/health"}

    def start(name: str) -> tuple[ServerProcess, int]:
        log = tmp_path_factory.mktemp(name) / f"{name}.log"
        process = ServerProcess(f"feast {name}", log=log)
        port = on_a_free_port(
            lambda port: process.start(
                [
                    "/usr/bin/env", f"PYTHONPATH={ROOT}", feast_command(), "-c", str(applied),
                    name, "--host", LOOPBACK, "--port", str(port),
                ],
                lambda: answers(f"http://{LOOPBACK}:{port}{probes[name]}"),
                120,
            )
        )  # fmt: skip
        stack.callback(process.stop)
        return process, port

    with ExitStack() as stack:
        with ThreadPoolExecutor() as pool:  # each takes its time to load Feast
            started = dict(zip(probes, pool.map(start, probes), strict=True))
        yield {name: f"http://{LOOPBACK}:{port}" for name, (_, port) in started.items()}
    for process, port in started.values():
        assert not process.running
        assert is_free(port)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - our own server
            return bool(response.status == 200)
    except OSError:
        return False


def ask(url: str, body: object = None) -> Any:  # noqa: ANN401 - JSON
    request = urllib.request.Request(  # noqa: S310 - our own server
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        return json.load(response)


def test_the_feature_server_serves_our_rows(servers: dict[str, str], spec: ViewSpec) -> None:
    found = ask(
        f"{servers['serve']}/get-online-features",
        {"feature_service": "customer_llm4es", "entities": {"customer_id": ["c1", "nobody"]}},
    )
    values = {
        name: result["values"]
        for name, result in zip(found["metadata"]["feature_names"], found["results"], strict=True)
    }
    assert values["last_event_id"] == ["known", None]
    assert values["bundle_id"][0] == BUNDLE_ID
    assert values["embedding"][0] == [float(each) for each in row(spec).embedding]


def test_the_ui_shows_view_source_and_service(servers: dict[str, str]) -> None:
    def names(kind: str) -> set[str]:
        found = ask(f"{servers['ui']}/api/v1/{kind}?project=llm4es")
        (listed,) = (value for value in found.values() if isinstance(value, list))
        return {each.get("spec", each).get("name", each.get("name")) for each in listed}

    assert names("feature_views") == {VIEW}
    assert names("feature_services") == {"customer_llm4es"}
    assert {f"{VIEW}_events", f"{VIEW}_offline_log"} <= names("data_sources")
    assert "customer" in names("entities")


def test_two_bundles_views_live_side_by_side_and_the_service_follows_the_last(
    tmp_path: Path, spec: ViewSpec
) -> None:
    repo = make_repo(tmp_path / "repo")
    other = make_spec(tmp_path / "other", bundle_id=OTHER_ID, dim=4)
    apply(repo, spec)
    old = open_sink(repo, spec, writer_id="old")
    old.publish([row(spec, last_event_id="old")])
    store = apply(repo, other)
    new = open_sink(repo, other, writer_id="new")
    new.publish([row(other, last_event_id="new")])
    old.publish([row(spec, "c2", last_event_id="old, too")])
    assert [each and each.last_event_id for each in old.read(["c1", "c2"])] == ["old", "old, too"]
    assert [each and each.last_event_id for each in new.read(["c1", "c2"])] == ["new", None]
    service = store.get_feature_service("customer_llm4es")
    assert [each.name for each in service.feature_view_projections] == [
        view_name("customer", OTHER_ID)
    ]
    old.close()
    new.close()


def event_ids(store: FeatureStore, entity_ids: list[str]) -> list[str | None]:
    """What a reader of the stable service sees."""
    found: list[str | None] = store.get_online_features(
        features=store.get_feature_service("customer_llm4es"),
        entity_rows=[{"customer_id": each} for each in entity_ids],
    ).to_dict()["last_event_id"]
    return found


def publish(repo: Path, spec: ViewSpec, *entity_ids: str, last_event_id: str) -> None:
    sink = open_sink(repo, spec, writer_id="w")
    sink.publish([row(spec, each, last_event_id=last_event_id) for each in entity_ids])
    sink.close()


def test_feast_apply_of_a_list_of_bundles_keeps_the_rows_of_each(
    tmp_path: Path, spec: ViewSpec, bundle: Path
) -> None:
    repo = make_repo(tmp_path / "repo")
    apply(repo, spec)
    publish(repo, spec, "c1", last_event_id="old")
    new = make_spec(tmp_path / "new", bundle_id=OTHER_ID)
    terminal = make_spec(tmp_path / "terminal", bundle_id="111111111111", entity="terminal")
    done = feast(
        repo,
        "apply",
        LLM4ES_BUNDLES=f"{bundle}, {tmp_path / 'new'},{tmp_path / 'terminal'}",
        LLM4ES_TOPICS="terminal=payments.by-terminal",
        LLM4ES_SERVING=f"customer={OTHER_ID}",
        LLM4ES_TTL_S="3600",
        LLM4ES_TOPIC="payments",
    )
    assert done.returncode == 0, done.stderr
    store = FeatureStore(repo_path=str(repo))
    assert {entity.name for entity in store.list_entities()} == {"customer", "terminal"}
    assert served_view(store, "customer").name == view_name("customer", OTHER_ID)
    assert served_view(store, "terminal").ttl == timedelta(hours=1)
    for each, topic in ((spec, "payments"), (new, "payments"), (terminal, "payments.by-terminal")):
        sink = open_sink(repo, each, writer_id="w")
        assert (sink.topic, *sink.value_format) == (topic, "json", None)
        expected = ["old"] if each is spec else [None]
        assert [row and row.last_event_id for row in sink.read(["c1"])] == expected
        sink.close()


def test_what_cannot_be_defined_is_refused_naming_the_setting(
    tmp_path: Path, spec: ViewSpec
) -> None:
    def define_these(specs: list[ViewSpec], **given: Any) -> None:  # noqa: ANN401
        options = {"topics": {"customer": "t"}, "bootstrap_servers": "b:1", "offline_path": "o"}
        define_all(specs, **{**options, **given})

    for field, specs, given in (
        ("bundles", [spec, spec], {}),
        ("serving", [spec], {"serving": {"customer": OTHER_ID}}),
        ("topics", [make_spec(tmp_path, entity="terminal")], {}),
    ):
        with pytest.raises(ConfigError) as refused:
            define_these(specs, **given)
        assert refused.value.field == field
    with pytest.raises(ConfigError, match="customer is no ENTITY=VALUE") as refused:
        read_pairs("LLM4ES_SERVING", "terminal=1,customer")
    assert refused.value.field == "LLM4ES_SERVING"


REGISTRIES = {
    "file": "data/registry.db",
    "sql": "{registry_type: sql, path: 'sqlite:///REPO/registry.sqlite', cache_ttl_seconds: 1}",
}


# What Feast says to a reader that fetched the service before the switch, and reads after it.
@pytest.mark.filterwarnings("ignore:The FeatureService object that has been passed:UserWarning")
@pytest.mark.parametrize("kind", REGISTRIES)
def test_readers_see_the_old_bundle_until_the_switch_and_the_new_one_after_it(
    tmp_path: Path, spec: ViewSpec, kind: str
) -> None:
    folder = tmp_path / "repo"
    repo = make_repo(folder, registry=REGISTRIES[kind].replace("REPO", str(folder)))
    other = make_spec(tmp_path / "other", bundle_id=OTHER_ID)
    apply(repo, other)
    store = apply(repo, spec)  # the last one applied serves
    publish(repo, spec, "c1", "c2", last_event_id="old")
    publish(repo, other, "c1", "c2", last_event_id="new")
    seen: list[list[str | None]] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            # Stock Feast takes names from the registry and views from the service it is handed:
            # over a switch it raises, and answers when it is asked again.
            with suppress(FeatureViewNotFoundException):
                seen.append(event_ids(FeatureStore(repo_path=str(repo)), ["c1", "c2"]))

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        try:
            for number in range(12):
                bundle_id = (OTHER_ID, BUNDLE_ID)[number % 2]
                assert switch_service(store, "customer", bundle_id) != bundle_id
                assert switch_service(store, "customer", bundle_id) == bundle_id  # again: nothing
        finally:
            done.set()
        reader.result()
    assert seen
    assert {tuple(each) for each in seen} <= {("old", "old"), ("new", "new")}
    assert event_ids(FeatureStore(repo_path=str(repo)), ["c1"]) == ["old"]
    assert not list(repo.glob("data/.registry*"))
    with pytest.raises(ConfigError, match="no view customer_llm4es_222222222222"):
        switch_service(store, "customer", "222222222222")


@pytest.mark.parametrize("online", ["sqlite", "redis"])
def test_dropping_a_view_takes_its_rows_and_leaves_the_other_whole(
    tmp_path: Path, spec: ViewSpec, online: str, request: pytest.FixtureRequest
) -> None:
    redis = request.getfixturevalue("redis_server") if online == "redis" else None
    project_rows = [f"{tmp_path.name}-{n}" for n in range(3)]
    repo = make_repo(tmp_path / "repo", redis_url=redis and redis.address)
    other = make_spec(tmp_path / "other", bundle_id=OTHER_ID)
    apply(repo, spec)
    store = apply(repo, other)
    publish(repo, spec, *project_rows, last_event_id="old")
    publish(repo, other, *project_rows, last_event_id="new")
    with pytest.raises(ConfigError, match="still points to"):
        drop_view(store, "customer", OTHER_ID)
    assert drop_view(store, "customer", BUNDLE_ID)
    assert not drop_view(store, "customer", BUNDLE_ID)  # again: nothing
    fresh = FeatureStore(repo_path=str(repo))
    assert event_ids(fresh, project_rows) == ["new"] * 3
    assert [view.name for view in fresh.list_stream_feature_views()] == [
        view_name("customer", OTHER_ID)
    ]
    assert {source.name.split("_")[2] for source in fresh.list_data_sources()} == {OTHER_ID}
    apply(repo, spec)  # its rows are gone, not hidden
    sink = open_sink(repo, spec, writer_id="w")
    assert sink.read(project_rows) == [None] * 3
    sink.close()


def test_a_source_that_tells_of_other_events_is_refused(tmp_path: Path, spec: ViewSpec) -> None:
    repo = make_repo(tmp_path / "repo")
    store = apply(repo, spec)
    view: Any = store.get_stream_feature_view(VIEW)
    source = view.stream_source
    told, tags = source.kafka_options.message_format, source.tags
    other = JsonFormat("{}")
    for problem, format_, tagged in (
        ("event time from 'elsewhere'", told, {"event_time_field": "elsewhere"}),
        ("other fields", other, tags),
    ):
        source.tags, source.kafka_options.message_format = tagged, format_
        store.apply([store.get_entity("customer"), source, view])
        with pytest.raises(BundleMismatch, match=problem) as refused:
            open_sink(repo, spec, writer_id="w")
        assert "apply" in refused.value.remedy


def test_a_plain_view_on_a_push_source_is_accepted_and_has_no_topic(
    tmp_path: Path, spec: ViewSpec
) -> None:
    repo = make_repo(tmp_path / "repo")
    made = define(spec, topic="t", bootstrap_servers="b:1", offline_path="data/log")
    view = FeatureView(
        name=VIEW,
        entities=[made.entity],
        schema=made.view.schema,
        source=PushSource(name="push", batch_source=made.view.batch_source),
        tags=view_tags(spec),
    )
    FeatureStore(repo_path=str(repo)).apply([made.entity, view])
    sink = open_sink(repo, spec, writer_id="w")
    sink.publish([row(spec, last_event_id="there")])
    (found,) = sink.read(["c1"])
    assert found is not None
    assert found.last_event_id == "there"
    with pytest.raises(ConfigError, match="KafkaSource") as refused:
        _ = sink.topic
    assert refused.value.field == "topic"
    sink.close()


def test_a_view_that_is_another_bundles_is_refused_with_its_exit_code(
    tmp_path: Path, spec: ViewSpec
) -> None:
    repo = make_repo(tmp_path / "repo")
    apply(repo, spec)
    for problem, other in {
        "has dim '8', the bundle '16'": make_spec(tmp_path / "wide", dim=16),
        "has surprise_columns": make_spec(tmp_path / "mute", surprise=False),
        "has rendering_sha256": replace(
            spec, manifest=spec.manifest.model_copy(update={"rendering_sha256": "f" * 64})
        ),
    }.items():
        with pytest.raises(BundleMismatch, match=re.escape(problem)) as refused:
            open_sink(repo, other, writer_id="w")
        assert refused.value.exit_code == 3
        assert "apply" in refused.value.remedy


def test_a_view_that_is_missing_is_refused_with_the_command_that_makes_it(
    tmp_path: Path, spec: ViewSpec
) -> None:
    repo = make_repo(tmp_path / "repo")
    for prepare in (lambda: None, lambda: apply(repo, make_spec(tmp_path, bundle_id=OTHER_ID))):
        prepare()  # no registry at all, then one of another bundle
        with pytest.raises(ConfigError, match=f"no feature view {VIEW}") as refused:
            open_sink(repo, spec, writer_id="w")
        assert refused.value.exit_code == 2
        assert f"feast -c {repo} " in refused.value.remedy
        assert refused.value.remedy.endswith(" apply")


def test_an_online_store_without_the_views_table_is_refused_with_the_command_that_makes_it(
    tmp_path: Path, spec: ViewSpec
) -> None:
    repo = make_repo(tmp_path / "repo")
    apply(repo, spec)
    (repo / "data/online.db").unlink()
    with pytest.raises(ConfigError, match="no table") as refused:
        open_sink(repo, spec, writer_id="w")
    assert refused.value.remedy.endswith(" apply")


def test_a_service_that_precomputes_is_refused(tmp_path: Path, spec: ViewSpec) -> None:
    repo = make_repo(tmp_path / "repo")
    store = apply(repo, spec)
    view = store.get_stream_feature_view(VIEW)
    store.apply(FeatureService(name="eager", features=[view], precompute_online=True))
    with pytest.raises(ConfigError, match="precompute_online") as refused:
        open_sink(repo, spec, writer_id="w")
    assert refused.value.field == "feature service eager"


def test_feasts_default_offline_store_is_warned_of(
    tmp_path: Path, spec: ViewSpec, caplog: pytest.LogCaptureFixture
) -> None:
    repo = make_repo(tmp_path / "repo")
    file = repo / "feature_store.yaml"
    file.write_text(file.read_text().replace("llm4es.feast.offline_log.LogOfflineStore", "dask"))
    apply(repo, spec)
    with caplog.at_level(logging.WARNING):
        open_sink(repo, spec, writer_id="w").close()
    assert "offline_store dask" in caplog.text
    assert "llm4es.feast.offline_log.LogOfflineStore" in caplog.text


def test_a_repository_that_cannot_be_read_is_refused(
    tmp_path: Path, spec: ViewSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"feature_store\.yaml"):
        open_sink(tmp_path / "nowhere", spec, writer_id="w")
    repo = make_repo(tmp_path / "repo")
    (repo / "feature_store.yaml").write_text("project: [")
    with pytest.raises(ConfigError):
        open_sink(repo, spec, writer_id="w")
    production = (ROOT / "feature_repo/feature_store.prod.yaml").read_text()
    (repo / "feature_store.prod.yaml").write_text(production)
    monkeypatch.delenv("LLM4ES_REDIS", raising=False)
    monkeypatch.setenv("LLM4ES_REGISTRY", "data/registry.prod.db")
    with pytest.raises(ConfigError, match="set LLM4ES_REDIS"):
        open_sink(repo, spec, config_file="feature_store.prod.yaml", writer_id="w")
