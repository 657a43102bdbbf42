"""Card logs of banks: Rosbank churn, Sberbank gender, Sberbank age, and the DataFusion layout."""

import csv
import gzip
from importlib.resources import files
from pathlib import Path

import yaml

from export.datasets.sources import (
    EVENTS,
    Prepared,
    Source,
    Task,
    copy_schema,
    describe,
    find,
    find_if_there,
    read_table,
    table_columns,
    workbench,
    write_query,
)
from llm4es.errors import ConfigError

__all__ = [
    "DATAFUSION",
    "ROSBANK",
    "SBERBANK_AGE",
    "SBERBANK_GENDER",
    "prepare_datafusion",
    "prepare_rosbank",
    "prepare_sberbank_age",
    "prepare_sberbank_gender",
]

_NO_LICENCE = "none stated: published for a competition; research use, do not redistribute"
_LABELS = "labels.parquet"

ROSBANK = Source(
    name="rosbank",
    title="Rosbank ML competition, churn of card holders",
    home="https://huggingface.co/datasets/dllllb/rosbank-churn (first at boosters.pro)",
    licence=_NO_LICENCE,
    citation="Rosbank ML Competition, boosters.pro, 2018; Babaev et al., CoLES, SIGMOD 2022",
    expects="train.csv (and test.csv, without labels; .gz too)",
    notes="Times are Moscow's clock, taken as UTC. target_sum is a second target and left out.",
)
SBERBANK_GENDER = Source(
    name="sberbank-gender",
    title="Sberbank, gender of card holders",
    home="https://huggingface.co/datasets/dllllb/transactions-gender (first at Kaggle, "
    "python-and-analyze-data-final-project)",
    licence=_NO_LICENCE,
    citation="Sberbank, Kaggle 2016; Babaev et al., CoLES, SIGMOD 2022",
    expects="transactions.csv, gender_train.csv, tr_mcc_codes.csv and tr_types.csv",
    notes="Day 0 is not published; here it is 2014-08-01, so dates and weekdays mean nothing. "
    "Amounts are scaled by a secret factor. Terminal ids are left out.",
)
SBERBANK_AGE = Source(
    name="sberbank-age",
    title="Sberbank, age group of card holders (NTI 2019)",
    home="https://huggingface.co/datasets/dllllb/age-group-prediction (first at ods.ai, "
    "sberbank-sirius-lesson)",
    licence=_NO_LICENCE,
    citation="Sberbank, NTI olympiad 2019; Babaev et al., CoLES, SIGMOD 2022",
    expects="transactions_train.csv, train_target.csv, small_group_description.csv "
    "(and transactions_test.csv, without labels)",
    notes="Times are whole days from a day that is not published; here it is 2019-01-01. "
    "Order within a day is the file's. The label has four classes.",
)
DATAFUSION = Source(
    name="datafusion",
    title="DataFusion card log (VTB, 2024: churn; 2022: no labels)",
    home="https://ods.ai/competitions/data-fusion2024-churn",
    licence=_NO_LICENCE,
    citation="Data Fusion Contest, VTB and ODS, 2022 and 2024",
    expects="transactions.csv (2024: clients.csv, report_dates.csv and train.csv beside it)",
    notes="A label's time is its client's report date. What clients.csv says of a person beside "
    "that is left out.",
)

# Stratified, from the ids alone: the same on every machine.
_FOLD = "CAST((row_number() OVER (PARTITION BY label ORDER BY md5(id), id) - 1) % 5 AS TINYINT)"
_LAST_SECOND = "max(occurred_at) + to_seconds(1)"


