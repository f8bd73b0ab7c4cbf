"""Every architecture that transformers can build small, for `tests/coverage.py`."""
