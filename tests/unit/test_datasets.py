"""Official files, written small in their own formats, become events, a schema and labels."""

import gzip
import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from export.datasets.cards import ROSBANK
from export.datasets.handbook import HANDBOOK
from export.datasets.movielens import MOVIELENS_100K
from export.datasets.registry import ADAPTERS, prepare, prepare_any
from export.datasets.sources import Prepared, unpacked
from export.logs import LogCounts, iterate_histories
from llm4es.errors import ConfigError
from llm4es.events import Event
from llm4es.schema import EventSchema, load_schema
from tests.commands import ROOT, run

SHARED = ROOT.parent / "shared" / "data"


def rosbank(folder: Path) -> None:
    header = "PERIOD,cl_id,MCC,channel_type,currency,TRDATETIME,amount,trx_category"
    train = [f"{header},target_flag,target_sum"]
    for client in range(20):
        for day in (21, 12):
            paid = f"{day}OCT17:00:00:00,{day * 100.5},POS"
            train.append(f"01/10/2017,{client},5200,type1,810,{paid},{client % 2},9.0")
    (folder / "train.csv").write_text("\n".join(train))
    test = [header, "01/04/2017,900,6011,,810,30DEC17:23:59:59,5000.0,WD_ATM_ROS"]
    (folder / "test.csv.gz").write_bytes(gzip.compress("\n".join(test).encode()))


def sberbank_gender(folder: Path) -> None:
    log = ["customer_id,tr_datetime,mcc_code,tr_type,amount,term_id"]
    target = ["customer_id,gender"]
    for customer in range(20):
        log.append(f"{customer},0 10:23:60,4814,1030,-2245.92,")
        log.append(f"{customer},6 07:08:31,6011,7010,56147.89,T{customer}")
        target.append(f"{customer},{customer % 2}.0")
    (folder / "transactions.csv").write_text("\n".join([*log, "77,1 00:00:00,4814,1030,-1.0,"]))
    (folder / "gender_train.csv").write_text("\n".join(target))
    (folder / "tr_mcc_codes.csv").write_text(
        'mcc_code;mcc_description\n4814;"Звонки, домой"\n6011;"Cash: machine"\n',
        encoding="utf-8",
    )
    (folder / "tr_types.csv").write_text("tr_type;tr_description\n1030;Payment\n7010;Deposit\n")


def sberbank_age(folder: Path) -> None:
    log = ["client_id,trans_date,small_group,amount_rur"]
    target = ["client_id,bins"]
    for client in range(20):
        log += [f"{client},{day},{group},{71.463}" for day, group in ((6, 4), (6, 35), (3, 11))]
        target.append(f"{client},{client % 4}")
    (folder / "transactions_train.csv").write_text("\n".join(log))
    (folder / "train_target.csv").write_text("\n".join(target))
    (folder / "small_group_description.csv").write_text(
        "small_group_code,small_group\n4,Grocery\n35,Fast food\n11,Transport\n"
    )


def datafusion(folder: Path) -> None:
    log = ["user_id,mcc_code,currency_rk,transaction_amt,transaction_dttm"]
    log += [f"{user},5411,1,-{user}.5,2023-01-0{1 + user % 5} 09:00:01" for user in range(20)]
    (folder / "transactions.csv").write_text("\n".join(log))
    users = [f"{user},{user % 2},0" for user in range(20)]
    (folder / "train.csv").write_text("\n".join(["user_id,target,time", *users]))
    clients = [f"{user},{user % 2 + 1},a,b,30" for user in range(20)]
    header = "user_id,report,employee_count_nm,bankemplstatus,customer_age"
    (folder / "clients.csv").write_text("\n".join([header, *clients]))
    (folder / "report_dates.csv").write_text(
        "report,report_dt\n1,2023-02-01 00:00:00\n2,2023-03-01 00:00:00\n"
    )


def movielens_100k(folder: Path) -> None:
    inner = folder / "ml-100k"
    inner.mkdir()
    ratings = [
        f"{user}\t{item}\t{1 + (user + item) % 5}\t{881250949 + 60 * user + item // 2}"
        for user in range(1, 21)
        for item in (1, 2, 3)
    ]
    (inner / "u.data").write_text("\n".join(ratings) + "\n")
    genres = ("unknown", "Action", "Children's")
    (inner / "u.genre").write_text("".join(f"{g}|{n}\n" for n, g in enumerate(genres)) + "\n")
    (inner / "u.item").write_text(
        "1|Empire Strikes Back, The (1980)|01-Jan-1980||http://x|0|1|1\n"
        '2|"Misérables", Les (1995)|01-Jan-1995||http://y|0|1|0\n'
        "3|unknown||||1|0|0\n",
        encoding="latin-1",
    )
    users = [f"{u}|{24 + u}|{'MF'[u % 2]}|technician|85711" for u in range(1, 21)]
    (inner / "u.user").write_text("\n".join(users) + "\n")


