"""Fraud Detection Handbook: simulated card transactions of customers at terminals, with fraud.

The official daily pickles, and a folder of Parquet as in ../shared/data. Which transactions are
fraud is in the labels alone, never in an event.
"""

import pickle
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from export.datasets.sources import (
    EVENTS,
    Prepared,
    Source,
    Task,
    copy_schema,
    describe,
    find_all,
    workbench,
    write_query,
)
from llm4es.errors import ConfigError

__all__ = ["HANDBOOK", "prepare_handbook"]

HANDBOOK = Source(
    name="fraud-handbook",
    title="Fraud Detection Handbook, simulated transactions",
    home="https://github.com/Fraud-Detection-Handbook/simulated-data-raw",
    licence="none stated for the data (the Handbook's code is GPL-3.0, its text CC BY-SA 4.0)",
    citation="Y.-A. Le Borgne, W. Siblini, B. Lebichot, G. Bontempi: Reproducible Machine Learning "
    "for Credit Card Fraud Detection, ULB, 2022",
    expects="the folder data/ with 2018-04-01.pkl to 2018-09-30.pkl",
    notes="Simulated, no personal data. Scenario 1: amount over 220; 2: compromised terminal, 28 "
    "days; 3: compromised customer, 14 days, a third of the transactions times 5. `scenario` and "
    "`label_any_fraud` are for analysis only. A past label may be used from label_available_at on: "
    "events_terminal.parquet, with schema_terminal.yaml, has the payments by terminal and its "
    "frauds as events that occur then.",
)

_TX, _ACCOUNT = "labels_tx.parquet", "labels_account.parquet"
_TERMINAL = "events_terminal.parquet"
_PICKLED = (
    "CUSTOMER_ID",
    "TERMINAL_ID",
    "TRANSACTION_ID",
    "TX_DATETIME",
    "TX_AMOUNT",
    "TX_FRAUD",
    "TX_FRAUD_SCENARIO",
)
_LOG = pa.schema(
    [
        ("customer_id", pa.string()),
        ("terminal_id", pa.string()),
        ("transaction_id", pa.string()),
        ("occurred_at", pa.timestamp("us")),
        ("amount", pa.float64()),
        ("fraud", pa.int8()),
        ("scenario", pa.int8()),
    ]
)
_EVENTS_SQL = """
    SELECT customer_id, terminal_id, transaction_id, occurred_at, amount
    FROM log ORDER BY occurred_at, CAST(transaction_id AS BIGINT)"""
# {known}: payments with terminal, label and when it became known.
_TERMINAL_SQL = """
    SELECT type, terminal_id, event_id, occurred_at, amount FROM (
        SELECT 'payment' AS type, terminal_id, transaction_id AS event_id, occurred_at, amount
        FROM ({known})
        UNION ALL
        SELECT 'confirmed_fraud', terminal_id, 'fraud-' || transaction_id, known_at, amount
        FROM ({known}) WHERE fraud = 1)
    ORDER BY occurred_at, type, event_id"""
_KNOWN_SQL = """
    SELECT terminal_id, transaction_id, occurred_at, amount, fraud,
        CAST(CAST(occurred_at AS DATE) AS TIMESTAMP) + to_days(8) AS known_at FROM log"""
# A label is known seven full days after the transaction's day. Lite: all frauds, and one in
# twenty genuine transactions, weighted.
_TX_SQL = """
    SELECT customer_id, terminal_id, event_timestamp, transaction_id, label, scenario,
        label_available_at, split, lite, CAST(CASE WHEN lite AND label = 0 THEN 20 ELSE 1 END
        AS FLOAT) AS weight
    FROM (SELECT *, split IN ('train', 'test')
            AND (label = 1 OR md5_number(transaction_id) % 20 = 0) AS lite
        FROM (SELECT customer_id, terminal_id, occurred_at AS event_timestamp, transaction_id,
            fraud AS label, scenario,
            CAST(CAST(occurred_at AS DATE) AS TIMESTAMP) + to_days(8) AS label_available_at,
            CASE WHEN occurred_at < TIMESTAMP '2018-06-01' THEN 'history'
                WHEN occurred_at < TIMESTAMP '2018-08-15' THEN 'train'
                WHEN occurred_at < TIMESTAMP '2018-08-22' THEN 'gap' ELSE 'test' END AS split
            FROM log))
    ORDER BY event_timestamp, CAST(transaction_id AS BIGINT)"""
