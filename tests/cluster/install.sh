#!/usr/bin/env bash
# Installs what the cluster tests need beside Python, from Debian's or Ubuntu's packages, as root: a SLURM of its own for
# one machine, sshd and pdsh for two network namespaces as hosts, shellcheck. Nothing is started here; the tests start
# and end their own daemons.
#
#   bash tests/cluster/install.sh
#   python -m pytest tests/cluster --full
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
programs=(slurmctld slurmd munged sshd ssh pdsh shellcheck ip tc chromium)
missing=()
for program in "${programs[@]}"; do
    command -v "$program" >/dev/null || [[ -x "/usr/sbin/$program" ]] || missing+=("$program")
done
if ((${#missing[@]} == 0)); then
    echo "all of ${programs[*]} are here"
    exit 0
fi
apt-get update --quiet
# Debian starts a service once it is installed; these would be in the way of the tests' own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e "$policy" ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get install --yes --quiet --no-install-recommends slurmctld slurmd slurm-client munge openssh-server openssh-client \
    pdsh shellcheck iproute2
# Ubuntu has it as a snap only, which containers cannot run.
apt-get install --yes --quiet --no-install-recommends chromium || echo "no chromium here; tests that need it are skipped"
