"""Adapters as files that other tools read."""
