#!/usr/bin/env bash
# Everything worth running when a GPU is at hand for a few minutes: the GPU tests, then the benchmarks on cuda.
# Results, named after the card, go to the folder given as first argument (default benchmarks/results).
#
#   bash benchmarks/gpu.sh [FOLDER]
#   WHEELS=folder bash benchmarks/gpu.sh [FOLDER]    # first unpacks that folder's wheels beside the installed packages
#
# One failure does not hide the next: all parts run, and the exit code is 1 if one failed. ADALORA_GPU_PARTS picks some
# (default "tests engines train overhead 8b 70b", in this order; one line of them by its whole name: train:fsdp2;
# "quality" runs only when asked for).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out="${1:-benchmarks/results}"
parts="${ADALORA_GPU_PARTS:-tests engines train overhead 8b 70b}"
python="${PYTHON:-$(command -v python || command -v python3)}"
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# 70 B leaves little room beside the weights: blocks of differing sizes must not lie about unused.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

if [[ -n "${WHEELS:-}" ]]; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    # In a folder of its own and without what they need: the torch that fits the driver must not be replaced.
    "$python" -m pip install --quiet --no-index --find-links "$WHEELS" --no-deps --no-compile --target "$site" \
        "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$site:$PYTHONPATH"
fi

"$python" - <<'PYTHON' || exit 1
import importlib.util
import sys

needed = ("torch", "transformers", "accelerate", "safetensors", "bitsandbytes", "pydantic", "yaml", "tqdm", "pytest")
lacking = [name for name in needed if importlib.util.find_spec(name) is None]
if lacking:
    sys.exit(f"gpu.sh: {sys.executable} lacks {', '.join(lacking)}; put their wheels into a folder and set WHEELS=folder.")
import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: torch {torch.__version__} sees no GPU here.")
from transformers import __version__

if tuple(map(int, __version__.split(".")[:2])) < (5, 20):
    sys.exit(f"gpu.sh: transformers {__version__} is too old, 5.20 is needed; set WHEELS=folder with its wheel.")
if importlib.util.find_spec("peft") is None:
    print("gpu.sh: peft is not installed; price.py, which compares with it, will fail.")
PYTHON

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
card="$("$python" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))')"
failed=0
part() {
    local name="$1"
    shift
    [[ " $parts " == *" ${name%%:*} "* || " $parts " == *" $name "* ]] || return 0
    echo "== $name"
    "$@" || { failed=1; echo "== $name failed"; }
}

gpu_tests() { "$python" -m pytest -q tests/gpu 2>&1 | tee "$out/tests_$card.log"; }
part tests gpu_tests
# Every engine against the float64 reference, over NCCL, then over a 4-bit base. zero3-offload would compile for minutes.
engines=(--nproc 1 --engines ddp fsdp2 zero1 zero2 zero3)
part engines "$python" -m adalora_scale verify-engines "${engines[@]}" --json "$out/verify_engines_$card.json"
part engines:paper "$python" -m adalora_scale verify-engines "${engines[@]}" --quick --preset paper \
    --json "$out/verify_engines_paper_$card.json"
part engines:4bit "$python" -m adalora_scale verify-engines "${engines[@]}" --load-in-4bit \
    --json "$out/verify_engines_4bit_$card.json"
# The quickstart's run through the launchers, and its score from the adapter on disk.
recipe=configs/recipes/quickstart.yaml
train() {
    local name="$1" run
    shift
    run="$(mktemp -d)"
    "$@" "training.output_dir=$run" training.per_device_train_batch_size=64 2>&1 | tail -n 60 || return 1
    "$python" -m adalora_scale evaluate --config "$recipe" --adapter "$run" --max-new-tokens 16 --batch-size 100 \
        --json | tee "$out/quickstart_${name}_$card.json" || return 1
    rm -rf "$run"
}
torchrun=("$python" -m torch.distributed.run --standalone --nproc-per-node 1 launch/train.py --config "$recipe")
deepspeed=("$python" -m deepspeed.launcher.runner --num_gpus 1 launch/train.py --config "$recipe")
part train:fsdp2 train fsdp2 "${torchrun[@]}" engine.name=fsdp2
part train:zero2 train zero2 "${deepspeed[@]}" --deepspeed configs/deepspeed/zero2.json
part train:zero3 train zero3 "${deepspeed[@]}" --deepspeed configs/deepspeed/zero3.json
# What a step costs beside LoRA's: an 8 B in 4 bits, then 560 tiny matrices, which are all kernel launches.
part overhead:8b "$python" benchmarks/price.py --device cuda --shapes 8b --bases 4bit --rounds 10 --ranks 0 \
    --output "$out/price_8b_$card.json"
part overhead:launches "$python" benchmarks/price.py --device cuda --shapes tiny560 wide --rounds 30 --ranks 0 \
    --output "$out/price_launches_$card.json"
# QAdaLoRA on one card, without and with gradient checkpointing; what does not fit is recorded as that.
part 8b "$python" benchmarks/qlora_step.py --device cuda --shape 8b --tokens 2048 --steps 10 \
    --output "$out/qlora_step_8b_2k_$card.json"
part 8b:4k "$python" benchmarks/qlora_step.py --device cuda --shape 8b --tokens 4096 --steps 10 \
    --output "$out/qlora_step_8b_4k_$card.json"
part 70b "$python" benchmarks/qlora_step.py --device cuda --shape 70b --tokens 2048 --steps 5 \
    --output "$out/qlora_step_70b_2k_$card.json"
part 70b:4k "$python" benchmarks/qlora_step.py --device cuda --shape 70b --tokens 4096 --steps 5 \
    --gradient-checkpointing --output "$out/qlora_step_70b_4k_$card.json"
# The methods' comparison, as many runs side by side as the card and the cores take; results are appended, so what is there
# when the time is over stays. Needs the models and data (--shared).
quality() {
    OMP_NUM_THREADS=1 "$python" -m benchmarks.quality run --jobs "${ADALORA_QUALITY_JOBS:-12}" --results "$out/quality" \
        --shared "${ADALORA_QUALITY_SHARED:-../shared}" || return 1
    "$python" -m benchmarks.quality table --results "$out/quality"
}
part quality quality
exit "$failed"
