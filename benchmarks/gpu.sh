#!/usr/bin/env bash
# Everything worth running when a GPU is at hand for a few minutes: the GPU tests, then the benchmarks on cuda.
# Results go to the folder given as first argument (default benchmarks/results).
#
#   bash benchmarks/gpu.sh [FOLDER]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out="${1:-benchmarks/results}"
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
python -m pytest -q tests/gpu 2>&1 | tee "$out/tests.log"
# An 8 B-like and a small shape: the first is about arithmetic, the second about kernel launches.
python benchmarks/step_overhead.py --device cuda --dtype bfloat16 --hidden 4096 --layers 32 --tokens 4096 --r 12 \
    --steps 20 --output "$out/step_overhead_8b.json"
python benchmarks/step_overhead.py --device cuda --dtype bfloat16 --hidden 512 --layers 48 --tokens 512 --r 12 \
    --steps 30 --output "$out/step_overhead_launches.json"
