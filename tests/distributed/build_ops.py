"""Compiles what DeepSpeed needs for gloo and CPU offload, a minute or two, into TORCH_EXTENSIONS_DIR."""

from deepspeed.comm.torch import build_shm_op
from deepspeed.ops.op_builder import CPUAdamBuilder

if __name__ == "__main__":
    build_shm_op()
    CPUAdamBuilder().load()
