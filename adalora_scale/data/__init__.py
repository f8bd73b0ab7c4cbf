"""Rows that people bring: read, checked, rendered, tokenised, packed."""
