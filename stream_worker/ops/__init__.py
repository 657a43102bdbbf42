"""What ops run beside the worker."""