def movielens_1m(folder: Path) -> None:
    ratings = [f"{u}::{i}::5::{978300760 + i}" for u in range(1, 21) for i in (1193, 661)]
    (folder / "ratings.dat").write_text("\n".join(ratings) + "\n")
    (folder / "movies.dat").write_text(
        "661::James and the Giant Peach (1996)::Animation|Children's|Musical\n"
        "1193::One Flew Over the Cuckoo's Nest (1975)::Drama\n",
        encoding="latin-1",
    )
    users = [f"{u}::{'MF'[u % 2]}::{(25, 45)[u % 2]}::10::48067" for u in range(1, 21)]
    (folder / "users.dat").write_text("\n".join(users) + "\n")


def physionet(folder: Path) -> None:
    (folder / "set-a").mkdir()
    outcomes = ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
    for stay in range(132539, 132559):
        (folder / "set-a" / f"{stay}.txt").write_text(
            f"Time,Parameter,Value\n00:00,RecordID,{stay}\n00:00,Age,54\n00:00,Gender,0\n"
            "00:00,Height,-1\n00:00,ICUType,4\n00:00,Weight,80.6\n"
            "00:07,GCS,15\n00:07,HR,73\n47:37,Temp,36.5\n47:37,Weight,81\n"
        )
        outcomes.append(f"{stay},6,1,5,-1,{stay % 2}")
    (folder / "Outcomes-a.txt").write_text("\n".join(outcomes))


def handbook_day(day: int) -> pd.DataFrame:
    customers = list(range(20))
    start = datetime(2018, 7, 1) + timedelta(days=day)  # noqa: DTZ001 - as in the official files
    return pd.DataFrame(
        {
            "TRANSACTION_ID": [day * 100 + c for c in customers],
            "TX_DATETIME": [start + timedelta(hours=1, seconds=c) for c in customers],
            "CUSTOMER_ID": [str(c) for c in customers],
            "TERMINAL_ID": [str(c % 3) for c in customers],
            "TX_AMOUNT": [10.0 + c for c in customers],
            "TX_TIME_SECONDS": [str(c) for c in customers],
            "TX_TIME_DAYS": [str(day) for _ in customers],
            "TX_FRAUD": [int(c == 7 and day == 2) for c in customers],
            "TX_FRAUD_SCENARIO": [3 * int(c == 7 and day == 2) for c in customers],
        }
    )


def handbook(folder: Path) -> None:
    (folder / "data").mkdir()
    for day in range(30):
        frame = handbook_day(day)
        frame.to_pickle(folder / "data" / f"{frame.TX_DATETIME[0]:%Y-%m-%d}.pkl", protocol=4)


OFFICIAL: Mapping[str, Callable[[Path], None]] = {
    "rosbank": rosbank,
    "sberbank-gender": sberbank_gender,
    "sberbank-age": sberbank_age,
    "datafusion": datafusion,
    "movielens-100k": movielens_100k,
    "movielens-1m": movielens_1m,
    "physionet-2012": physionet,
    "fraud-handbook": handbook,
}


def made(name: str, tmp_path: Path) -> Prepared:
    taken = tmp_path / "official"
    taken.mkdir()
    OFFICIAL[name](taken)
    return prepare(name, taken, tmp_path / "out")


def schema_of(prepared: Prepared) -> EventSchema:
    return load_schema(prepared.folder / "schema.yaml")


def histories(prepared: Prepared, entity: str) -> dict[str, tuple[Event, ...]]:
    counts = LogCounts()
    log = prepared.folder / "events.parquet"
    found = dict(iterate_histories(log, schema_of(prepared), entity=entity, counts=counts))
    assert counts.invalid == counts.duplicates == counts.without_entity == 0
    assert counts.events == prepared.events
    return found


def labels(prepared: Prepared, file: str = "labels.parquet") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(prepared.folder / file).to_pylist()
    assert len(rows) == prepared.labels[file]
    return rows


