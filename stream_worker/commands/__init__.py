"""The worker's commands, one module for each group of them."""
