"""The method on one device: pure tensors, no process groups (arXiv 2303.10512)."""
