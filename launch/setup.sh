#!/usr/bin/env bash
# Makes the project's Python environment, or brings it up to date; does nothing when it already is.
#
#   bash launch/setup.sh           what training needs
#   bash launch/setup.sh --quickstart  and PEFT, whose plain LoRA the quickstart shows beside AdaLoRA
#   bash launch/setup.sh --test    and what the tests need (PEFT too)
#
# torch: with an NVIDIA GPU the base Python's CUDA torch is kept when it fits (a container's), else one is installed;
# without a GPU the tested version is. The default package index may serve a CUDA build of several GB for that: name an
# index of CPU wheels in ADALORA_TORCH_INDEX_URL to avoid it.
#
#   ADALORA_VENV             the environment's folder (default: .venv beside pyproject.toml)
#   ADALORA_PYTHON           the Python to build it from (default: the first of python3, python, python3.1x from 3.11 on)
#   ADALORA_TORCH            another pip requirement for torch, as on a login node: ADALORA_TORCH='torch>=2.11,<2.16'
#   ADALORA_TORCH_INDEX_URL  package index for torch alone
set -euo pipefail

TORCH_RANGE="torch>=2.11,<2.16"    # pyproject.toml says the same
TORCH_WITHOUT_GPU="torch==2.13.0"  # the version the tests pass with

