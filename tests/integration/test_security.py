"""Kafka and Redis that want to know who we are, and that we check in turn: real ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dev.certificates import Certificates, make_certificates
from dev.servers import KafkaServer, RedisServer
from llm4es.errors import ConfigError, InvalidEvent, SourceUnavailable
from llm4es.feast import open_sink
from llm4es.windows import Window
from stream_worker.dead_letters import KafkaDeadLetters
from stream_worker.ports import DeadLetter
from stream_worker.sources.kafka import KafkaGroup, KafkaRecordSource
from stream_worker.sources.kafka_client import KafkaSettings, admin
from stream_worker.sources.kafka_security import KafkaSecurity
from stream_worker.window_store.redis import RedisWindowStore
from tests.commands import run
from tests.feast_parts import apply, make_repo, make_spec, row
from tests.histories import SCHEMA_YAML
from tests.kafka_topics import make_topics, produce, read_all

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ibis"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]

PASSWORD = "wonder-land-1865"  # noqa: S105 - of a server that lives as long as the test
WRONG = "looking-glass"
LISTENERS = ("SSL", "SASL_PLAINTEXT", "SASL_SSL")
WAYS = [
    ("SSL", None),
    ("SASL_SSL", "PLAIN"),
    ("SASL_SSL", "SCRAM-SHA-512"),
    ("SASL_PLAINTEXT", "SCRAM-SHA-512"),
]


@dataclass(frozen=True)
class Guarded:
    """A Kafka with every kind of listener, and a certificate authority that it does not know."""

    kafka: KafkaServer
    trusted: Certificates
    other: Certificates

    def settings(self, protocol: str, mechanism: str | None = None, **more: Any) -> KafkaSettings:  # noqa: ANN401
        given: dict[str, Any] = {"protocol": protocol, "mechanism": mechanism}
        if mechanism is not None:
            given |= {"username": "alice", "password": PASSWORD}
        if protocol.endswith("SSL"):
            given["ca_file"] = self.trusted.ca
        servers = more.pop("servers", None) or self.kafka.address(protocol)
        security = KafkaSecurity(**{**given, **more})
        return KafkaSettings(
            bootstrap_servers=servers, security=security, bootstrap_timeout_ms=3_000
        )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    trusted, other = make_certificates(folder / "ca"), make_certificates(folder / "other")
    login = "org.apache.kafka.common.security"
    properties = {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(trusted.keystore),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(trusted.ca),
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
    }
    for name in ("sasl_plaintext", "sasl_ssl"):
        properties |= {
            f"listener.name.{name}.plain.sasl.jaas.config": (
                f'{login}.plain.PlainLoginModule required user_alice="{PASSWORD}";'
            ),
            f"listener.name.{name}.scram-sha-512.sasl.jaas.config": (
                f"{login}.scram.ScramLoginModule required;"
            ),
        }
    with KafkaServer(
        folder / "kafka", properties=properties, listeners=LISTENERS, scram={"alice": PASSWORD}
    ) as kafka:
        yield Guarded(kafka, trusted, other)


@pytest.mark.parametrize(("protocol", "mechanism"), WAYS)
def test_records_are_read_and_letters_written_through_every_kind_of_door(
    guarded: Guarded, unique: str, protocol: str, mechanism: str | None
) -> None:
    make_topics(guarded.kafka, unique, partitions=1)
    produce(guarded.kafka, unique, [(b"c1", b"{}")])
    kafka = guarded.settings(protocol, mechanism)
    source = KafkaRecordSource(kafka, unique, KafkaGroup(unique))
    try:
        assert source.describe().spans[0].end == 1
        (record,) = source.sample(1)
    finally:
        source.close()
    letters = KafkaDeadLetters(kafka, f"{unique}.dead-letters", source_topic=unique)
    letters.park([DeadLetter(record, InvalidEvent("value", "a test says so"))])
    letters.close()
    (found,) = read_all(guarded.kafka, f"{unique}.dead-letters", expect=1)
    assert found[2] == b"{}"


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
def test_a_wrong_password_is_refused_by_name_and_not_repeated(
    guarded: Guarded, mechanism: str
) -> None:
    kafka = guarded.settings("SASL_SSL", mechanism, password=WRONG)
    with pytest.raises(ConfigError, match=r"sasl_password: .*LLM4ES_SASL_PASSWORD") as refused:
        KafkaRecordSource(kafka, "any", KafkaGroup("any"))
    assert WRONG not in str(refused.value)
    assert WRONG not in repr(kafka)


def test_an_unknown_authority_and_a_mechanism_that_is_not_offered_are_refused_by_name(
    guarded: Guarded,
) -> None:
    for field, kafka in {
        "ssl_ca_file": guarded.settings("SSL", ca_file=guarded.other.ca),
        "sasl_mechanism": guarded.settings("SASL_SSL", "SCRAM-SHA-256"),
    }.items():
        with pytest.raises(ConfigError) as refused, admin(kafka):
            pass
        assert refused.value.field == field
    for kafka in (  # a broker that is going down looks the same
        guarded.settings("PLAINTEXT", servers=guarded.kafka.address("SSL")),
        guarded.settings("SSL", servers=guarded.kafka.bootstrap_servers),
    ):
        with pytest.raises(SourceUnavailable, match="security_protocol"), admin(kafka):
            pass


def test_a_command_takes_its_password_from_the_environment_and_says_it_nowhere(
    guarded: Guarded, unique: str, tmp_path: Path
) -> None:
    (tmp_path / "schema.yaml").write_text(SCHEMA_YAML)
    for name in (unique, f"{unique}.out"):
        make_topics(guarded.kafka, name)
    command = [
        "stream_worker", "repartition", "--entity", "terminal", "--from", unique,
        "--to", f"{unique}.out", "--schema", str(tmp_path / "schema.yaml"), "--until-end",
        "--bootstrap-servers", guarded.kafka.address("SASL_SSL"), "--verbose",
        "--security-protocol", "SASL_SSL", "--ssl-ca-file", str(guarded.trusted.ca),
        "--sasl-mechanism", "SCRAM-SHA-512", "--sasl-username", "alice",
    ]  # fmt: skip
    done = run(command, env={"LLM4ES_SASL_PASSWORD": PASSWORD})
    assert done.returncode == 0, done.stderr
    assert PASSWORD not in done.stderr + done.stdout
    missing = run(command)
    assert missing.returncode == 2
    assert "sasl_password: is needed by security_protocol SASL_SSL" in missing.stderr


def test_settings_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    unfit: dict[str, dict[str, Any]] = {
        "sasl_password": {"password": "x"},
        "ssl_ca_file": {"ca_file": broken},
        "sasl_username": {"protocol": "SASL_SSL", "mechanism": "PLAIN", "password": "x"},
        "ssl_cert_file": {"protocol": "SSL", "key_file": broken},
    }
    for field, given in unfit.items():
        with pytest.raises(ConfigError) as refused:
            KafkaSecurity(**given)
        assert refused.value.field == field
    for path in (broken, tmp_path / "none.pem"):
        with pytest.raises(ConfigError, match="ssl_ca_file"):
            KafkaSecurity(protocol="SSL", ca_file=path).client_config()
    with pytest.raises(ConfigError, match="ssl_cert_file"):
        KafkaSecurity(protocol="SSL", cert_file=broken, key_file=broken).client_config()


@dataclass(frozen=True)
class GuardedRedis:
    server: RedisServer
    trusted: Certificates
    other: Certificates

    def url(self, password: str = PASSWORD, ca: Path | None = None) -> str:
        return (
            f"rediss://worker:{password}@{self.server.tls_address}/0"
            f"?ssl_ca_certs={ca or self.trusted.ca}"
        )

    def connection_string(self, password: str = PASSWORD, ca: Path | None = None) -> str:
        return (
            f"{self.server.tls_address},ssl=true,ssl_ca_certs={ca or self.trusted.ca},"
            f"username=worker,password={password}"
        )


@pytest.fixture(scope="module")
def guarded_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedRedis]:
    folder = tmp_path_factory.mktemp("guarded-redis")
    trusted, other = make_certificates(folder / "ca"), make_certificates(folder / "other")
    users = {"worker": f"on >{PASSWORD} ~* +@all -@admin"}
    with RedisServer(folder / "redis", certificates=trusted, users=users) as server:
        yield GuardedRedis(server, trusted, other)


def test_windows_are_kept_in_a_redis_with_tls_and_a_user(guarded_redis: GuardedRedis) -> None:
    store = RedisWindowStore(guarded_redis.url(), "b1")
    with store.begin() as txn:
        txn.put(Window(entity_id="c1", next_offset=3))
    found = store.read("c1")
    assert found is not None
    assert found.next_offset == 3
    store.close()


def test_a_redis_that_refuses_us_or_that_we_do_not_trust_is_refused_by_name(
    guarded_redis: GuardedRedis,
) -> None:
    for url, reason in (
        (guarded_redis.url(WRONG), "refuses us"),
        (guarded_redis.url(ca=guarded_redis.other.ca), "vouches for Redis"),
    ):
        with pytest.raises(ConfigError, match=rf"window_store: .*{reason}") as refused:
            RedisWindowStore(url, "b1")
        assert WRONG not in str(refused.value)


def test_online_rows_go_to_a_redis_with_tls_and_a_user(
    guarded_redis: GuardedRedis, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path / "bundle")
    repo = make_repo(tmp_path / "repo", redis_url=guarded_redis.connection_string())
    stock = apply(repo, spec)
    sink = open_sink(repo, spec, writer_id="w")
    sink.publish([row(spec, last_event_id="safe")])
    found = stock.get_online_features(
        features=stock.get_feature_service("customer_llm4es"),
        entity_rows=[{"customer_id": "c1"}],
    ).to_dict()
    assert found["last_event_id"] == ["safe"]
    sink.close()
    for text, reason in (
        (guarded_redis.connection_string(WRONG), "refuses us"),
        (guarded_redis.connection_string(ca=guarded_redis.other.ca), "vouches for Redis"),
    ):
        make_repo(repo, redis_url=text)
        with pytest.raises(ConfigError, match=rf"online_store: .*{reason}") as refused:
            open_sink(repo, spec, writer_id="w")
        assert WRONG not in str(refused.value)
