"""`python -m stream_worker`."""

from stream_worker.cli import main

if __name__ == "__main__":
    main()
