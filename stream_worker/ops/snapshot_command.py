"""`snapshot`: the window store that the settings name, in one file."""

from contextlib import closing
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from llm4es.bundle import load_bundle
from stream_worker.assembly import deletion_key_of, open_window_store
from stream_worker.ops.snapshot import take_snapshot
from stream_worker.settings import WorkerSettings

__all__ = ["snapshot_store"]


def snapshot_store(settings: WorkerSettings, out: Path, *, as_json: bool) -> None:
    """Take a snapshot, and print the offsets that it stands for."""
    bundle = load_bundle(settings.bundle)
    with closing(open_window_store(settings, bundle, read_only=True)) as store:
        offsets = take_snapshot(store, out, bundle.id, deletion_key=deletion_key_of(settings))
    if as_json:
        told = {f"{tp.topic}/{tp.partition}": at for tp, at in sorted(offsets.items())}
        print(msgspec.json.encode({"file": str(out), "offsets": told}).decode())  # noqa: T201 - the result
        return
    table = Table("topic", "partition", "next offset", title=str(out))
    for tp, at in sorted(offsets.items()):
        table.add_row(tp.topic, str(tp.partition), f"{at:,}")
    Console().print(table)
