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
has_venv() {
  "$VENV/bin/python" -c '' 2>/dev/null && [[ "$(cat -- "$VENV/made-at" 2>/dev/null)" == "$VENV" ]]
}

make_venv() {
  local python
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

# Prints those of the extras that are not installed. Each extra has a stamp, written after its install.
missing_extras() {
  local wanted="" extra
  ! has_venv || wanted="$(fingerprint)"
  for extra in "$@"; do
    [[ -n "$wanted" && "$(cat -- "$VENV/installed-$extra" 2>/dev/null)" == "$wanted" ]] || printf '%s ' "$extra"
  done
}

# A second run installs nothing and writes nothing; an interrupted install is repeated.
prepare_environment() {
  [[ -n "$(missing_extras "$@")" ]] || return 0
  [[ -w "$ROOT" ]] || fail "$ROOT is not writable, so nothing can be installed into $VENV; run this script once where it is writable"
  # Of two first runs at once, the second one waits. The lock is on this file, so that none is left
  # behind. Children inherit it: an install that outlives its killed script still holds it.
  (
    lock_environment
    install "$@"
  ) 9>>"$ROOT/launch/environment.sh"
}

lock_environment() {
  if ! command -v flock >/dev/null || flock --nonblock 9; then
    return
  fi
  printf 'waiting for another process that installs into %s\n' "$VENV"
  flock 9 || printf 'warning: no lock on this file system; start only one script at once\n' >&2
}

# The package is editable: edits take effect at once.
install() {
  local names name extras="" info wanted
  has_venv || make_venv
  names="$(missing_extras "$@")"
  [[ -n "$names" ]] || return 0
  wanted="$(fingerprint)"
  for name in $names; do
    [[ "$name" == runtime ]] || extras="$extras,$name"
  done
  # pip writes INSTALLER after the files of a package. It takes a package without it, whose install
  # was interrupted, for complete.
  for info in "$VENV"/lib/python*/site-packages/*.dist-info; do
    [[ -e "$info/INSTALLER" ]] || rm -rf -- "$info"
  done

  printf 'installing offload-adam (%s) into %s\n' "${names% }" "$VENV"
  # The build backend first: without build isolation pip uses this one, pinned like the rest.
  pip_install setuptools
  pip_install --no-build-isolation --editable "$ROOT${extras:+[${extras#,}]}"
  for name in $names; do
    printf '%s\n' "$wanted" >"$VENV/installed-$name"
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
      fail "no torchrun in $VENV or on the PATH; run launch/quickstart.sh once, or pip install -e . in $ROOT"
    TORCH_PYTHON="$(dirname -- "$torchrun")/python3"
    [[ -x "$TORCH_PYTHON" ]] || TORCH_PYTHON="$(command -v python3)"
  fi
}

# Asks torch rather than the driver, so that CUDA_VISIBLE_DEVICES and a CPU build count.
count_gpus() {
  "$TORCH_PYTHON" -c 'import torch; print(torch.cuda.device_count())'
}
