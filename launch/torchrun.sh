#!/usr/bin/env bash
# Bare nodes with torchrun. Run the same line on every node, in any order, in the project's folder, which all nodes share:
#
#   NODES=2 RDZV=node1:29400 bash launch/torchrun.sh --config FILE [section.key=value ...]
#
# or from one of them: bash launch/on_hosts.sh HOSTFILE bash launch/torchrun.sh --config FILE ...   (it sets NODES, RDZV)
#
# Elastic: NODES=2:4 RESTARTS=3 goes on with 2 to 4 nodes and starts all ranks again, from the last checkpoint, when one
# fails or a node comes or goes. Give training.save_steps, or there is no checkpoint to go on from.
#
#   NODES     number of nodes, or MIN:MAX (default 1)
#   RDZV      host:port of the rendezvous, a node that stays (default: this host, a free port; one node only)
#   GPUS      ranks a node (default: its GPUs)
#   RESTARTS  how often all ranks may be started again (default 0)
#   JOB       name of the folder under logs/ (default adalora)
#
# Exit code: 0 done; 85 a checkpoint was written because SIGUSR1 or SIGTERM asked for it, start again; 3 training was given
# up (docs/resume.md); 130 after Ctrl-C; else failed.
# shellcheck disable=SC2154  # launch-check prints output_dir, endpoint and their like
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

# Kubernetes' training operator (v1) and Kubeflow Trainer (v2, which names the first node) speak through PET_ variables.
NODES="${NODES:-${PET_NNODES:-1}}"
named="${PET_RDZV_ENDPOINT:-${PET_MASTER_ADDR:+$PET_MASTER_ADDR:${PET_MASTER_PORT:-29400}}}"
RDZV="${RDZV:-$named}"
patience="${named:+300}"  # pods start in any order, and have an address only then
RESTARTS="${RESTARTS:-${PET_MAX_RESTARTS:-0}}"
GPUS="${GPUS:-${PET_NPROC_PER_NODE:-}}"
JOB="${JOB:-${PET_RDZV_ID:-adalora}}"
unset "${!PET_@}"

# shellcheck source=launch/environment.sh
source launch/environment.sh
(($#)) || die "say what to train: bash launch/torchrun.sh --config FILE [section.key=value ...]"
[[ "$RESTARTS" =~ ^[0-9]+$ ]] || die "RESTARTS=$RESTARTS; write a number, 0 or more"
if [[ -z "$GPUS" || "$GPUS" == auto || "$GPUS" == gpu ]]; then GPUS="$(gpus_here)"; fi
[[ "$GPUS" =~ ^[1-9][0-9]*$ ]] || die "GPUS=$GPUS; write the number of ranks a node, 1 or more"

# Everything that can be wrong is said now, in one line, not by some rank minutes later.
check=(--nodes "$NODES" --ranks-per-node "$GPUS" --patience "${patience:-0}")
if [[ -n "$RDZV" ]]; then check+=(--endpoint "$RDZV"); fi
settings="$(adalora-scale launch-check "${check[@]}" -- "$@")" || exit 2
eval "$settings"  # output_dir, endpoint, local_address

resume=()
if ((RESTARTS > 0)); then resume=(training.resume_from_checkpoint=auto); fi  # what the command line says comes later

# Or ranks that start again meet in the store of the attempt before, and read the addresses of processes that are gone
# (pytorch#135712, pytorch#167288; seen with torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

started="$(mktemp)"
trap 'rm -f "$started"' EXIT
run_ranks python -m adalora_scale.cluster.launching.torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" \
    --max-restarts "$RESTARTS" --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$JOB" ${local_address:+--local-addr "$local_address"} \
    launch/train.py "${resume[@]}" "$@"
status=$?

if [[ "$output_dir/requeue" -nt "$started" ]]; then exit 85; fi
if ((status)) && done_all_the_same "$started" "$output_dir"; then exit 0; fi
if ((status)); then explain_end "$started"; fi
if [[ "$output_dir/wrong-end.json" -nt "$started" ]]; then exit 3; fi  # training was given up, docs/resume.md
exit "$status"
