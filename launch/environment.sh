# shellcheck shell=bash
# Sourced by the scripts beside it. Sets ROOT and VENV, and defines
#   prepare_environment runtime [EXTRA...]   makes .venv with the package and these extras, pinned
#   find_torchrun                            sets TORCHRUN and TORCH_PYTHON, from .venv or the PATH
#   count_gpus                               prints how many GPUs torch may use

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"

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

# The path is kept beside the environment because one cannot be moved: its scripts name their
# interpreter in full. It is written last, so that an interrupted making is begun again.
make_venv() {
  local python
  if "$VENV/bin/python" -c '' 2>/dev/null && [[ "$(cat -- "$VENV/made-at" 2>/dev/null)" == "$VENV" ]]; then
    return
  fi
  python="$(find_python)"
  printf 'making %s with %s\n' "$VENV" "$("$python" --version)"
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

# Each extra has a stamp, written after its install: a second run compares stamps and installs
# nothing, and an interrupted install is done again. The package is installed as editable, so
# that edits of the source take effect at once.
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
  # The build backend comes first: without build isolation pip takes it from here, pinned like the rest.
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
find_torchrun() {
  # shellcheck disable=SC2034  # TORCHRUN is for the script that sources this
  if [[ -x "$VENV/bin/torchrun" ]]; then
    TORCHRUN="$VENV/bin/torchrun"
    TORCH_PYTHON="$VENV/bin/python"
  else
    TORCHRUN="$(command -v torchrun)" ||
      fail "no torchrun in $VENV or on the PATH; run launch/quickstart.sh once, or pip install offload-adam"
    TORCH_PYTHON="$(dirname -- "$TORCHRUN")/python3"
    [[ -x "$TORCH_PYTHON" ]] || TORCH_PYTHON="$(command -v python3)"
  fi
}

# Asks torch rather than the driver, so that CUDA_VISIBLE_DEVICES and a CPU build count.
count_gpus() {
  "$TORCH_PYTHON" -c 'import torch; print(torch.cuda.device_count())'
}
