"""From event logs to a bundle; run as `python -m export`."""
