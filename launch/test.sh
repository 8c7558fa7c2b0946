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

# A whole suite that ran nothing on several ranks would be green for the wrong reason. With
# arguments it may be a part of the suite.
[[ $# -gt 0 ]] || set -- --require-marker=distributed

# pytest finds its configuration and the tests from the root of the checkout.
cd -- "$ROOT"
exec "$VENV/bin/python" -m pytest -m "$markers" "$@"
