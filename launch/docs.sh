#!/usr/bin/env bash
# Builds the documentation into docs/_build/html. Every warning is an error. Arguments go to sphinx-build.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment runtime docs

# -n: a reference to a name without documentation is a warning.
"$VENV/bin/python" -m sphinx -W --keep-going -n -q "$@" -b html "$ROOT/docs" "$ROOT/docs/_build/html"
printf 'built %s\n' "$ROOT/docs/_build/html/index.html"
