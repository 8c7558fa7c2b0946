#!/usr/bin/env bash
# What only a GPU can show: tests, then training steps beside those of other optimizers.
# Writes tests/bench/results/<device>.json. Fails where no test ran.
#   tests/gpu/run.sh            both
#   tests/gpu/run.sh tests ...  the tests alone; every other argument goes to pytest
#   tests/gpu/run.sh bench ...  the measurement alone; every other argument goes to it
# PYTHON chooses an interpreter, else it is the checkout's own environment or python3.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python="python3"
  [[ ! -x .venv/bin/python ]] || python=".venv/bin/python"
fi

run_tests() {
  "$python" -m pytest tests/gpu -m "" --require-marker=gpu "$@"
}

run_bench() {
  local name
  name="$("$python" -c 'import re, torch
assert torch.cuda.is_available(), "there is no GPU to measure"
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')"
  mkdir -p tests/bench/results
  "$python" -m offload_adam.bench.training --json "tests/bench/results/$name.json" "$@"
}

case "${1:-}" in
  tests) shift; run_tests "$@" ;;
  bench) shift; run_bench "$@" ;;
  "") run_tests; run_bench ;;
  *) echo "tests/gpu/run.sh: tests or bench, not $1" >&2; exit 2 ;;
esac
