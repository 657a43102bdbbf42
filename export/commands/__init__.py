"""The commands of `python -m export`, by what they are about.

Heavy imports happen inside them: `--help` answers at once.
"""