def test_there_is_a_test_for_each_adapter() -> None:
    assert set(OFFICIAL) == set(ADAPTERS)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_record_is_an_event_and_every_label_has_a_history(name: str, tmp_path: Path) -> None:
    prepared = made(name, tmp_path)
    schema = schema_of(prepared)
    table = pq.read_table(prepared.folder / "events.parquet")
    times = table.column(schema.event_time.field).to_pylist()
    assert times == sorted(times)
    assert times[0].utcoffset() == timedelta(0)
    for entity in schema.entities:
        assert histories(prepared, entity)
    tasks = yaml.safe_load((prepared.folder / "tasks.yaml").read_text())["tasks"]
    assert tasks
    for task in tasks:
        known = histories(prepared, task["entity"])
        key = schema.entities[task["entity"]].field
        rows = labels(prepared, task["file"])
        assert {row[task["label"]] for row in rows} >= {0, 1}
        for row in rows:
            history = known[row[key]]
            assert task["split"] in row
            assert any(event.occurred_at <= row["event_timestamp"] for event in history)
    about = (prepared.folder / "source.md").read_text(encoding="utf-8")
    source, _ = ADAPTERS[name]
    for said in (source.home, source.licence, source.citation, f"{prepared.events:,} events"):
        assert said in about


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_same_files_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    first = made(name, tmp_path)
    again = prepare(name, tmp_path / "official", tmp_path / "again")
    for file in sorted(first.folder.iterdir()):
        assert file.read_bytes() == (again.folder / file.name).read_bytes()


@pytest.mark.parametrize("name", OFFICIAL)
def test_missing_files_are_refused_with_where_they_are_and_where_they_go(
    name: str, tmp_path: Path
) -> None:
    source, _ = ADAPTERS[name]
    with pytest.raises(ConfigError) as refused:
        prepare(name, tmp_path, tmp_path / "out")
    assert source.home in str(refused.value)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("rosbank", "train.csv", "cl_id,amount\n1,2\n"),
        ("rosbank", "train.csv", "cl_id,MCC,channel_type,currency,TRDATETIME,amount,trx_category,target_flag\n1,2,a,810,yesterday,3,POS,1\n"),  # noqa: E501 - a line of a file
        ("sberbank-gender", "tr_types.csv", "code;what\n1;2\n"),
        ("sberbank-age", "train_target.csv", "client_id\n1\n"),
        ("movielens-100k", "ml-100k/u.item", "1|Film (1980)|||x|0|1\n"),
        ("fraud-handbook", "data/2018-07-01.pkl", "no pickle"),
    ],
)  # fmt: skip
def test_files_of_another_shape_are_refused(
    name: str, file: str, content: str, tmp_path: Path
) -> None:
    OFFICIAL[name](tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match="from:"):
        prepare(name, tmp_path, tmp_path / "out")


def test_rosbanks_own_times_and_words_and_only_training_clients_have_labels(tmp_path: Path) -> None:
    prepared = made("rosbank", tmp_path)
    known = histories(prepared, "client")
    first, second = known["3"]
    assert first.occurred_at == datetime(2017, 10, 12, tzinfo=UTC)
    assert second.fields["amount"] == 2110.5
    (cash,) = known["900"]
    assert cash.occurred_at == datetime(2017, 12, 30, 23, 59, 59, tzinfo=UTC)
    assert cash.fields["channel_type"] is None
    rows = labels(prepared)
    assert {row["client_id"] for row in rows} == {str(client) for client in range(20)}
    assert all(row["label"] == int(row["client_id"]) % 2 for row in rows)
    assert rows[0]["event_timestamp"] == datetime(2017, 10, 21, 0, 0, 1, tzinfo=UTC)


def test_folds_are_stratified(tmp_path: Path) -> None:
    rows = labels(made("rosbank", tmp_path))
    for fold in range(5):
        assert sorted(row["label"] for row in rows if row["fold"] == fold) == [0, 0, 1, 1]


def test_genders_second_60_and_code_books(tmp_path: Path) -> None:
    prepared = made("sberbank-gender", tmp_path)
    first, second = histories(prepared, "customer")["4"]
    assert first.occurred_at == datetime(2014, 8, 1, 10, 24, tzinfo=UTC)
    assert second.occurred_at == datetime(2014, 8, 7, 7, 8, 31, tzinfo=UTC)
    fields = schema_of(prepared).types["transaction"].fields
    assert fields["mcc"].model_dump()["names"]["4814"] == "Звонки, домой"
    assert fields["tr_type"].model_dump()["names"] == {"1030": "Payment", "7010": "Deposit"}
    assert "term_id" not in first.fields
    assert "77" not in {row["customer_id"] for row in labels(prepared)}