def prepare_rosbank(folder: Path, out: Path) -> Prepared:
    """Read train.csv and test.csv: PERIOD, cl_id, MCC, ..., target_flag, target_sum."""
    train = find(ROSBANK, folder, "train.csv")
    test = find_if_there(folder, "test.csv")
    columns = ("cl_id", "MCC", "channel_type", "currency", "TRDATETIME", "amount", "trx_category")
    with workbench() as database:
        read_table(
            database, "official", [train, *([test] if test else [])], (*columns, "target_flag")
        )
        database.execute("""
            CREATE TEMP TABLE log AS SELECT cl_id AS client_id, printf('%09d', n) AS event_id,
                strptime(TRDATETIME, '%d%b%y:%H:%M:%S') AS occurred_at, MCC AS mcc, trx_category,
                channel_type, currency, CAST(amount AS DOUBLE) AS amount,
                CAST(CAST(target_flag AS DOUBLE) AS TINYINT) AS label
            FROM (SELECT *, row_number() OVER () AS n FROM official)""")
        events = write_query(
            database, "SELECT * EXCLUDE label FROM log ORDER BY occurred_at, event_id", out / EVENTS
        )
        labels = write_query(database, _user_labels("log", "client_id"), out / _LABELS)
    copy_schema("rosbank.yaml", out / "schema.yaml", {"mcc": _mcc_words()})
    prepared = Prepared(folder=out, events=events, labels={_LABELS: labels})
    describe(ROSBANK, [Task(name="churn", file=_LABELS, entity="client")], prepared)
    return prepared


def prepare_sberbank_gender(folder: Path, out: Path) -> Prepared:
    """Read transactions.csv ("0 10:23:26" is day 0), gender_train.csv and the two code books."""
    source = SBERBANK_GENDER
    log = find(source, folder, "transactions.csv")
    target = find(source, folder, "gender_train.csv", "customers_gender_train.csv")
    names = {
        "mcc": _words(source, folder, "tr_mcc_codes.csv", "mcc_code", "mcc_description"),
        "tr_type": _words(source, folder, "tr_types.csv", "tr_type", "tr_description"),
    }
    with workbench() as database:
        read_table(
            database,
            "official",
            [log],
            ("customer_id", "tr_datetime", "mcc_code", "tr_type", "amount"),
        )
        read_table(database, "target", [target], ("customer_id", "gender"))
        # Some seconds are 60, which no parser of times takes: hence the arithmetic.
        database.execute("""
            CREATE TEMP VIEW log AS SELECT customer_id, printf('%09d', n) AS event_id,
                TIMESTAMP '2014-08-01' + to_days(CAST(parts[1] AS INTEGER))
                + to_seconds(3600 * CAST(parts[2] AS INTEGER) + 60 * CAST(parts[3] AS INTEGER)
                    + CAST(parts[4] AS INTEGER)) AS occurred_at,
                mcc_code AS mcc, tr_type, CAST(amount AS DOUBLE) AS amount
            FROM (SELECT *, string_split(replace(tr_datetime, ' ', ':'), ':') AS parts,
                row_number() OVER () AS n FROM official)""")
        events = write_query(
            database, "SELECT * FROM log ORDER BY occurred_at, event_id", out / EVENTS
        )
        labels = write_query(
            database,
            _user_labels(
                "(SELECT log.*, CAST(CAST(gender AS DOUBLE) AS TINYINT) AS label FROM log "
                "JOIN target USING (customer_id))",
                "customer_id",
            ),
            out / _LABELS,
        )
    copy_schema("sberbank_gender.yaml", out / "schema.yaml", names)
    prepared = Prepared(folder=out, events=events, labels={_LABELS: labels})
    describe(source, [Task(name="gender", file=_LABELS, entity="customer")], prepared)
    return prepared


def prepare_sberbank_age(folder: Path, out: Path) -> Prepared:
    """Read transactions_train.csv (trans_date: day), train_target.csv and the code book."""
    source = SBERBANK_AGE
    log = find(source, folder, "transactions_train.csv")
    test = find_if_there(folder, "transactions_test.csv")
    target = find(source, folder, "train_target.csv")
    book = ("small_group_description.csv", "small_group_code", "small_group")
    names = {"small_group": _words(source, folder, *book)}
    with workbench() as database:
        columns = ("client_id", "trans_date", "small_group", "amount_rur")
        read_table(database, "official", [log, *([test] if test else [])], columns)
        read_table(database, "target", [target], ("client_id", "bins"))
        database.execute("""
            CREATE TEMP VIEW log AS SELECT client_id, printf('%09d', n) AS event_id,
                TIMESTAMP '2019-01-01' + to_days(CAST(trans_date AS INTEGER)) AS occurred_at,
                small_group, CAST(amount_rur AS DOUBLE) AS amount
            FROM (SELECT *, row_number() OVER () AS n FROM official)""")
        events = write_query(
            database, "SELECT * FROM log ORDER BY occurred_at, event_id", out / EVENTS
        )
        labels = write_query(
            database,
            _user_labels(
                "(SELECT log.*, CAST(bins AS TINYINT) AS label FROM log "
                "JOIN target USING (client_id))",
                "client_id",
            ),
            out / _LABELS,
        )
    copy_schema("sberbank_age.yaml", out / "schema.yaml", names)
    prepared = Prepared(folder=out, events=events, labels={_LABELS: labels})
    task = Task(name="age", file=_LABELS, entity="client", metrics=("accuracy", "roc_auc_ovr"))
    describe(source, [task], prepared)
    return prepared


