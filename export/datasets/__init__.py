"""Event logs to try things on: published data sets (docs/datasets.md), and a seeded simulator of
card payments (docs/simulator.md).
"""  # noqa: D205 - one sentence
