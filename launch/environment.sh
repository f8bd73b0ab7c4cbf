# shellcheck shell=bash
# What every launch script sets before it starts ranks. Sourced, not run; a value that is already set is kept.

# The project's own Python environment, where launch/setup.sh made one.
venv="${ADALORA_VENV:-$PWD/.venv}"
if [[ -x "$venv/bin/python" ]]; then export PATH="$venv/bin:$PATH"; fi

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Logs: logs/<job>/<host>.<rank>.log and <host>.launcher.log, on a file system that all hosts share.
job="${JOB:-adalora}"
export ADALORA_HOST="${ADALORA_HOST:-${SLURMD_NODENAME:-${HOSTNAME%%.*}}}"
export ADALORA_LOG_DIR="${ADALORA_LOG_DIR:-$PWD/logs/${job//\//_}}"
mkdir -p "$ADALORA_LOG_DIR" || die "the log folder $ADALORA_LOG_DIR cannot be made"

# Flight recorder: the last collectives of every rank, written to the log folder when one times out (after
# training.ddp_timeout seconds). NCCL's part of torch 2.11 to 2.15 knows some settings by older names only.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_FR_DUMP_TEMP_FILE="$ADALORA_LOG_DIR/flight_recorder_"
if command -v nvidia-smi >/dev/null; then
    export TORCH_NCCL_TRACE_BUFFER_SIZE="$TORCH_FR_BUFFER_SIZE"
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$TORCH_FR_DUMP_TEMP_FILE"
    export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
fi

# Ranks that are asked to end get this many seconds to write a checkpoint (torchrun's own default is 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"

export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export PYTHONUNBUFFERED=1

# The fabric: EFA needs its provider named; InfiniBand gets patience for links that retrain. Elsewhere NCCL's own choice
# stands. Which network interface carries the rendezvous is the cluster's business: set NCCL_SOCKET_IFNAME (and
# GLOO_SOCKET_IFNAME) where hosts have several.
if compgen -G "/sys/class/infiniband/*" >/dev/null; then
    if compgen -G "/sys/class/infiniband/rdmap*" >/dev/null || compgen -G "/sys/class/infiniband/efa*" >/dev/null; then
        export FI_PROVIDER="${FI_PROVIDER:-efa}" FI_EFA_USE_HUGE_PAGE="${FI_EFA_USE_HUGE_PAGE:-0}"
    else
        export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}" NCCL_IB_RETRY_CNT="${NCCL_IB_RETRY_CNT:-7}"
    fi
fi

# gpus_here: the number of GPUs of this host, 1 without any (CPU training with gloo).
gpus_here() {
    local count=0
    if command -v nvidia-smi >/dev/null; then count="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')"; fi
    echo "$((count > 0 ? count : 1))"
}

# run_ranks COMMAND...: runs a launcher, its words in <host>.launcher.log too. SIGTERM and SIGINT go on to the launcher,
# which ends its ranks gently; SIGUSR1 goes to the ranks alone (they write a checkpoint), the launcher ignores it.
run_ranks() {
    local log="$ADALORA_LOG_DIR/$ADALORA_HOST.launcher.log" launcher status
    rm -f "$ADALORA_LOG_DIR/$ADALORA_HOST".*.status.json
    : >"$log"
    (trap '' USR1; exec "$@") > >(trap '' USR1 TERM INT; tee -a "$log") 2>&1 &
    launcher=$!
    trap 'asked=1; kill -TERM "$launcher" 2>/dev/null' TERM INT
    trap 'asked=1; kill -USR1 $(cat "/proc/$launcher/task/"*/children) 2>/dev/null' USR1
    while true; do  # a trapped signal ends wait, not the launcher
        wait "$launcher"
        status=$?
        kill -0 "$launcher" 2>/dev/null || break
    done
    trap - TERM INT USR1
    return "$status"
}

# done_all_the_same STARTED OUTPUT_DIR: whether a run that was asked to end had only its end left, and reached it. Launchers
# call their own signal a failure then.
done_all_the_same() { [[ -n "${asked:-}" && "$2/run.json" -nt "$1" ]]; }

# explain_end STARTED: prints host, rank and first exception of a failed run that began when the file STARTED was made.
explain_end() {
    sleep 1  # the last lines of other hosts
    python -m adalora_scale.cluster.evidence.failures "$ADALORA_LOG_DIR" --since "$1" >&2 || true
}