def prepare_datafusion(folder: Path, out: Path) -> Prepared:
    """Read transactions.csv: user_id, mcc_code, currency_rk, transaction_amt, transaction_dttm."""
    source = DATAFUSION
    log = find(source, folder, "transactions.csv")
    columns = ("user_id", "mcc_code", "currency_rk", "transaction_amt", "transaction_dttm")
    rows: dict[str, int] = {}
    with workbench() as database:
        read_table(database, "official", [log], columns)
        database.execute("""
            CREATE TEMP VIEW log AS SELECT user_id, printf('%010d', n) AS event_id,
                CAST(transaction_dttm AS TIMESTAMP) AS occurred_at, mcc_code AS mcc,
                currency_rk AS currency, CAST(transaction_amt AS DOUBLE) AS amount
            FROM (SELECT *, row_number() OVER () AS n FROM official)""")
        events = write_query(
            database, "SELECT * FROM log ORDER BY occurred_at, event_id", out / EVENTS
        )
        target = find_if_there(folder, "train.csv")
        if target is not None and "target" in table_columns(database, target):
            read_table(database, "target", [target], ("user_id", "target"))
            clients = find(source, folder, "clients.csv")
            read_table(database, "clients", [clients], ("user_id", "report"))
            reports = find(source, folder, "report_dates.csv")
            read_table(database, "reports", [reports], ("report", "report_dt"))
            query = f"""
                SELECT user_id, event_timestamp, label, {_FOLD} AS fold FROM (
                    SELECT user_id, user_id AS id, CAST(report_dt AS TIMESTAMP) AS event_timestamp,
                        CAST(CAST(target AS DOUBLE) AS TINYINT) AS label
                    FROM target JOIN clients USING (user_id) JOIN reports USING (report))
                ORDER BY event_timestamp, user_id"""  # noqa: S608 - constants
            rows[_LABELS] = write_query(database, query, out / _LABELS)
    copy_schema("datafusion.yaml", out / "schema.yaml", {"mcc": _mcc_words()})
    prepared = Prepared(folder=out, events=events, labels=rows)
    describe(source, [Task(name="churn", file=_LABELS, entity="user", inclusive=False)], prepared)
    return prepared


def _user_labels(log: str, key: str) -> str:
    """One label per entity that has one, a second after its last event."""
    return f"""
        SELECT id AS {key}, event_timestamp, label, {_FOLD} AS fold FROM (
            SELECT {key} AS id, {_LAST_SECOND} AS event_timestamp, any_value(label) AS label
            FROM {log} WHERE label IS NOT NULL GROUP BY {key})
        ORDER BY event_timestamp, id"""  # noqa: S608 - every part is a constant of this module


def _mcc_words() -> dict[str, str]:
    text = files("export.datasets").joinpath("mcc.yaml").read_text(encoding="utf-8")
    words: dict[str, str] = yaml.safe_load(text)
    return words


def _words(source: Source, folder: Path, file: str, code: str, word: str) -> dict[str, str]:
    """Read an official code book, whose cells are parted by `;` or `,`."""
    path = find(source, folder, file)
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig", "replace")
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter))
    if not rows or code not in rows[0] or word not in rows[0]:
        raise ConfigError(
            "from", f"{path} has no columns {code}, {word}", f"get it at {source.home}"
        )
    return {row[code]: row[word] for row in rows}
