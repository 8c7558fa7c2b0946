# shellcheck shell=bash
# Sourced by the scripts beside it. Sets ROOT and VENV, and defines
#   prepare_environment runtime [EXTRA...]   makes .venv with the package and these extras, pinned
#   find_torch                               sets TORCH_PYTHON, from .venv or the PATH
#   count_gpus                               prints how many GPUs torch may use

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
export LAUNCHED_AS="$0" # the name in the last line of launch/torchrun.py

fail() {
  printf '%s: %s\n' "$(basename -- "$0")" "$1" >&2
  exit 1
}

# Prints the newest Python that can make a virtual environment. Each candidate is run, because
# a name on the PATH can be a stub for a version that is not installed. The list of names ends
# where the pinned wheels end; plain python3 comes last and may be anything from 3.11 on.
find_python() {
  local candidate without_venv=""
  for candidate in ${PYTHON:+"$PYTHON"} python3.14 python3.13 python3.12 python3.11 python3; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
    without_venv="$candidate"
  done
  if [[ -n "$without_venv" ]]; then
    fail "$without_venv has no venv or ensurepip module; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  fail "no Python 3.11 or newer found; install one, or set PYTHON to its path"
}

# An environment cannot be moved, because its scripts name their interpreter in full. So its path is
# kept in the file made-at, which is written last: an interrupted creation is started again.
make_venv() {
  local python
  if "$VENV/bin/python" -c '' 2>/dev/null && [[ "$(cat -- "$VENV/made-at" 2>/dev/null)" == "$VENV" ]]; then
    return
  fi
  python="$(find_python)"
  printf 'creating %s with %s\n' "$VENV" "$("$python" --version)"
  "$python" -m venv --clear "$VENV"
  printf '%s\n' "$VENV" >"$VENV/made-at"
}

# A hash of what an install depends on.
fingerprint() {
  "$VENV/bin/python" -c '
import hashlib, pathlib, sys
content = b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])
print(hashlib.sha256(content).hexdigest())
' "$ROOT/pyproject.toml" "$ROOT/launch/constraints.txt"
}

# Each extra has a stamp, written after its install. A second run compares the stamps and installs
# nothing; an interrupted install is repeated. The package is editable: edits take effect at once.
prepare_environment() {
  local wanted extra extras="" names=""
  make_venv
  wanted="$(fingerprint)"
  for extra in "$@"; do
    if [[ "$(cat -- "$VENV/installed-$extra" 2>/dev/null)" != "$wanted" ]]; then
      names="$names $extra"
      [[ "$extra" == runtime ]] || extras="$extras,$extra"
    fi
  done
  [[ -n "$names" ]] || return 0

  printf 'installing offload-adam (%s) into %s\n' "${names# }" "$VENV"
  # The build backend first: without build isolation pip uses this one, pinned like the rest.
  pip_install setuptools
  pip_install --no-build-isolation --editable "$ROOT${extras:+[${extras#,}]}"
  for extra in $names; do
    printf '%s\n' "$wanted" >"$VENV/installed-$extra"
  done
}

pip_install() {
  local quiet="--quiet"
  [[ ! -t 1 ]] || quiet="" # a person sees the progress of long downloads
  "$VENV/bin/python" -m pip install ${quiet:+"$quiet"} --disable-pip-version-check \
    --constraint "$ROOT/launch/constraints.txt" "$@"
}

# Installs nothing: many nodes may start a job at once from one shared file system.
find_torch() {
  local torchrun
  if [[ -x "$VENV/bin/torchrun" ]]; then
    TORCH_PYTHON="$VENV/bin/python"
  else
    torchrun="$(command -v torchrun)" ||
      fail "no torchrun in $VENV or on the PATH; run launch/quickstart.sh once, or pip install offload-adam"
    TORCH_PYTHON="$(dirname -- "$torchrun")/python3"
    [[ -x "$TORCH_PYTHON" ]] || TORCH_PYTHON="$(command -v python3)"
  fi
}

# Asks torch rather than the driver, so that CUDA_VISIBLE_DEVICES and a CPU build count.
count_gpus() {
  "$TORCH_PYTHON" -c 'import torch; print(torch.cuda.device_count())'
}