def test_ages_order_within_a_day_is_the_files(tmp_path: Path) -> None:
    history = histories(made("sberbank-age", tmp_path), "client")["5"]
    assert [event.fields["small_group"] for event in history] == ["11", "4", "35"]


def test_datafusions_label_time_is_the_report_and_2022_has_none(tmp_path: Path) -> None:
    prepared = made("datafusion", tmp_path)
    times = {row["user_id"]: row["event_timestamp"] for row in labels(prepared)}
    assert times["1"] == datetime(2023, 3, 1, tzinfo=UTC)
    for file in ("train.csv", "clients.csv", "report_dates.csv"):
        (tmp_path / "official" / file).unlink()
    (tmp_path / "official" / "train.csv").write_text("bank,rtk\na,b\n")
    again = prepare("datafusion", tmp_path / "official", tmp_path / "2022")
    assert again.labels == {}
    assert again.events == prepared.events


def test_movielens_titles_years_and_genres(tmp_path: Path) -> None:
    prepared = made("movielens-100k", tmp_path)
    history = {
        str(event.fields["title"]): event.fields for event in histories(prepared, "user")["5"]
    }
    assert history["Empire Strikes Back, The"]["release_year"] == 1980
    assert history["Empire Strikes Back, The"]["genres"] == ("Action", "Children's")
    assert '"Misérables", Les' in history
    assert history["unknown"]["release_year"] is None
    columns = set(pq.read_table(prepared.folder / "events.parquet").column_names)
    assert not columns & {"age", "gender", "occupation", "zip"}
    rows = {row["user_id"]: row for row in labels(prepared)}
    assert (rows["5"]["label"], rows["5"]["label_age_ge_30"]) == (1, 0)
    assert (rows["6"]["label"], rows["6"]["label_age_ge_30"]) == (0, 1)


def test_stays_have_an_admission_and_measurements_of_their_own_types(tmp_path: Path) -> None:
    prepared = made("physionet-2012", tmp_path)
    admission, *rest = histories(prepared, "stay")["132540"]
    assert admission.type == "admission"
    assert dict(admission.fields) == {
        "age": 54.0, "gender": "0", "height": None, "icu_type": "4", "weight": 80.6,
    }  # fmt: skip
    assert [(event.type, event.fields["value"]) for event in rest] == [
        ("GCS", 15.0), ("HR", 73.0), ("Temp", 36.5), ("Weight", 81.0),
    ]  # fmt: skip
    assert rest[-1].occurred_at == datetime(2012, 1, 2, 23, 37, tzinfo=UTC)


def test_handbooks_frauds_are_in_labels_alone_and_both_entities_have_histories(
    tmp_path: Path,
) -> None:
    prepared = made("fraud-handbook", tmp_path)
    columns = pq.read_table(prepared.folder / "events.parquet").column_names
    assert set(columns) == {
        "customer_id", "terminal_id", "transaction_id", "occurred_at", "amount",
    }  # fmt: skip
    assert {"amount"} == {
        name.lower() for kind in schema_of(prepared).types.values() for name in kind.fields
    }
    assert len(histories(prepared, "terminal")) == 3
    frauds = [row for row in labels(prepared, "labels_tx.parquet") if row["label"]]
    assert [(row["customer_id"], row["transaction_id"]) for row in frauds] == [("7", "207")]
    assert frauds[0]["label_available_at"] == datetime(2018, 7, 11, tzinfo=UTC)
    assert frauds[0]["split"] == "train"
    assert frauds[0]["lite"]
    rows = labels(prepared, "labels_account.parquet")
    positive = [row for row in rows if row["label"]]
    assert [(row["customer_id"], row["event_timestamp"]) for row in positive] == [
        ("7", datetime(2018, 7, 8, tzinfo=UTC))
    ]
    assert {row["n_tx_7d"] for row in rows} >= {7}
    assert len({(row["customer_id"], row["fold"]) for row in rows}) == 20


def test_a_terminals_history_has_its_frauds_from_when_they_are_known(tmp_path: Path) -> None:
    prepared = made("fraud-handbook", tmp_path)
    schema = load_schema(prepared.folder / "schema_terminal.yaml")
    log = prepared.folder / "events_terminal.parquet"
    found = dict(iterate_histories(log, schema, entity="terminal", counts=LogCounts()))
    assert sum(map(len, found.values())) == prepared.events + 1
    (fraud,) = (event for history in found.values() for event in history if event.type != "payment")
    assert (fraud.type, fraud.event_id, fraud.entity_id) == ("confirmed_fraud", "fraud-207", "1")
    assert fraud.occurred_at == datetime(2018, 7, 11, tzinfo=UTC)
    assert fraud.fields == {"amount": 17.0}