say() { printf '%s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${ADALORA_VENV:-$root/.venv}"
[[ "$venv" == /* ]] || venv="$PWD/$venv"
python="$venv/bin/python"
stamp="$venv/.adalora-setup"

extra=""
for argument in "$@"; do
    case "$argument" in
        --test) extra="test" ;;
        --quickstart) extra="quickstart" ;;
        -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) die "unknown argument '$argument'; launch/setup.sh takes --quickstart, --test or nothing" ;;
    esac
done

# The stamp holds the key of what was installed, then the extra. A moved project has another key: its editable install
# points to the old place.
key="$({ printf '%s\n' "$root" "${ADALORA_TORCH:-}"; cat "$root/pyproject.toml" "$root/constraints.txt"; } | sha256sum | cut -d ' ' -f 1)"
up_to_date() {
    local done_key done_extra
    [[ -x "$python" && -f "$stamp" ]] || return 1
    read -r done_key done_extra <"$stamp" || true
    [[ "$done_key" == "$key" && ( -z "$extra" || "$done_extra" == "$extra" || "$done_extra" == "test" ) ]]
}
if up_to_date; then
    say "Environment $venv is up to date."
    exit 0
fi

# One set-up at a time for one project: a second one waits, then usually finds nothing left to do.
if command -v flock >/dev/null; then
    exec 9<"$root"
    flock --nonblock 9 || { say "Another set-up is running; waiting for it."; flock 9; }
    if up_to_date; then
        say "Environment $venv is up to date."
        exit 0
    fi
fi

started=$SECONDS
has_gpu() { command -v nvidia-smi >/dev/null && timeout 30 nvidia-smi -L >/dev/null 2>&1; }
python_fits() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Exits 0 if the torch this Python imports lies within TORCH_RANGE and, when asked for with "cuda", is a CUDA build.
torch_fits() {
    "$1" - "${2:-}" >/dev/null 2>&1 <<'PYTHON'
import sys, torch
ok = torch.__version__ >= "2.11" and torch.__version__ < "2.16"  # TorchVersion compares as PEP 440 does
sys.exit(not (ok and (sys.argv[1] != "cuda" or torch.version.cuda)))
PYTHON
}

base=""
candidates=(python3 python python3.11 python3.12 python3.13)
if [[ -n "${ADALORA_PYTHON:-}" ]]; then candidates=("$ADALORA_PYTHON"); fi
for candidate in "${candidates[@]}"; do
    if python_fits "$candidate"; then
        base="$candidate"
        break
    fi
done
[[ -n "$base" ]] || die "no Python 3.11 or newer found (tried ${candidates[*]}); install one, or name it in ADALORA_PYTHON"

gpu="" machine="no NVIDIA GPU"
if has_gpu; then gpu="yes" machine="NVIDIA GPU found"; fi
say "Setting up $venv ($machine; the first time takes 1 to 10 minutes)."

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
export DS_BUILD_OPS=0  # DeepSpeed compiles what it needs when it needs it; its build then wants neither torch nor nvcc
unset PIP_CONSTRAINT   # some containers pin numpy and others there; constraints.txt is what was tested

# install WHAT ARGUMENTS...: pip install, its log in a file and its progress in a few lines.
install() {
    local what="$1" log began=$SECONDS line found=0 status wipe=""
    shift
    log="$(mktemp "${TMPDIR:-/tmp}/adalora-setup.XXXXXX.log")"
    say "Installing $what"
    if [[ -t 1 ]]; then wipe=$'\r\033[K'; fi
    set +e
    "$python" -m pip install --progress-bar off "$@" 2>&1 | tee "$log" | while IFS= read -r line; do
        case "$line" in
            Collecting*)
                found=$((found + 1))
                if [[ -n "$wipe" ]]; then printf '%s  %d packages looked up' "$wipe" "$found"; fi
                ;;
            *Downloading*[0-9][0-9].[0-9]\ MB* | *Downloading*[0-9]\ GB*) printf '%s  %s\n' "$wipe" "${line#"${line%%[![:space:]]*}"}" ;;
            Building\ wheel* | Installing\ collected*) printf '%s  %s\n' "$wipe" "${line%%:*}" ;;
        esac
    done
    status=${PIPESTATUS[0]}
    set -e
    if ((status)); then
        line="$(grep -m 1 -E '^ *(ERROR|error):' "$log" || tail -n 1 "$log")"
        die "installing $what failed: ${line#ERROR: }; the log is $log; once that is mended, run launch/setup.sh again"
    fi
    rm -f "$log"
    say "  done in $((SECONDS - began)) s"
}

if [[ -e "$venv" && ! -f "$venv/pyvenv.cfg" && -n "$(ls -A "$venv" 2>/dev/null)" ]]; then
    die "$venv exists and is not a Python environment; remove it, or name another folder in ADALORA_VENV"
fi
if ! python_fits "$python"; then
    options=(--clear)
    if [[ -n "$gpu" ]] && torch_fits "$base" cuda; then
        say "The CUDA torch of $base is kept."
        options+=(--system-site-packages)
    fi
    if "$base" -c 'import ensurepip' 2>/dev/null; then
        "$base" -m venv "${options[@]}" "$venv" || die "could not make $venv; see the lines above"
    else
        # Debian and Ubuntu, and PyTorch's own images, split ensurepip off: pip can install itself into the environment.
        "$base" -m venv --without-pip "${options[@]}" "$venv" || die "could not make $venv; see the lines above"
        "$base" -m pip --python "$python" install --quiet --ignore-installed pip ||
            die "$base can make no environment; install its venv package (Debian, Ubuntu: python3-venv)"
    fi
fi
rm -f "$stamp"

index=()
if [[ -n "${ADALORA_TORCH_INDEX_URL:-}" ]]; then index=(--index-url "$ADALORA_TORCH_INDEX_URL"); fi
if [[ -n "${ADALORA_TORCH:-}" ]]; then
    install "$ADALORA_TORCH" "${index[@]}" "$ADALORA_TORCH"
elif torch_fits "$python"; then
    if [[ -n "$gpu" ]] && ! torch_fits "$python" cuda; then
        say "warning: $venv holds a torch without CUDA; to use the GPU remove $venv and run this again"
    fi
elif [[ -n "$gpu" ]]; then
    install "$TORCH_RANGE" "${index[@]}" "$TORCH_RANGE"
else
    install "$TORCH_WITHOUT_GPU" "${index[@]}" "$TORCH_WITHOUT_GPU"
fi

# The torch chosen above must survive the next step, whatever a dependency would prefer.
chosen="$(mktemp)"
trap 'rm -f "$chosen"' EXIT
"$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$chosen" ||
    die "torch is missing from $venv after its installation; remove $venv and run this again"
extras="$extra${gpu:+${extra:+,}gpu}"  # preflight asks GPUs for their health
install "the project and its dependencies${extra:+ with the $extra extra}" \
    --constraint "$root/constraints.txt" --constraint "$chosen" --editable "$root${extras:+[$extras]}"

"$python" - <<'PYTHON' || die "the new environment cannot import torch; remove $venv and run this again"
import platform, torch
from importlib.metadata import version
device = f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU" if torch.cuda.is_available() else "CPU"
print(f"Python {platform.python_version()}, torch {torch.__version__} ({device}), transformers {version('transformers')}, "
      f"DeepSpeed {version('deepspeed')}")
PYTHON
printf '%s %s\n' "$key" "$extra" >"$stamp"
say "Ready in $((SECONDS - started)) s. To use it: source ${venv#"$PWD/"}/bin/activate"
