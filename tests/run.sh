#!/usr/bin/env bash
# Sets up the environment and runs every check: ruff, mypy, pytest. What follows goes to pytest:
#
#   bash tests/run.sh              the tests of every day
#   bash tests/run.sh --full       and the long matrices
#   bash tests/run.sh -k packaging
#
# Two files of tests run at a time (ADALORA_TEST_WORKERS): most of the time one process starts others and waits.
#
# A failed check does not hide the next one; the exit code is the first failure's.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
venv="${ADALORA_VENV:-$PWD/.venv}"

echo "== set-up"
bash launch/setup.sh --test || exit

# In CI the programs of the cluster tests (SLURM, sshd, pdsh) are installed too; elsewhere that is the user's choice, and
# tests that lack them are skipped.
if [[ "${CI:-}" == true && $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    bash tests/cluster/install.sh >/dev/null || echo "cluster programs could not be installed; their tests are skipped"
fi

export PATH="$venv/bin:$PATH"  # DeepSpeed looks for ninja there
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# One thread a process: the models are tiny, ranks share the cores, and OpenMP threads that wait for a busy core spin
# (60 times slower was seen on two cores with another job beside).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# DeepSpeed compiles into a folder of this run's own: a lock that a killed run left behind cannot stop this one. It does so
# once, while the other checks run; each worker gets a copy. Where that fails, the tests that need it say why.
TORCH_EXTENSIONS_DIR="$(mktemp -d)"
export TORCH_EXTENSIONS_DIR
DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$TORCH_EXTENSIONS_DIR/built" \
    python tests/distributed/build_ops.py >"$TORCH_EXTENSIONS_DIR/build.log" 2>&1 &
building=$!
trap 'rm -rf "$TORCH_EXTENSIONS_DIR"' EXIT
trap 'exit 130' INT TERM

first_failure=0
failed_stages=""
stage() {
    local name="$1" status
    shift
    echo "== $name"
    "$@"
    status=$?
    if ((status)); then
        echo "== $name failed (exit code $status)"
        failed_stages+="${failed_stages:+, }$name"
        ((first_failure)) || first_failure=$status
    fi
}

typed=()
for folder in adalora_scale launch benchmarks; do
    if [[ -n "$(find "$folder" -name '*.py' -print -quit 2>/dev/null)" ]]; then typed+=("$folder"); fi
done
stage "ruff check" ruff check .
stage "ruff format" ruff format --check .
stage "mypy" mypy "${typed[@]}"

wait "$building" || rm -rf "$TORCH_EXTENSIONS_DIR/built"

echo "== pytest"
workers=(-n "${ADALORA_TEST_WORKERS:-2}" --dist loadscope --no-loadscope-reorder)  # scopes: see tests/conftest.py
ADALORA_FAILED_STAGES="$failed_stages" python -m pytest "${workers[@]}" "$@"  # the last lines of the run are pytest's summary
status=$?
if ((first_failure)); then exit "$first_failure"; fi
exit "$status"
