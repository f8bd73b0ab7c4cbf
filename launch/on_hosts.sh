#!/usr/bin/env bash
# Runs one command on every host of a hostfile, over ssh, in this folder, and waits for all of them:
#
#   bash launch/on_hosts.sh HOSTFILE COMMAND ...
#   bash launch/on_hosts.sh hosts.txt bash launch/torchrun.sh --config FILE training.save_steps=100
#
# A hostfile has a line `name slots=8` a host, as deepspeed reads it. The command finds NODES, NODE_RANK, GPUS (the slots)
# and RDZV (first host:PORT) in its environment, and every ADALORA_, NCCL_, GLOO_, TORCH_, OMP_ and HF_ variable of here.
#
#   PORT  port of the rendezvous on the first host (default 29400)
#   ADALORA_SSH_OPTIONS  options for ssh, for example "-p 2222 -i key"
#
#   GRACE  seconds that the other hosts get when one fails (default 30); in an elastic run, NODES=MIN:MAX, they go on
#
# Every line of output begins with its host; a host whose command fails is named at the end. Ctrl-C ends all of them.
# shellcheck disable=SC2154  # launch-check prints output_dir, endpoint and their like
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

(($# > 1)) || { echo "error: usage: bash launch/on_hosts.sh HOSTFILE COMMAND ..." >&2; exit 2; }
hostfile="$1"
shift
PORT="${PORT:-29400}"
# shellcheck source=launch/environment.sh
source launch/environment.sh
rm -f "$ADALORA_LOG_DIR/on_hosts.launcher.log"  # an earlier run's would blame its hosts

settings="$(adalora-scale launch-check --hostfile "$hostfile" --endpoint ":$PORT")" || exit 2
eval "$settings"  # hosts, slots, nodes, endpoint

# The other ends need these; ADALORA_HOST is each host's own, its name in the hostfile.
unset ADALORA_HOST
forwarded="$(export -p | sed 's/^declare -x /export /' | grep -E '^export (ADALORA|NCCL|GLOO|TORCH|OMP|HF|TOKENIZERS|FI|DS|JOB|RESTARTS|PYTHONPATH|CUDA_VISIBLE)' || true)"
command="$(printf '%q ' "$@")"
bin="$(dirname "$(command -v python)")"

pids=() names=()
rank=0
for host in $hosts; do
    remote="cd $(printf '%q' "$PWD") && $forwarded
export PATH=$(printf '%q' "$bin"):\$PATH
export ADALORA_HOST=$host NODES=${NODES:-$nodes} NODE_RANK=$rank GPUS=$slots RDZV=$endpoint
exec $command"
    remote="exec bash -c '${remote//\'/\'\\\'\'}'"  # whatever the login shell is
    # -tt: when this end goes, so does the other.
    # shellcheck disable=SC2086,SC2029  # options are words; the text is expanded here on purpose
    ssh -tt -o BatchMode=yes -o ConnectTimeout=10 ${ADALORA_SSH_OPTIONS:-} "$host" "$remote" </dev/null \
        > >(trap '' INT TERM; sed -u "s/\r$//; s/^/$host: /") 2>&1 &
    pids+=($!) names+=("$host")
    rank=$((rank + 1))
done
trap 'kill "${pids[@]}" 2>/dev/null' INT TERM

# ends HOST: what became of a host that is done.
failed=0 deadline=""
ends() {
    wait "${pids[$1]}"
    local status=$?
    if ((status)); then
        echo "on_hosts: ${names[$1]} ended with exit code $status" | tee -a "$ADALORA_LOG_DIR/on_hosts.launcher.log" >&2
        ((failed)) || failed=$status
        if [[ "${NODES:-1}" != *:* ]]; then deadline="${deadline:-$((SECONDS + ${GRACE:-30}))}"; fi
    fi
    if [[ "${NODES:-1}" == *:* ]]; then failed=$status; fi  # an elastic run ends as its last host does
    unset "pids[$1]"
}
while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
        kill -0 "${pids[$i]}" 2>/dev/null || ends "$i"
    done
    if [[ -n "$deadline" ]] && ((SECONDS > deadline && ${#pids[@]})); then
        echo "on_hosts: ending the other hosts" >&2
        kill "${pids[@]}" 2>/dev/null
        deadline=$((SECONDS + 3600))
    fi
    sleep 0.5
done
exit "$failed"
