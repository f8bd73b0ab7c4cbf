#!/usr/bin/env bash
# Bare nodes with deepspeed: run once, on one node, in the project's folder, which all nodes share:
#
#   bash launch/deepspeed.sh HOSTFILE --deepspeed configs/deepspeed/zero2.json --config FILE [section.key=value ...]
#
# A hostfile has a line `name slots=8` a host; ssh must reach each without a question. pdsh starts the ranks where it is
# installed, else plain ssh does (LAUNCHER=pdsh or LAUNCHER=ssh decides).
#
#   PORT  port of the rendezvous on the first host (default 29500)
#   JOB   name of the folder under logs/ (default adalora)
#   ADALORA_SSH_OPTIONS  options for ssh, for example "-p 2222 -i key"
#
# Exit code: 0 done; 85 a checkpoint was written because SIGUSR1 or SIGTERM asked a rank for it, start again; 3 training was
# given up (docs/resume.md); else failed.
# shellcheck disable=SC2154  # launch-check prints output_dir, endpoint and their like
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

if (($# < 2)); then
    echo "error: usage: bash launch/deepspeed.sh HOSTFILE --deepspeed FILE --config FILE [section.key=value ...]" >&2
    exit 2
fi
hostfile="$1"
shift
export PORT="${PORT:-29500}"
# shellcheck source=launch/environment.sh
source launch/environment.sh
if [[ -z "${LAUNCHER:-}" ]]; then
    if command -v pdsh >/dev/null; then LAUNCHER=pdsh; else LAUNCHER=ssh; fi
fi

settings="$(adalora-scale launch-check --hostfile "$hostfile" --endpoint ":$PORT" -- "$@")" || exit 2
eval "$settings"  # output_dir, hosts, slots, nodes, master, port
started="$(mktemp)" exports="$(mktemp)"
trap 'rm -f "$started" "$exports"' EXIT
rm -f "$ADALORA_LOG_DIR"/*.status.json

case "$LAUNCHER" in
    pdsh)
        # deepspeed hands on what this file says, and pdsh puts each host's name in place of %h.
        env | grep -E '^(ADALORA|NCCL|GLOO|TORCH|OMP|HF|TOKENIZERS|FI|DS|CUDA_VISIBLE)[A-Z_]*=' |
            grep -v '^ADALORA_HOST=' >"$exports"
        printf '%s\n' 'ADALORA_HOST=%h' "PATH=$(dirname "$(command -v python)"):\$PATH" >>"$exports"
        export DS_ENV_FILE="$exports" PDSH_SSH_ARGS_APPEND="-o BatchMode=yes ${ADALORA_SSH_OPTIONS:-}"
        run_ranks deepspeed --hostfile "$hostfile" --launcher pdsh --no_ssh_check --force_multi \
            --master_addr "$master" --master_port "$port" launch/train.py "$@"
        ;;
    ssh)
        # shellcheck disable=SC2016  # NODE_RANK is each host's
        run_ranks bash launch/on_hosts.sh "$hostfile" bash -c \
            'exec deepspeed --hostfile "$0" --no_ssh --node_rank "$NODE_RANK" --master_addr "$1" --master_port "$2" \
                launch/train.py "${@:3}"' "$hostfile" "$master" "$port" "$@"
        ;;
    *) die "LAUNCHER=$LAUNCHER; it must be pdsh or ssh" ;;
esac
status=$?

if [[ "$output_dir/requeue" -nt "$started" ]]; then exit 85; fi
if ((status)) && done_all_the_same "$started" "$output_dir"; then exit 0; fi
if ((status)); then explain_end "$started"; fi
if [[ "$output_dir/wrong-end.json" -nt "$started" ]]; then exit 3; fi  # training was given up, docs/resume.md
exit "$status"
