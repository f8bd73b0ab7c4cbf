"""Frozen 4-bit bases: the linear layer, streaming sharded loading, offline quantising."""