# Weekly checkpoints of customers who paid in the week before: was one of these a scenario 3?
_ACCOUNT_SQL = """
    SELECT customer_id, event_timestamp, label, label_any_fraud, n_tx_7d, fold,
        event_timestamp + to_days(7) AS label_available_at, lite,
        CAST(CASE WHEN lite AND label = 0 THEN 100 / 15.0 ELSE 1 END AS FLOAT) AS weight
    FROM (SELECT *, label = 1 OR
            md5_number(customer_id || CAST(event_timestamp AS VARCHAR)) % 100 < 15 AS lite
        FROM (SELECT customer_id, event_timestamp,
            CAST(max(CAST(scenario = 3 AS TINYINT)) AS TINYINT) AS label,
            CAST(max(fraud) AS TINYINT) AS label_any_fraud, CAST(count(*) AS SMALLINT) AS n_tx_7d
            FROM log JOIN (SELECT unnest(generate_series(TIMESTAMP '2018-04-29',
                TIMESTAMP '2018-09-30', INTERVAL 7 DAY)) AS event_timestamp)
            ON occurred_at >= event_timestamp - to_days(7) AND occurred_at < event_timestamp
            GROUP BY customer_id, event_timestamp)
        JOIN (SELECT customer_id, CAST((row_number() OVER (PARTITION BY ever
                ORDER BY md5(customer_id), customer_id) - 1) % 5 AS TINYINT) AS fold
            FROM (SELECT customer_id, max(CAST(scenario = 3 AS TINYINT)) AS ever
                FROM log GROUP BY customer_id)) USING (customer_id))
    ORDER BY event_timestamp, customer_id"""

