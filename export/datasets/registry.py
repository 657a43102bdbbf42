"""Every data set there is an adapter for, by name, and how a folder of it is made."""

from collections.abc import Callable, Mapping
from pathlib import Path

from export.datasets import cards, handbook, icu, movielens
from export.datasets.sources import Prepared, Source
from export.logs import write_sorted_log
from llm4es.errors import ConfigError
from llm4es.schema import load_schema

__all__ = ["ADAPTERS", "LOG", "prepare", "prepare_any", "prepare_log"]

LOG = "log"  # any log, with a schema of one's own

_Adapter = tuple[Source, Callable[[Path, Path], Prepared]]
ADAPTERS: Mapping[str, _Adapter] = {
    source.name: (source, adapter)
    for source, adapter in (
        (cards.ROSBANK, cards.prepare_rosbank),
        (cards.SBERBANK_GENDER, cards.prepare_sberbank_gender),
        (cards.SBERBANK_AGE, cards.prepare_sberbank_age),
        (cards.DATAFUSION, cards.prepare_datafusion),
        (movielens.MOVIELENS_100K, movielens.prepare_movielens_100k),
        (movielens.MOVIELENS_1M, movielens.prepare_movielens_1m),
        (icu.PHYSIONET_2012, icu.prepare_physionet_2012),
        (handbook.HANDBOOK, handbook.prepare_handbook),
    )
}


def prepare(name: str, folder: Path, out: Path) -> Prepared:
    """Turn official files in `folder` into events, schema and labels in `out`, which is made.

    Raises ConfigError for an unknown name, and for files that are missing or not as published.
    """
    if name not in ADAPTERS:
        known = ", ".join((*ADAPTERS, LOG))
        raise ConfigError("name", f"there is no data set {name!r}", f"choose one of: {known}")
    source, adapter = ADAPTERS[name]
    if not folder.is_dir():
        raise ConfigError(
            "from",
            f"{folder} is no folder",
            f"get {source.title} at {source.home} and put {source.expects} there",
        )
    _make(folder, out)
    return adapter(folder, out)


def prepare_any(name: str, taken: Path, out: Path, schema: Path | None) -> Prepared:
    """Prepare a data set by name, or with the name `log` whatever `schema` describes.

    Raises ConfigError.
    """
    if name == LOG and schema is None:
        raise ConfigError(
            "schema", "a log of your own needs one", "python -m export schema LOG proposes it"
        )
    if name != LOG and schema is not None:
        raise ConfigError("schema", f"{name} brings its own", f"edit it in {out} afterwards")
    return prepare(name, taken, out) if schema is None else prepare_log(taken, schema, out)


def prepare_log(path: Path, schema: Path, out: Path) -> Prepared:
    """Keep of a log what its schema names, sorted by time, in flat memory: events.jsonl.

    Raises ConfigError.
    """
    words = load_schema(schema)
    _make(path, out)
    counts = write_sorted_log(path, words, out / "events.jsonl")
    (out / "schema.yaml").write_bytes(schema.read_bytes())
    return Prepared(folder=out, events=counts.events, labels={})


def _make(taken: Path, out: Path) -> None:
    if out.exists() and taken.is_dir() and out.samefile(taken):
        raise ConfigError("out", f"{out} holds the official files", "name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("out", f"{out} cannot be made ({error})", "name a folder") from error
