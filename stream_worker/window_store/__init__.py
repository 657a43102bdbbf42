"""Where windows are kept between batches: SQLite for one worker, Redis for a group."""
