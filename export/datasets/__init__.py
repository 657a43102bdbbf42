"""Event logs to try things on: a seeded simulator of card payments (docs/simulator.md)."""
