"""Kafka in, feature rows out: the worker that keeps embeddings fresh."""
