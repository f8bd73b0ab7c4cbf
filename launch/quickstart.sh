#!/usr/bin/env bash
# The first run: sets up an environment, fine-tunes a small model that ships with the project over a 4-bit base
# (QAdaLoRA) with DeepSpeed ZeRO on 2 processes, and shows its exact-match score before and after, with plain LoRA
# beside it. No network beyond the package index.
#
#   bash launch/quickstart.sh            3 minutes on 2 fast CPU cores after the set-up, 8 on 2 slow or busy ones
#   bash launch/quickstart.sh --seeds 5  both methods on five seeds, with mean and spread; 10 to 30 minutes
set -euo pipefail

seeds=1
if (($#)); then
    [[ $# == 2 && $1 == --seeds && $2 =~ ^[1-9][0-9]*$ ]] || { echo "usage: bash launch/quickstart.sh [--seeds N]" >&2; exit 2; }
    seeds="$2"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh --quickstart
venv="${ADALORA_VENV:-$PWD/.venv}"
export PATH="$venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

recipe=configs/recipes/quickstart.yaml
run=runs/quickstart
processes=2
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    gpus=$(nvidia-smi -L | wc -l)
    processes=$((gpus < 2 ? gpus : 2))
else
    export DS_ACCELERATOR=cpu
fi
batch="training.per_device_train_batch_size=$((64 / processes))"
rm -rf "$run" "$run-lora" "$run"-seed-*  # a quickstart may be repeated; only its own folders are replaced
mkdir -p "$run"

echo "== 1/4  the untouched base model, in 4 bits, on 300 held-out requests"
adalora-scale evaluate --config "$recipe" --max-new-tokens 16 --batch-size 100 --json >"$run.before.json"

train() {  # where the adapter goes, then overrides
    if [[ "${DS_ACCELERATOR:-}" == cpu ]] && ! command -v "${CXX:-c++}" >/dev/null; then
        # DeepSpeed compiles an operator for CPU processes.
        echo "== 2/4  QAdaLoRA: FSDP2 (DeepSpeed on CPU needs a C++ compiler), $processes process(es)"
        torchrun --standalone --nproc-per-node "$processes" launch/train.py --config "$recipe" engine.name=fsdp2 \
            "$batch" training.output_dir="$1" "${@:2}"
        return
    fi
    echo "== 2/4  QAdaLoRA: deepspeed, ZeRO-2, $processes process(es)"
    local port
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    deepspeed --quiet --num_gpus "$processes" --master_addr 127.0.0.1 --master_port "$port" \
        launch/train.py --config "$recipe" --deepspeed configs/deepspeed/zero2.json \
        "$batch" training.output_dir="$1" "${@:2}"
}

for ((i = 0; i < seeds; i++)); do
    seed=$((42 + i))
    to="$run"
    ((i)) && to="$run-seed-$seed" && echo "== seed $seed, $((i + 1)) of $seeds"
    train "$to" "training.seed=$seed"

    echo "== 3/4  plain LoRA with the same number of parameters"
    torchrun --standalone --nproc-per-node "$processes" benchmarks/lora_baseline.py --config "$recipe" "$batch" \
        --lora-r 8 training.output_dir="$to-lora" "training.seed=$seed"

    echo "== 4/4  the adapter that was saved, loaded again"
    adalora-scale evaluate --config "$recipe" --adapter "$to" --max-new-tokens 16 --batch-size 100 --json >"$to.after.json"
done

python launch/quickstart/show.py "$run"