class Call:
    """What a malicious pickle does: it names a function to be called."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(tmp_path: Path) -> None:
    (tmp_path / "2018-04-01.pkl").write_bytes(pickle.dumps(Call(tmp_path / "called")))
    with pytest.raises(ConfigError, match="which no data frame needs"):
        prepare(HANDBOOK.name, tmp_path, tmp_path / "out")
    assert not (tmp_path / "called").exists()


def test_an_archive_is_read_as_it_is_published_and_refused_where_it_is_not(tmp_path: Path) -> None:
    movielens_100k(tmp_path)
    archive = tmp_path / "ml-100k.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in (tmp_path / "ml-100k").iterdir():
            packed.write(file, f"ml-100k/{file.name}")
    with pytest.raises(ConfigError, match="is not the published archive"):
        prepare(MOVIELENS_100K.name, tmp_path, tmp_path / "out")
    own = type(ROSBANK)(
        name="own", title="own", home="-", licence="-", citation="-", expects="-",
        archives={archive.name: hashlib.md5(archive.read_bytes()).hexdigest()},  # noqa: S324
    )  # fmt: skip
    with unpacked(own, tmp_path) as content:
        assert (content / "ml-100k" / "u.data").is_file()
        assert content != tmp_path


def test_the_command_prepares_and_refuses_in_one_line(tmp_path: Path) -> None:
    rosbank(tmp_path)
    out = str(tmp_path / "out")
    done = run(["export", "prepare", "rosbank", "--from", str(tmp_path), "--out", out])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"41 events, 20 rows in labels.parquet: {out}\n"
    refused = run(["export", "prepare", "nothing", "--from", str(tmp_path), "--out", out])
    assert refused.returncode == 2
    assert "choose one of: rosbank" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_any_log_keeps_what_its_schema_names_sorted_by_time(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        "who,when,amount,email\n"
        "b,2024-01-02 00:00:00,2.5,b@x.org\n"
        "a,2024-01-01 00:00:00,1,a@x.org\n"
        "a,not a time,1,a@x.org\n"
    )
    schema = tmp_path / "schema.yaml"
    schema.write_text(
        "name: log\nentities: {who: {field: who}}\nevent_time: {field: when}\n"
        "types: {event: {fields: {amount: {kind: number}}}}\n"
    )
    prepared = prepare_any("log", tmp_path / "log.csv", tmp_path / "out", schema)
    assert (prepared.folder / "events.jsonl").read_text().splitlines() == [
        '{"who":"a","when":"2024-01-01 00:00:00","amount":1}',
        '{"who":"b","when":"2024-01-02 00:00:00","amount":2.5}',
    ]
    assert prepared.events == 2
    assert load_schema(prepared.folder / "schema.yaml") == load_schema(schema)
    with pytest.raises(ConfigError, match="proposes it"):
        prepare_any("log", tmp_path / "log.csv", tmp_path / "out", None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not part of the repository")
@pytest.mark.parametrize(
    ("name", "folder", "entities", "rows"),
    [
        ("movielens-100k", "movielens", {"user": 943}, {"labels.parquet": 943}),
        (
            "fraud-handbook",
            "fdh",
            {"customer": 1_500, "terminal": 10_000},
            {"labels_tx.parquet": 522_440, "labels_account.parquet": 33_196},
        ),
    ],
)
def test_real_data_in_parquet_is_taken_as_it_is(
    name: str, folder: str, entities: dict[str, int], rows: dict[str, int], tmp_path: Path
) -> None:
    prepared = prepare(name, SHARED / folder, tmp_path / "out")
    assert prepared.labels == rows
    schema = schema_of(prepared)
    table = pq.read_table(prepared.folder / "events.parquet")
    assert table.num_rows == prepared.events
    for entity, count in entities.items():
        ids = table.column(schema.entities[entity].field)
        assert len(ids.unique()) <= count
        assert ids.null_count == 0
    for file in rows:
        ours = pq.read_table(prepared.folder / file)
        theirs = pq.read_table(SHARED / folder / file)
        assert ours.column("label").to_numpy().sum() == theirs.column("label").to_numpy().sum()
