"""Base models: built, streamed from their files, and placed where an engine wants them."""