# What pickles of data frames name, of pandas 1 and 2; nothing else is ever called.
_NAMES = {
    ("builtins", "slice"),
    ("__builtin__", "slice"),
    ("_codecs", "encode"),
    ("datetime", "datetime"),
    ("functools", "partial"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked"),
    ("pandas._libs.internals", "_unpickle_block"),
    ("pandas.core.arrays.datetimes", "DatetimeArray"),
    ("pandas.core.frame", "DataFrame"),
    ("pandas.core.indexes.base", "Index"),
    ("pandas.core.indexes.base", "_new_Index"),
    ("pandas.core.indexes.numeric", "Int64Index"),
    ("pandas.core.indexes.range", "RangeIndex"),
    ("pandas.core.internals.blocks", "new_block"),
    ("pandas.core.internals.managers", "BlockManager"),
}
_MOVED = {
    ("pandas.core.internals.blocks", "new_block"): ("pandas._libs.internals", "_unpickle_block"),
    ("__builtin__", "slice"): ("builtins", "slice"),
    ("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"): ("numpy._core.numeric", "_frombuffer"),
    ("pandas.core.indexes.numeric", "Int64Index"): ("pandas.core.indexes.base", "Index"),
}


def prepare_handbook(folder: Path, out: Path) -> Prepared:
    """Read daily pickles, or events.parquet, labels_tx.parquet and labels_account.parquet."""
    with workbench() as database:
        if (folder / EVENTS).is_file():
            rows = _from_parquet(database, folder, out)
        else:
            days = find_all(HANDBOOK, folder, "20[0-9][0-9]-[0-9][0-9]-[0-9][0-9].pkl")
            database.register("nothing", _LOG.empty_table())
            database.execute("CREATE TEMP TABLE log AS SELECT * FROM nothing")
            for day in days:
                database.register("official", _day(day))
                database.execute("INSERT INTO log SELECT * FROM official")
            database.execute(
                "CREATE TEMP MACRO md5_number(text) AS CAST('0x' || md5(text)[:8] AS BIGINT)"
            )
            rows = {
                EVENTS: write_query(database, _EVENTS_SQL, out / EVENTS),
                _TERMINAL: write_query(
                    database, _TERMINAL_SQL.format(known=_KNOWN_SQL), out / _TERMINAL
                ),
                _TX: write_query(database, _TX_SQL, out / _TX),
                _ACCOUNT: write_query(database, _ACCOUNT_SQL, out / _ACCOUNT),
            }
    copy_schema("handbook.yaml", out / "schema.yaml")
    copy_schema("handbook_terminal.yaml", out / "schema_terminal.yaml")
    del rows[_TERMINAL]
    prepared = Prepared(folder=out, events=rows.pop(EVENTS), labels=rows)
    metrics = ("average_precision", "roc_auc")
    tasks = [
        Task(
            name="account",
            file=_ACCOUNT,
            entity="customer",
            inclusive=False,
            lite=True,
            metrics=metrics,
        ),
        Task(
            name="transaction",
            file=_TX,
            entity="customer",
            split="split",
            lite=True,
            metrics=metrics,
        ),
        Task(
            name="transaction_terminal",
            file=_TX,
            entity="terminal",
            split="split",
            lite=True,
            metrics=metrics,
        ),
    ]
    describe(HANDBOOK, tasks, prepared)
    return prepared


def _from_parquet(database: duckdb.DuckDBPyConnection, folder: Path, out: Path) -> dict[str, int]:
    """Take events, labels, folds and weights as they are; ids become text."""
    for view, file in (("tx", EVENTS), ("labels_tx", _TX), ("labels_account", _ACCOUNT)):
        if not (folder / file).is_file():
            raise ConfigError("from", f"{folder} holds no {file}", f"put it beside {EVENTS}")
        database.read_parquet(str(folder / file)).create_view(view)
    events = """
        SELECT CAST(entity_id AS VARCHAR) AS customer_id,
            CAST(terminal_id AS VARCHAR) AS terminal_id,
            CAST(transaction_id AS VARCHAR) AS transaction_id,
            make_timestamp(epoch_us(event_time)) AS occurred_at,
            round(CAST(amount AS DOUBLE), 2) AS amount
        FROM tx ORDER BY occurred_at, tx.transaction_id"""
    labels_tx = """
        SELECT CAST(l.entity_id AS VARCHAR) AS customer_id,
            CAST(terminal_id AS VARCHAR) AS terminal_id,
            make_timestamp(epoch_us(event_timestamp)) AS event_timestamp,
            CAST(l.transaction_id AS VARCHAR) AS transaction_id, label, scenario,
            make_timestamp(epoch_us(label_available_at)) AS label_available_at, split, lite, weight
        FROM labels_tx l JOIN tx USING (transaction_id)
        ORDER BY event_timestamp, l.transaction_id"""
    known = """
        SELECT CAST(terminal_id AS VARCHAR) AS terminal_id,
            CAST(l.transaction_id AS VARCHAR) AS transaction_id,
            make_timestamp(epoch_us(event_timestamp)) AS occurred_at,
            round(CAST(amount AS DOUBLE), 2) AS amount, label AS fraud,
            make_timestamp(epoch_us(label_available_at)) AS known_at
        FROM labels_tx l JOIN tx USING (transaction_id)"""
    labels_account = """
        SELECT CAST(entity_id AS VARCHAR) AS customer_id,
            make_timestamp(epoch_us(event_timestamp)) AS event_timestamp, label, label_any_fraud,
            n_tx_7d, fold, make_timestamp(epoch_us(label_available_at)) AS label_available_at,
            lite, weight
        FROM labels_account ORDER BY event_timestamp, customer_id"""
    return {
        EVENTS: write_query(database, events, out / EVENTS),
        _TERMINAL: write_query(database, _TERMINAL_SQL.format(known=known), out / _TERMINAL),
        _TX: write_query(database, labels_tx, out / _TX),
        _ACCOUNT: write_query(database, labels_account, out / _ACCOUNT),
    }


def _day(path: Path) -> pa.Table:
    """One day's pickle as a table. Raises ConfigError for a file that is none."""
    try:
        with path.open("rb") as file:
            frame = _Frames(file).load()
        missing = [name for name in _PICKLED if name not in frame.columns]
        if missing:
            raise ConfigError("from", f"{path} lacks {missing[0]}", f"get it at {HANDBOOK.home}")
        columns = (
            frame["CUSTOMER_ID"].astype(str),
            frame["TERMINAL_ID"].astype(str),
            frame["TRANSACTION_ID"].astype(str),
            frame["TX_DATETIME"],
            frame["TX_AMOUNT"].astype(float).round(2),
            frame["TX_FRAUD"],
            frame["TX_FRAUD_SCENARIO"],
        )
        arrays = [
            pa.array(column).cast(field.type) for column, field in zip(columns, _LOG, strict=True)
        ]
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ValueError,
        TypeError,
        pa.ArrowException,
    ) as error:
        raise ConfigError(
            "from", f"{path} is no pickle of a day ({error})", f"get it again at {HANDBOOK.home}"
        ) from error
    return pa.Table.from_arrays(arrays, schema=_LOG)


class _Frames(pickle.Unpickler):
    """Unpickles data frames and nothing else: a pickle may name any function to be called."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - a class of pandas or numpy
        if (module, name) not in _NAMES:
            msg = f"it names {module}.{name}, which no data frame needs"
            raise pickle.UnpicklingError(msg)
        return super().find_class(*_MOVED.get((module, name), (module, name)))
