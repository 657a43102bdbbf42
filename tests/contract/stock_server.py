"""Feast's command in a process that has Feast and not us: `python stock_server.py ARGUMENTS`."""

import sys
import warnings

sys.modules["llm4es"] = None  # type: ignore[assignment] # whatever needs us fails

from feast.cli.cli import cli  # noqa: E402

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    cli()
