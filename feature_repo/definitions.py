"""What `feast apply` registers: the views of the bundle that LLM4ES_BUNDLE names.

Feast executes this file from its folder. Only the bundle's manifest and schema are read.
"""

import os
from pathlib import Path

from llm4es.feast import define, read_view_spec

_here = Path(__file__).resolve().parent
_bundle = Path(os.environ.get("LLM4ES_BUNDLE") or _here / "../build/demo/bundle")
_spec = read_view_spec(_bundle.resolve())
_definitions = define(
    _spec,
    topic=os.environ.get("LLM4ES_TOPIC") or "events",
    bootstrap_servers=os.environ.get("LLM4ES_BOOTSTRAP_SERVERS") or "localhost:9092",
    offline_path=os.environ.get("LLM4ES_OFFLINE_LOG") or "data/offline",
    watermark_s=_spec.manifest.window.allowed_lateness.total_seconds(),
)

entity = _definitions.entity
source = _definitions.source
view = _definitions.view
service = _definitions.service
