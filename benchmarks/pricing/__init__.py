"""What a step costs beside LoRA's: the parts of `benchmarks/price.py`."""
