"""A schema that is wrong refuses to load, and says which key."""

import pytest

from llm4es.errors import ConfigError
from llm4es.schema import load_schema
from tests.histories import SCHEMA_YAML


@pytest.mark.parametrize(
    ("old", "new", "field", "problem"),
    [
        ("kind: number", "kind: colour", "types.payment.fields.amount", "colour"),
        (
            "decimals: 2",
            "decimal: 2",
            "types.payment.fields.amount.number.decimal",
            "not permitted",
        ),
        ("type_field: kind", "", "document", "type_field"),
        ("format: iso8601", "format: rfc", "event_time.format", "iso8601"),
        ("name: shop", "name: Shop!", "name", "pattern"),
        ("customer:", "Customer:", "document", "lower-case"),
        ("decimals: 2", "buckets: [3, 1]", "types.payment.fields.amount.number", "rise"),
    ],
)
def test_each_mistake_names_its_key(old: str, new: str, field: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_schema(SCHEMA_YAML.replace(old, new))
    assert field in caught.value.field
    assert problem in caught.value.problem
    assert caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", ""])
def test_what_is_no_schema_at_all_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        load_schema(text)


def test_the_hash_sees_meaning_not_spelling() -> None:
    spelt = load_schema(
        "# a comment\n" + SCHEMA_YAML.replace("{field: at, format: iso8601}", "\n  field: at")
    )
    assert spelt.sha256 == load_schema(SCHEMA_YAML).sha256
    assert load_schema(SCHEMA_YAML.replace("decimals: 2", "decimals: 1")).sha256 != spelt.sha256


def test_an_unknown_entity_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="customer, terminal"):
        load_schema(SCHEMA_YAML).entity("merchant")
