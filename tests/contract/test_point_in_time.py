"""`get_historical_features` against twenty lines of Python, on ours and on Feast's own stores."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource
from feast.types import Array, Float32, Int64
from feast.value_type import ValueType
from pyarrow import parquet

from llm4es.errors import ConfigError
from llm4es.feast.parts import write_parts
from tests.feast_parts import NOON, make_repo

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DATA_SETS = 20
TTL = timedelta(seconds=30)
OURS = "llm4es.feast.offline_log.LogOfflineStore"
START = int(NOON.timestamp() * 1_000_000)  # microseconds


@dataclass(frozen=True)
class DataSet:
    """Rows of two views, and who asks for what when."""

    customers: list[tuple[str, int, int]]  # id, microseconds, number of the row
    terminals: list[tuple[str, int, int]]
    asked: list[tuple[str, str, int]]  # customer, terminal, nanoseconds


def known(rows: list[tuple[str, int, int]], entity: str, at_ns: int) -> int | None:
    """The reference: number of the newest row that is not in the future and not too old."""
    best: tuple[int, int] | None = None
    for entity_id, moment_us, number in rows:
        too_old = moment_us * 1000 + int(TTL.total_seconds() * 1e9) < at_ns
        if entity_id != entity or moment_us * 1000 > at_ns or too_old:
            continue
        if best is None or moment_us > best[0]:
            best = moment_us, number
    return None if best is None else best[1]


def make(seed: int) -> DataSet:
    """Ties and exact copies, late rows, duplicates, edges of the TTL, strangers, nanoseconds."""
    rng = np.random.default_rng(seed)

    def rows(kind: str) -> list[tuple[str, int, int]]:
        found = []
        for number in range(int(rng.integers(1, 60))):
            entity = f"{kind}{rng.integers(5)}"
            found.append((entity, START + int(rng.integers(-40, 40)) * 1_000_000, number))
        # One row per moment, as the log has it; some stand twice, and all in no order.
        once = list({row[:2]: row for row in found}.values())
        once += [once[int(n)] for n in rng.integers(len(once), size=int(rng.integers(4)))]
        return [once[int(n)] for n in rng.permutation(len(once))]

    customers, terminals = rows("c"), rows("t")
    asked: list[tuple[str, str, int]] = []
    for _ in range(int(rng.integers(1, 80))):
        either = (customers, terminals)[int(rng.integers(2))]
        _, moment, _ = either[int(rng.integers(len(either)))]
        edges = np.array([0, 0, TTL.total_seconds() * 1e9, rng.integers(-(10**11), 10**11)])
        edge = int(rng.choice(edges))
        nanoseconds = int(rng.choice([-1, 0, 1, 999, 1000]))
        asked.append(
            (f"c{rng.integers(7)}", f"t{rng.integers(7)}", moment * 1000 + edge + nanoseconds)
        )
    asked += asked[:3]  # the same entity at the same moment, with another label
    return DataSet(customers, terminals, asked)


class World:
    """A feature store of a kind, with two views whose rows can be replaced."""

    def __init__(self, folder: Path, offline: str) -> None:
        self.ours = offline == OURS
        self.repo = make_repo(folder, offline=offline)
        self.stock = FeatureStore(repo_path=str(self.repo))
        objects: list[Any] = []
        for name in ("customer", "terminal"):
            entity = Entity(name=name, join_keys=[f"{name}_id"], value_type=ValueType.STRING)
            path = f"data/{name}" + ("" if self.ours else ".parquet")
            self.write(name, [])
            source = FileSource(
                name=f"{name}_log", path=str(self.repo / path), timestamp_field="event_timestamp"
            )
            schema = [
                Field(name=f"{name}_number", dtype=Int64),
                Field(name=f"{name}_vector", dtype=Array(Float32)),
            ]
            view = FeatureView(name=name, entities=[entity], schema=schema, source=source, ttl=TTL)
            objects += [entity, source, view]
        self.stock.apply(objects)

    def write(self, name: str, rows: list[tuple[str, int, int]]) -> None:
        """Replace the rows of a view: in three parts, or in the one file that Feast rewrites."""
        table = pa.table(
            {
                f"{name}_id": pa.array([row[0] for row in rows], pa.string()),
                "event_timestamp": pa.array([r[1] for r in rows], pa.timestamp("us", "UTC")),
                f"{name}_number": pa.array([row[2] for row in rows], pa.int64()),
                f"{name}_vector": pa.array([[row[2], 0.5] for row in rows], pa.list_(pa.float32())),
            }
        )
        place = self.repo / "data" / name
        place.parent.mkdir(exist_ok=True)
        if not self.ours:
            parquet.write_table(table, place.with_suffix(".parquet"))
            return
        for part in place.rglob("*.parquet"):
            part.unlink()
        place.mkdir(exist_ok=True)
        parquet.write_table(table.slice(0, 0), place / "part-0-schema.parquet")
        for number in range(3):
            write_parts(place, f"part-{number}", table.take(np.arange(number, len(table), 3)))

    def ask(self, data: DataSet, unit: Literal["ns", "us"] = "ns") -> pd.DataFrame:
        """What a stock client fetches for training."""
        self.write("customer", data.customers)
        self.write("terminal", data.terminals)
        moments = pd.to_datetime(pd.Series([a[2] for a in data.asked]), unit="ns", utc=True)
        entities = pd.DataFrame(
            {
                "customer_id": [asked[0] for asked in data.asked],
                "terminal_id": [asked[1] for asked in data.asked],
                "event_timestamp": moments.dt.as_unit(unit),
                "label": range(len(data.asked)),
            }
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: pd.DataFrame = self.stock.get_historical_features(
                entity_df=entities,
                features=["customer:customer_number", "customer:customer_vector",
                          "terminal:terminal_number"],
            ).to_df()  # fmt: skip
        return found


def differences(data: DataSet, found: pd.DataFrame, unit: str = "ns") -> list[str]:
    """What is wrong with an answer, in words."""
    if len(found) != len(data.asked):
        return [f"{len(data.asked)} rows in, {len(found)} out"]
    if list(found["label"]) != list(range(len(data.asked))):
        return ["another order"]
    problems = []
    for index, (customer, terminal, exact) in enumerate(data.asked):
        at_ns = exact if unit == "ns" else exact // 1000 * 1000
        for name, rows, entity in (
            ("customer", data.customers, customer), ("terminal", data.terminals, terminal),
        ):  # fmt: skip
            due = known(rows, entity, at_ns)
            value = found[f"{name}_number"].iloc[index]
            if (None if pd.isna(value) else int(value)) != due:
                problems.append(f"row {index}: {name} {value}, not {due}")
        vector = found["customer_vector"].iloc[index]
        due = known(data.customers, customer, at_ns)
        if (None if vector is None else list(vector)) != (None if due is None else [due, 0.5]):
            problems.append(f"row {index}: vector {vector}")
    return problems


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    made: dict[str, World] = {}

    def get(offline: str) -> World:
        if offline not in made:
            made[offline] = World(tmp_path_factory.mktemp("repo"), offline)
        return made[offline]

    return get


@pytest.mark.parametrize("seed", range(DATA_SETS))
def test_ours_agrees_with_the_reference_on_every_row(
    worlds: Callable[[str], World], seed: int
) -> None:
    data = make(seed)
    assert differences(data, worlds(OURS).ask(data)) == []


def test_stock_dask_drops_and_collapses_rows(worlds: Callable[[str], World]) -> None:
    """Else the suite above would prove nothing: it must be able to fail."""
    found = [
        differences(data, worlds("dask").ask(data, "us"), "us") for data in map(make, range(4))
    ]
    assert all(any("rows in" in problem for problem in problems) for problems in found)


EDGE_NS = START * 1000 + int(TTL.total_seconds()) * 10**9
DEFECTS: dict[str, tuple[list[int], Literal["ns", "us"], str]] = {
    "drops rows whose matches are all too old": ([EDGE_NS + 10**12], "us", "1 rows in, 0 out"),
    "drops rows of before all matches": ([START * 1000 - 10**9], "us", "1 rows in, 0 out"),
    "collapses rows that are alike": ([START * 1000] * 3, "us", "3 rows in, 1 out"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_stock_dask_has_each_defect_that_ours_has_not(
    worlds: Callable[[str], World], defect: str
) -> None:
    asked, unit, due = DEFECTS[defect]
    data = DataSet(
        customers=[("c0", START, 0)],
        terminals=[("t0", START, 0)],
        asked=[("c0", "t0", moment) for moment in asked],
    )
    assert differences(data, worlds("dask").ask(data, unit), unit) == [due]
    assert differences(data, worlds(OURS).ask(data, unit), unit) == []


def test_stock_duckdb_refuses_nanoseconds_and_is_right_without_them(
    worlds: Callable[[str], World],
) -> None:
    data = make(1)
    with pytest.raises(pa.ArrowInvalid):
        worlds("duckdb").ask(data)
    assert differences(data, worlds("duckdb").ask(data, "us"), "us") in ([], ["another order"])


def test_what_cannot_be_joined_is_refused_naming_the_column(
    worlds: Callable[[str], World],
) -> None:
    world = worlds(OURS)
    world.write("customer", make(1).customers)
    for column, frame in {
        "entity_df": pd.DataFrame({"who": ["c1"], "event_timestamp": [NOON]}),
        "entity_df column customer_id": pd.DataFrame(
            {"customer_id": [1], "event_timestamp": [NOON]}
        ),
        "event_timestamp": pd.DataFrame({"customer_id": ["c1"], "event_timestamp": [pd.NaT]}),
    }.items():
        with pytest.raises((ConfigError, ValueError)) as refused:
            world.stock.get_historical_features(
                entity_df=frame, features=["customer:customer_number"]
            ).to_df()
        if isinstance(refused.value, ConfigError):
            assert refused.value.field == column
    clashing = pd.DataFrame(
        {"customer_id": ["c1"], "event_timestamp": [NOON], "customer_number": 1}
    )
    with pytest.raises(ValueError, match="full_feature_names=True"):
        world.stock.get_historical_features(
            entity_df=clashing, features=["customer:customer_number"]
        )
    found = world.stock.get_historical_features(
        entity_df=clashing, features=["customer:customer_number"], full_feature_names=True
    ).to_df()
    assert set(found.columns) == {*clashing.columns, "customer__customer_number"}


def test_a_fetch_reads_the_parts_that_stand_when_it_is_made(
    worlds: Callable[[str], World],
) -> None:
    world = worlds(OURS)
    world.write("customer", make(2).customers)
    entities = pd.DataFrame({"customer_id": ["c1"], "event_timestamp": [NOON]})
    job = world.stock.get_historical_features(
        entity_df=entities, features=["customer:customer_number"]
    )
    before = job.to_df()
    for part in list((world.repo / "data/customer").rglob("part-[0-9].parquet")):
        part.rename(part.with_name(f"moved-{part.name}"))
    pd.testing.assert_frame_equal(job.to_df(), before)
