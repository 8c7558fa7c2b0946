#!/usr/bin/env bash
# The test suite. --all adds what is left out otherwise: slow, fault, browser and peers.
# Every other argument goes to pytest: launch/test.sh -x -k kernel
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment runtime test report watch

markers="not slow and not fault and not browser and not peers"
if [[ "${1:-}" == --all ]]; then
  markers=""
  shift
fi

# pytest finds its configuration and the tests from the root of the checkout.
cd -- "$ROOT"

# With arguments it may be a part of the suite. A whole one that ran nothing on several ranks would
# be green for the wrong reason, and needs every kernel.
if [[ $# -eq 0 ]]; then
  set -- --require-marker=distributed
  "$VENV/bin/python" -m tests.compile_kernels
fi

exec "$VENV/bin/python" -m pytest -m "$markers" "$@"
