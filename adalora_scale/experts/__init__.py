"""Experts of a mixture as one batched linear layer each: grouping tokens, products over groups, and the forward."""
