"""What happens in an optimizer step: two hooks, one all-reduce, and at an allocation the masks."""

from adalora_scale.controller.allocator import RankAllocator

__all__ = ["RankAllocator"]
