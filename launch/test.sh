#!/usr/bin/env bash
# Runs the test suite. --all includes the tests marked slow, fault, browser or peers.
# Every other argument goes to pytest: launch/test.sh -x -k kernel
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment runtime test fuzz report watch integrations

markers="not slow and not fault and not browser and not peers"
if [[ "${1:-}" == --all ]]; then
  markers=""
  shift
fi

# pytest finds its configuration and the tests from the root of the checkout.
cd -- "$ROOT"

# Without arguments this is the whole suite, which must not pass without a single distributed test.
# It needs every kernel, so they are compiled first.
if [[ $# -eq 0 ]]; then
  set -- --require-marker=distributed
  "$VENV/bin/python" -m tests.compile_kernels
fi

exec "$VENV/bin/python" -m pytest -m "$markers" "$@"
