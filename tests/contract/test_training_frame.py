"""What a training job gets: every row in order, matrices without a copy, and no future."""

from datetime import timedelta

import numpy as np
import pandas as pd
import pytest
from feast import FeatureStore

from llm4es.errors import ConfigError, Leak
from llm4es.feast import ViewSpec, open_sink, training_frame
from llm4es.feast.offline_log import LogOfflineStore
from llm4es.features import FeatureRow
from tests.feast_parts import DIM, MICROSECOND, NOON, apply, make_repo, make_spec, row

pytestmark = [
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]

MINUTE = timedelta(minutes=1)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ViewSpec]:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "customer": make_spec(folder / "customer"),
        "terminal": make_spec(folder / "terminal", bundle_id="111111111111", entity="terminal"),
    }


def known(spec: ViewSpec, entity_id: str, minute: int) -> FeatureRow:
    """The row of the payment of that minute, known a second after it."""
    moment = NOON + minute * MINUTE + timedelta(seconds=1)
    return row(spec, entity_id, seed=minute, as_of=moment, last_event_id=f"p{minute}")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, specs: dict[str, ViewSpec]) -> FeatureStore:
    """A payment a minute, of c1 at t1."""
    repo = make_repo(tmp_path_factory.mktemp("repo"))
    for spec in specs.values():
        apply(repo, spec)
    for entity, spec in specs.items():
        sink = open_sink(repo, spec, writer_id="w")
        sink.journal([known(spec, f"{entity[0]}1", minute) for minute in range(5)])
        sink.close()
    return FeatureStore(repo_path=str(repo))


def labels(*minutes: int, customer: str = "c1") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "customer_id": customer,
            "terminal_id": "t1",
            "event_timestamp": [NOON + minute * MINUTE for minute in minutes],
            "payment_id": [f"p{minute}" for minute in minutes],
            "fraud": [minute % 2 for minute in minutes],
        },
        index=range(100, 100 + len(minutes)),
    )


def test_a_row_is_joined_before_its_own_event_and_keeps_its_place(
    store: FeatureStore, specs: dict[str, ViewSpec]
) -> None:
    asked = labels(3, 1, 3, 4)
    before = asked.copy()
    found = training_frame(store, asked, entities=["customer", "terminal"], event_id="payment_id")
    pd.testing.assert_frame_equal(asked, before)  # the caller's own
    assert list(found.frame["payment_id"]) == ["p3", "p1", "p3", "p4"]
    for entity, features in found.entities.items():
        assert features.scalars["last_event_id"].to_pylist() == ["p2", "p0", "p2", "p3"]
        assert features.bundle_id == specs[entity].manifest.id
        due = [known(specs[entity], "", minute) for minute in (2, 0, 2, 3)]
        assert features.embedding.tolist() == [each.embedding.tolist() for each in due]
        assert features.surprise.tolist() == [each.surprise.tolist() for each in due]
        assert features.surprise_columns == specs[entity].surprise_columns
        for index, name in enumerate(features.surprise_columns):
            column = found.frame[f"{entity}_{name}"]
            assert list(column) == [float(each.surprise[index]) for each in due]
        assert list(found.frame[f"{entity}_surprise_last"]) == [r.surprise_last for r in due]
        assert list(found.frame[f"{entity}_as_of"]) == [each.as_of for each in due]


def test_the_matrix_is_the_memory_that_was_read(store: FeatureStore) -> None:
    found = training_frame(store, labels(1, 2, 3), entities=["customer"])
    features = found.entities["customer"]
    assert features.embedding.dtype == np.float32
    assert features.embedding.shape == (3, DIM)
    assert not features.embedding.flags.owndata
    assert features.arrow.type.list_size == DIM
    assert features.arrow.flatten().to_numpy().base is not None
    ours = features.embedding.__array_interface__["data"][0]
    assert features.arrow.flatten().buffers()[1].address == ours
    matrix = found.matrix()
    width = DIM + len(features.surprise_columns) + 1
    assert (matrix.data.shape, len(matrix.names)) == ((3, width), width)
    assert matrix.data.dtype == np.float32
    assert matrix.names[0] == "customer_e0"
    assert found.matrix("surprise").names[0] == f"customer_{features.surprise_columns[0]}"


