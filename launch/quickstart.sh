#!/usr/bin/env bash
# The first run: sets up an environment, fine-tunes a small model that ships with the project on 2 processes, and shows
# its exact-match score before and after, with plain LoRA beside it. No network beyond the package index.
#
#   bash launch/quickstart.sh            about 3 minutes on 2 CPU cores after the set-up
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh --quickstart
venv="${ADALORA_VENV:-$PWD/.venv}"
export PATH="$venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

recipe=configs/recipes/quickstart.yaml
processes=2
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    gpus=$(nvidia-smi -L | wc -l)
    processes=$((gpus < 2 ? gpus : 2))
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
run=runs/quickstart
batch="training.per_device_train_batch_size=$((64 / processes))"
rm -rf "$run" "$run-lora"  # a quickstart may be repeated; only its own two folders are replaced
mkdir -p "$run"

echo "== 1/4  the untouched base model on 300 held-out requests"
adalora-scale evaluate --config "$recipe" --max-new-tokens 16 --batch-size 100 --json >"$run.before.json"

echo "== 2/4  AdaLoRA, $processes process(es)"
torchrun --standalone --nproc-per-node "$processes" launch/train.py --config "$recipe" "$batch"

echo "== 3/4  plain LoRA at the same number of triplets, its own learning rate"
torchrun --standalone --nproc-per-node "$processes" benchmarks/lora_baseline.py --config "$recipe" "$batch" \
    --lora-r 8 training.learning_rate=5e-3 training.output_dir="$run-lora"

echo "== 4/4  the adapter that was saved, loaded again"
adalora-scale evaluate --config "$recipe" --adapter "$run" --max-new-tokens 16 --batch-size 100 --json >"$run.after.json"

python launch/quickstart/show.py "$run"
