"""Feast repositories and rows for tests: a bundle's manifest and schema without its weights."""

import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from textwrap import dedent

import numpy as np
import pandas as pd
from feast import FeatureStore
from feast.data_format import StreamFormat
from numpy.typing import NDArray

from llm4es.bundle import Manifest, Pooling, SurpriseSpec, Training
from llm4es.feast import ViewSpec, define
from llm4es.feast.definitions import read_view_spec
from llm4es.feast.parts import rows_to_batch
from llm4es.features import FeatureRow
from llm4es.rendering import RenderingSpec
from llm4es.schema import load_schema
from llm4es.windows import WindowPolicy

ROOT = Path(__file__).resolve().parent.parent
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
FAR_SECONDS = timedelta(days=365 * 60)  # past 2038, where 32 bits of seconds end
BUNDLE_ID = "0123456789ab"
DIM = 8

_SCHEMA = """
name: payments
entities: {customer: {field: customer}, terminal: {field: terminal}}
event_id: id
event_time: {field: at}
types:
  payment:
    fields:
      amount: {kind: number, unit: EUR, buckets: {quantiles: 16}}
      shop: {kind: category}
"""


def make_spec(
    folder: Path,
    *,
    bundle_id: str = BUNDLE_ID,
    dim: int = DIM,
    surprise: bool = True,
    entity: str = "customer",
) -> ViewSpec:
    """Write a bundle's manifest and schema, nothing else, and describe it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.yaml").write_text(_SCHEMA)
    manifest = Manifest(
        id=bundle_id,
        entity=entity,
        schema_sha256=load_schema(_SCHEMA).sha256,
        rendering=RenderingSpec(),
        rendering_sha256="e" * 64,
        window=WindowPolicy(),
        base_model="none",
        licence="Apache-2.0",
        training=Training(
            data_sha256="d" * 64, steps=1, epochs=1, train_loss=None, held_out_loss=None
        ),
        pooling=Pooling(layers=(1,), scales=(float("inf"), 16.0)),
        surprise=SurpriseSpec() if surprise else None,
        hidden_size=dim // 2,
        dim=dim,
        bos_id=None,
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return read_view_spec(folder)


def make_repo(
    folder: Path,
    *,
    redis_url: str | None = None,
    extra: str = "",
    registry: str = "data/registry.db",
    offline: str = "llm4es.feast.offline_log.LogOfflineStore",
) -> Path:
    """Write a feature repository: ours, with SQLite or with the Redis at host:port.

    `extra` are further settings of the online store, with a comma in front.
    """
    folder.mkdir(parents=True, exist_ok=True)
    online = (
        f"{{type: sqlite, path: data/online.db{extra}}}"
        if redis_url is None
        else f'{{type: redis, connection_string: "{redis_url},socket_timeout=5"{extra}}}'
    )
    (folder / "feature_store.yaml").write_text(
        dedent(f"""\
        project: llm4es
        provider: local
        registry: {registry}
        online_store: {online}
        offline_store: {{type: {offline}}}
        entity_key_serialization_version: 3
        """)
    )
    (folder / "definitions.py").write_text((ROOT / "feature_repo/definitions.py").read_text())
    return folder


def apply(
    repo: Path,
    spec: ViewSpec,
    *,
    ttl: timedelta | None = None,
    message_format: StreamFormat | None = None,
    offline_path: str = "data/offline",
) -> FeatureStore:
    """Register a bundle's view from here: as `feast apply` does, without starting Python anew."""
    store = FeatureStore(repo_path=str(repo))
    definitions = define(
        spec,
        topic="payments",
        bootstrap_servers="localhost:9092",
        offline_path=offline_path,
        ttl=ttl,
        message_format=message_format,
    )
    with warnings.catch_warnings():  # Feast calls stream feature views experimental
        warnings.simplefilter("ignore", RuntimeWarning)
        store.apply(list(definitions.objects))
    return store


def frame(rows: Sequence[FeatureRow]) -> pd.DataFrame:
    """Rows as the data frame that stock Feast's `push` and `write_to_...` take."""
    found = pd.DataFrame(rows_to_batch(rows, "customer_id").to_pandas())
    found["event_timestamp"] = found["event_timestamp"].astype("datetime64[ns, UTC]")
    return found


def feast(repo: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Feast's own command on a repository, from another folder."""
    return subprocess.run(
        [feast_command(), "-c", str(repo), *arguments],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def feast_command() -> str:
    """Where Feast's command is installed."""
    return str(Path(sys.executable).parent / "feast")


def row(
    spec: ViewSpec,
    entity_id: str = "c1",
    *,
    as_of: datetime = NOON,
    seed: int = 0,
    embedding: NDArray[np.float32] | None = None,
    last_event_id: str = "e1",
) -> FeatureRow:
    """Make a row whose numbers follow from its seed."""
    rng = np.random.default_rng(seed)
    return FeatureRow(
        entity_id=entity_id,
        as_of=as_of,
        embedding=(
            rng.normal(size=spec.manifest.dim).astype(np.float32)
            if embedding is None
            else embedding
        ),
        surprise=rng.normal(size=len(spec.surprise_columns)).astype(np.float32),
        surprise_last=float(np.float32(rng.normal())),
        event_count=seed + 1,
        last_event_id=last_event_id,
        last_event_time=as_of.replace(microsecond=0) - timedelta(seconds=5),
        bundle_id=spec.manifest.id,
    )