def test_what_was_not_known_is_nan_and_said_so(store: FeatureStore) -> None:
    asked = pd.concat([labels(2), labels(3, customer="stranger"), labels(0)])
    found = training_frame(store, asked, entities=["customer"])
    features = found.entities["customer"]
    assert features.known.tolist() == [True, False, False]
    assert np.isnan(features.embedding[1:]).all()
    assert np.isnan(features.surprise[1:]).all()
    assert not np.isnan(features.embedding[0]).any()
    assert training_frame(store, asked.iloc[:0], entities=["customer"]).frame.empty


def test_an_event_can_be_joined_once_it_is_seen(store: FeatureStore) -> None:
    asked = labels(2, 3)
    asked.loc[101, "payment_id"] = "never-seen"
    found = training_frame(
        store, asked, entities=["customer", "terminal"], join_as="at", event_id="payment_id"
    )
    for features in found.entities.values():
        assert features.scalars["last_event_id"].to_pylist() == ["p2", "p2"]
    own = NOON + 2 * MINUTE + timedelta(seconds=1)
    assert list(found.frame["joined_at"]) == [own, NOON + 3 * MINUTE]
    with pytest.raises(ConfigError, match="event_id"):
        training_frame(store, asked, entities=["customer"], join_as="at")


def test_labels_are_known_after_their_delay(store: FeatureStore) -> None:
    found = training_frame(
        store, labels(1, 2, 3), entities=["customer"], label_delay=timedelta(minutes=10)
    )
    assert found.known_by(NOON + 12 * MINUTE).tolist() == [True, True, False]
    named = labels(1, 2).assign(known=[NOON + 60 * MINUTE, NOON + 3 * MINUTE])
    found = training_frame(store, named, entities=["customer"], label_available_at="known")
    assert found.known_by(NOON + 5 * MINUTE).tolist() == [False, True]


def test_a_row_that_has_seen_the_event_it_must_not_see_is_refused(store: FeatureStore) -> None:
    wrong_zone = labels(1, 2).assign(event_timestamp=[NOON + 61 * MINUTE, NOON + 62 * MINUTE])
    with pytest.raises(Leak, match="2 of 2 rows leak") as refused:
        training_frame(store, wrong_zone, entities=["customer"], event_id="payment_id")
    assert "c1" not in str(refused.value)
    late = labels(2).assign(known=[NOON + 30 * MICROSECOND])  # a label older than the features
    with pytest.raises(Leak, match="after the label"):
        training_frame(store, late, entities=["customer"], label_available_at="known")


def test_it_agrees_with_what_stock_feast_fetches(store: FeatureStore) -> None:
    asked = labels(0, 1, 2, 3, 4, 3)
    found = training_frame(store, asked, entities=["customer", "terminal"])
    services = [store.get_feature_service(f"{each}_llm4es") for each in found.entities]
    refs = [f"{s.feature_view_projections[0].name}:last_event_id" for s in services]
    stock = store.get_historical_features(
        entity_df=asked, features=refs, full_feature_names=True
    ).to_df()
    assert store.config.offline_store.type.endswith(LogOfflineStore.__name__)
    for features, name in zip(found.entities.values(), refs, strict=True):
        column = stock[name.replace(":", "__")]
        due = [None if pd.isna(each) else each for each in column]
        assert features.scalars["last_event_id"].to_pylist() == due


def test_what_does_not_fit_is_refused_naming_it(store: FeatureStore) -> None:
    for field, arguments in {
        "entities": {"entities": []},
        "entity_df": {"entities": ["customer"], "event_id": "nothing"},
        "entity": {"entities": ["shop"]},
    }.items():
        asked = labels(1).assign(shop_id="s1")
        with pytest.raises(ConfigError) as refused:
            training_frame(store, asked, **arguments)  # type: ignore[arg-type]
        assert refused.value.field == field
