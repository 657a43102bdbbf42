"""The example of two views on the Fraud Detection Handbook's payments.

    python -m benchmarks.fraud_example --data FOLDER [--home build/fraud_example] [--json]

What `examples.fraud_from_two_views` does on simulated payments: a model of customers and one of
terminals (whose frauds are events of theirs, once they are known), both through workers into Feast,
one LightGBM on both views. A sample: some customers, the payments of theirs that the data set calls
`lite` (all frauds, and others by weight), and the terminals of those; histories are whole. It takes
about twenty minutes on two cores.

    fraud_<views>_ap, fraud_<views>_auc     payment, customer, terminal, both; weighted
    fraud_served_difference                 largest difference of what is served and trained on
"""

import json
import time
import warnings
from pathlib import Path
from typing import Annotated

import duckdb
import pandas as pd
import typer
from feast import FeatureStore

from benchmarks.machine import machine
from examples.fraud_from_two_views import report
from examples.two_views import CUSTOMER, ENTITIES, ROOT, TERMINAL, Log, TwoViews, run

NAMES = ("payment", "customer", "terminal", "both")


def main(
    data: Annotated[Path, typer.Option(help="Folder of the Handbook's data")],
    home: Annotated[Path, typer.Option(help="Folder to leave everything in")] = Path(
        "build/fraud_example"
    ),
    customers: Annotated[int, typer.Option(help="Customers of the sample")] = 300,
    steps: Annotated[int, typer.Option(help="Training steps of each model")] = 300,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Run the steps, and print the figures."""
    warnings.simplefilter("ignore")  # Feast's own deprecations
    started = time.monotonic()
    place = TwoViews((ROOT / home).resolve())
    place.clear()
    prepared = place.home / "prepared"
    official = str(data.resolve())
    run(["export", "prepare", "fraud-handbook", "--from", official, "--out", str(prepared)])
    payments = sample(prepared, place.home, customers)
    logs = {
        CUSTOMER: Log(place.home / "customer.parquet", prepared / "schema.yaml"),
        TERMINAL: Log(place.home / "terminal.parquet", prepared / "schema_terminal.yaml"),
    }
    place.train(logs, steps=steps)
    place.apply()
    rows = place.stream(logs)
    judged, served = report(FeatureStore(repo_path=str(place.repo)), payments)
    ratios = {
        f"fraud_{name}_{metric}": value
        for name, each in zip(NAMES, judged, strict=True)
        for metric, value in (("ap", each.average_precision), ("auc", each.roc_auc))
    } | {"fraud_served_difference": served.largest_difference}
    figures = {
        "payments": len(payments),
        "frauds": int(payments["label"].sum()),
        **{f"{entity}_rows": rows[entity] for entity in ENTITIES},
        "seconds": round(time.monotonic() - started),
    }
    if as_json:
        typer.echo(json.dumps({"ratios": ratios, "figures": figures, "machine": machine()}))


def sample(prepared: Path, out: Path, customers: int) -> pd.DataFrame:
    """Write the logs of some customers and of their terminals; give the labelled payments."""
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'")
        labels, events, terminals = (
            f"'{prepared / name}'"
            for name in ("labels_tx.parquet", "events.parquet", "events_terminal.parquet")
        )
        database.execute(
            f"CREATE TABLE chosen AS SELECT customer_id FROM (SELECT DISTINCT customer_id "  # noqa: S608 - our own files
            f"FROM {labels}) ORDER BY md5(customer_id) LIMIT {customers}"
        )
        database.execute(
            f"CREATE TABLE labelled AS SELECT l.*, e.amount FROM {labels} l "  # noqa: S608
            f"JOIN {events} e USING (customer_id, transaction_id) "
            "SEMI JOIN chosen USING (customer_id) WHERE lite"
        )
        for entity, source, wanted in (
            (CUSTOMER, events, "chosen"),
            (TERMINAL, terminals, "labelled"),
        ):
            database.execute(
                f"COPY (SELECT * FROM {source} SEMI JOIN {wanted} USING ({entity}_id) "  # noqa: S608
                f"ORDER BY occurred_at) TO '{out / f'{entity}.parquet'}' (FORMAT parquet)"
            )
        frame = database.sql(
            "SELECT customer_id, terminal_id, transaction_id AS event_id, event_timestamp, amount, "
            "label, label_available_at, weight FROM labelled ORDER BY event_timestamp, event_id"
        ).df()
    for name in ("event_timestamp", "label_available_at"):
        frame[name] = pd.to_datetime(frame[name], utc=True)
    return pd.DataFrame(frame)


if __name__ == "__main__":
    typer.run(main)
