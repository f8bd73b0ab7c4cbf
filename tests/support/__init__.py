"""The support matrix (docs/support.md), made from the marks of the tests: `python -m tests.support`."""
