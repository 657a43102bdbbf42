"""Claims of speed and quality, each a command that measures them anew."""
