"""Where records come from: a Kafka topic, or files read as an embedded log."""
