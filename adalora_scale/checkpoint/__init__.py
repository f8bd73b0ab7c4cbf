"""Checkpoints: all a run needs to go on, in flat intervals that any engine and any number of ranks can read."""
