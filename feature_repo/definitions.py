"""What `feast apply` registers: views and services of the bundles that LLM4ES_BUNDLES names.

    LLM4ES_BUNDLES            folders of bundles, a comma between them: all that serve, of one
                              entity or of several ($LLM4ES_BUNDLE where there is one)
    LLM4ES_SERVING            customer=ID,terminal=ID: what each stable service points to; by
                              default the first bundle of each entity
    LLM4ES_TOPIC              topic of events; LLM4ES_TOPICS=customer=T1,terminal=T2 for several
    LLM4ES_BOOTSTRAP_SERVERS  Kafka's brokers
    LLM4ES_OFFLINE_LOG        folder of the offline logs
    LLM4ES_TTL_S              seconds for which a row is valid; for ever by default

`feast apply` takes away what is no longer defined here, online rows included: name every bundle
that still serves. Only manifests and schemas are read. Feast executes this file from its folder.
"""

import os
from datetime import timedelta
from pathlib import Path

from llm4es.feast import define_all, read_pairs, read_view_spec

_env = {name: value for name, value in os.environ.items() if value}
_demo = str(Path(__file__).resolve().parent / "../build/demo/bundle")
_folders = _env.get("LLM4ES_BUNDLES", _env.get("LLM4ES_BUNDLE", _demo)).split(",")
_specs = [read_view_spec(Path(folder.strip()).resolve()) for folder in _folders]
_topic = _env.get("LLM4ES_TOPIC", "events")

for _definition in define_all(
    _specs,
    topics={spec.manifest.entity: _topic for spec in _specs}
    | read_pairs("LLM4ES_TOPICS", _env.get("LLM4ES_TOPICS", "")),
    bootstrap_servers=_env.get("LLM4ES_BOOTSTRAP_SERVERS", "localhost:9092"),
    offline_path=_env.get("LLM4ES_OFFLINE_LOG", "data/offline"),
    serving=read_pairs("LLM4ES_SERVING", _env.get("LLM4ES_SERVING", "")),
    ttl=timedelta(seconds=float(_env.get("LLM4ES_TTL_S", 0))),
):
    globals()[_definition.name] = _definition
del _definition
