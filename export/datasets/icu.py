"""PhysioNet/CinC Challenge 2012: the first 48 hours of stays in intensive care."""

from pathlib import Path

from export.datasets.sources import (
    EVENTS,
    Prepared,
    Source,
    Task,
    copy_schema,
    describe,
    find,
    find_all,
    find_if_there,
    read_table,
    workbench,
    write_query,
)

__all__ = ["PHYSIONET_2012", "prepare_physionet_2012"]

PHYSIONET_2012 = Source(
    name="physionet-2012",
    title="PhysioNet/CinC Challenge 2012, mortality of ICU patients",
    home="https://physionet.org/content/challenge-2012/1.0.0/",
    licence="Open Data Commons Attribution License v1.0",
    citation="I. Silva, G. Moody, R. Mark, L. A. Celi, CinC 39, 2012; A. Goldberger et al., "
    "PhysioBank, PhysioToolkit, and PhysioNet, Circulation 101(23), 2000",
    expects="the folder set-a with its .txt files and Outcomes-a.txt (set-b and set-c likewise)",
    notes="Times are since admission; here every stay begins on 2012-01-01. An unknown value of "
    "admission is -1 in the files and null here. The label is death in hospital, at hour 48.",
)

_LABELS = "labels.parquet"
_SETS = ("a", "b", "c")

# Order among measurements of one minute is the file's.
_LOG_SQL = r"""
    CREATE TEMP TABLE log AS
    SELECT regexp_extract(filename, '(\d+)\.txt', 1) AS stay_id, n, Parameter AS type,
        TIMESTAMP '2012-01-01' + to_minutes(60 * CAST(split_part(Time, ':', 1) AS BIGINT)
            + CAST(split_part(Time, ':', 2) AS BIGINT)) AS occurred_at,
        CAST(Value AS DOUBLE) AS value,
        Time = '00:00' AND Parameter IN ('RecordID', 'Age', 'Gender', 'Height', 'ICUType', 'Weight')
            AS at_admission
    FROM (SELECT *, row_number() OVER () AS n FROM official)
    WHERE Parameter IS NOT NULL AND Parameter <> ''"""
_EVENTS_SQL = """
    SELECT stay_id, printf('%s-%05d', stay_id, n - first_n) AS event_id, occurred_at, type, value,
        age, gender, height, icu_type, weight
    FROM (
        SELECT stay_id, min(n) AS n, min(occurred_at) AS occurred_at, 'admission' AS type,
            NULL AS value,
            max(value) FILTER (type = 'Age' AND value >= 0) AS age,
            CASE max(value) FILTER (type = 'Gender') WHEN 0 THEN '0' WHEN 1 THEN '1' END AS gender,
            max(value) FILTER (type = 'Height' AND value >= 0) AS height,
            CAST(CAST(max(value) FILTER (type = 'ICUType' AND value >= 1) AS INTEGER) AS VARCHAR)
                AS icu_type,
            max(value) FILTER (type = 'Weight' AND value >= 0) AS weight
        FROM log WHERE at_admission GROUP BY stay_id
        UNION ALL
        SELECT stay_id, n, occurred_at, type, value, NULL, NULL, NULL, NULL, NULL
        FROM log WHERE NOT at_admission AND value IS NOT NULL)
    JOIN (SELECT stay_id, min(n) AS first_n FROM log GROUP BY stay_id) USING (stay_id)
    ORDER BY occurred_at, stay_id, n"""
_LABELS_SQL = """
    SELECT stay_id, TIMESTAMP '2012-01-03' AS event_timestamp, label,
        CAST((row_number() OVER (PARTITION BY label ORDER BY md5(stay_id), stay_id) - 1) % 5
            AS TINYINT) AS fold
    FROM (SELECT RecordID AS stay_id,
        CAST(CAST("In-hospital_death" AS DOUBLE) AS TINYINT) AS label FROM target)
    WHERE stay_id IN (SELECT stay_id FROM log)
    ORDER BY stay_id"""


def prepare_physionet_2012(folder: Path, out: Path) -> Prepared:
    """Read Time,Parameter,Value of each stay, and Outcomes-?.txt of those that were published."""
    stays: list[Path] = []
    for letter in _SETS:
        if letter == "a" or (folder / f"set-{letter}").is_dir():
            stays += find_all(PHYSIONET_2012, folder, f"set-{letter}/[0-9]*.txt")
    outcomes = [find(PHYSIONET_2012, folder, "Outcomes-a.txt")]
    others = (find_if_there(folder, f"Outcomes-{letter}.txt") for letter in _SETS[1:])
    outcomes += [path for path in others if path is not None]
    with workbench() as database:
        read_table(database, "official", stays, ("Time", "Parameter", "Value"), filename=True)
        read_table(database, "target", outcomes, ("RecordID", "In-hospital_death"))
        database.execute(_LOG_SQL)
        events = write_query(database, _EVENTS_SQL, out / EVENTS)
        labels = write_query(database, _LABELS_SQL, out / _LABELS)
    copy_schema("physionet_2012.yaml", out / "schema.yaml")
    prepared = Prepared(folder=out, events=events, labels={_LABELS: labels})
    metrics = ("roc_auc", "average_precision")
    describe(
        PHYSIONET_2012,
        [Task(name="mortality", file=_LABELS, entity="stay", metrics=metrics)],
        prepared,
    )
    return prepared
