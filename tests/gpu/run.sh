#!/usr/bin/env bash
# What only a GPU can show: tests, then training steps beside those of other optimizers.
# Results are written to $OUT, by default tests/bench/results. Fails where no test ran.
#   tests/gpu/run.sh            tests and bench
#   tests/gpu/run.sh tests ...  the tests alone; every other argument goes to pytest
#   tests/gpu/run.sh bench ...  the measurement alone; every other argument goes to it
#   tests/gpu/run.sh --time-limit SECONDS part-1   short tests first, then the machine's probe
#   tests/gpu/run.sh --time-limit SECONDS part-2   contenders at two batches of a 1.3 B model
# In a part each step is bounded, a failed step does not stop the next one, and the exit status is
# 0 only when all succeeded. Wheels in .whl/ are installed to a temporary folder first.
# PYTHON chooses an interpreter, else it is the checkout's own environment or python3.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python="python3"
  [[ ! -x .venv/bin/python ]] || python=".venv/bin/python"
fi
out="${OUT:-tests/bench/results}"
failed=()
time_limit=""
longest="tests/gpu/test_bits.py::test_a_thousand_steps_with_random_delays_give_the_sequential_bits"

run_tests() {
  "$python" -m pytest tests/gpu -m "" --require-marker=gpu "$@"
}

run_bench() {
  local name
  name="$("$python" -c 'import re, torch
assert torch.cuda.is_available(), "there is no GPU to measure"
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')"
  mkdir -p "$out"
  "$python" -m offload_adam.bench.training --json "$out/$name.json" "$@"
}

# step NAME SECONDS COMMAND...: runs a command for at most this long, and at most what is left.
step() {
  local name="$1" limit="$2" left=$((time_limit - SECONDS))
  shift 2
  [[ $limit -le $left ]] || limit=$left
  printf '\n== %s, at most %d s\n' "$name" "$limit"
  if [[ $limit -le 0 ]] || ! timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"; then
    failed+=("$name")
  fi
}

pytest_step() {
  local name="$1" limit="$2"
  shift 2
  step "$name" "$limit" "$python" -m pytest -m "" --require-marker=gpu -q --timeout=60 \
    -p no:cacheprovider "$@"
}

install_wheels() {
  compgen -G '.whl/*.whl' >/dev/null || return 0
  local site
  site="$(mktemp -d)"
  export PYTHONPATH="$PWD:$site"
  step wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --upgrade --target "$site" .whl/*.whl
}

part_1() {
  step warm_up 45 "$python" -m tests.gpu.warm_up
  pytest_step nccl 40 tests/gpu/test_nccl.py
  pytest_step side_stream 30 tests/gpu/test_side_stream.py
  pytest_step two_ranks 60 tests/gpu/test_two_ranks.py
  pytest_step tests 130 tests/gpu --deselect "$longest" --ignore=tests/gpu/test_nccl.py \
    --ignore=tests/gpu/test_side_stream.py --ignore=tests/gpu/test_two_ranks.py
  step probe 70 "$python" -m tests.gpu.probe "$out/probe.json"
}

part_2() {
  local left=$((time_limit - SECONDS))
  step training "$left" "$python" -m tests.gpu.training "$out/training.json" \
    --seconds $((left - 10))
}

run_part() {
  export PYTHONUNBUFFERED=1
  mkdir -p "$out"
  install_wheels
  "$1"
  [[ ${#failed[@]} -eq 0 ]] || { printf 'FAILED: %s\n' "${failed[*]}"; exit 1; }
}

if [[ "${1:-}" == --time-limit ]]; then
  time_limit="${2:?--time-limit takes seconds}"
  shift 2
fi

case "${1:-}" in
  tests) shift; run_tests "$@" ;;
  bench) shift; run_bench "$@" ;;
  part-1) time_limit="${time_limit:-340}"; run_part part_1 ;;
  part-2) time_limit="${time_limit:-280}"; run_part part_2 ;;
  "") run_tests; run_bench ;;
  *) echo "tests/gpu/run.sh: tests, bench, part-1 or part-2, not $1" >&2; exit 2 ;;
esac
