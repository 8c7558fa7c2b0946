#!/usr/bin/env bash
# Runs the tests that need a GPU, then `bench train`.
# Writes results to $OUT, by default tests/bench/results. Fails if no test ran.
#   tests/gpu/run.sh            tests, then bench even if tests failed
#   tests/gpu/run.sh tests ...  only the tests; other arguments go to pytest
#   tests/gpu/run.sh bench ...  only `bench train`; other arguments go to it
#   tests/gpu/run.sh --time-limit SECONDS part-1       short tests, and probes of the machine
#   tests/gpu/run.sh --time-limit SECONDS part-2 ...   contenders at two batches of a 1.3 B model;
#                               other arguments go to `bench train`
#   tests/gpu/run.sh --time-limit SECONDS long         a thousand steps with random delays
# Each step of a part has a limit: its share of the time that is left, so later steps get the unused
# time. The next step runs even if a step fails. The exit status is 0 only if all steps succeed.
# A part writes a log of all steps, a line of JSON for each test as soon as it ends, and reports of
# measurements, updated after each value or contender.
# Needs torch, numba, numpy, psutil and pytest only. Wheels in .whl/ are first installed to a
# temporary folder. PYTHON is the interpreter; default: .venv of this checkout, or python3.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python="python3"
  [[ ! -x .venv/bin/python ]] || python=".venv/bin/python"
fi
out="${OUT:-tests/bench/results}"
long_test="tests/gpu/test_bits.py::test_a_thousand_steps_with_random_delays_give_the_sequential_bits"

# Each step of a part: its name, its weight for the share of time, and its command. A process of
# pytest takes seconds to start, so short files share one; a file that may hang or crash does not.
# The first steps need no kernels: they run while the kernels compile.
part_1=(
  "nccl 50 pytest test_nccl.py"
  "bus 50 probe bus"
  "kernels 45 wait"
  "two_ranks 60 pytest test_two_ranks.py"
  "streams 40 pytest test_side_stream.py test_memory.py"
  "bits 50 pytest test_bits.py --deselect=$long_test"
  "use 50 pytest test_adam_on_cuda.py test_optimizer_on_cuda.py test_use.py"
  "overlap 50 pytest test_overlap.py"
  "update 50 probe update"
)
part_2=("training 1 train")
long=("long 1 pytest ${long_test#tests/gpu/}")

run_tests() {
  "$python" -m pytest tests/gpu "${pytest_options[@]}" "$@"
}

run_bench() {
  local name
  name="$("$python" -c 'import re, torch
assert torch.cuda.is_available(), "there is no GPU to measure"
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')"
  mkdir -p "$out"
  "$python" -m offload_adam.bench train --json "$out/$name.json" "$@"
}

# The options in pyproject.toml need pytest-timeout. Without it, a test that hangs ends when the
# limit of its step kills the step. The log has the stacks in both cases.
pytest_options=(-o addopts= -m "" --require-marker=gpu -ra)
if "$python" -c 'import pytest_timeout' 2>/dev/null; then
  pytest_options+=(--timeout=60)
fi

# bounded SECONDS COMMAND...: runs a command with a time limit, and appends its output to the log.
# It uses no pipe: a process that outlives the command would keep the pipe open.
bounded() {
  timeout --kill-after=5 "$@" >>"$log" 2>&1
}

run_step() {
  local limit="$1" kind="$2"
  shift 2
  case "$kind" in
    pytest) bounded "$limit" "$python" -m pytest "${pytest_options[@]}" -v -p no:cacheprovider \
      -o faulthandler_timeout=40 --results="$lines" "${@/#test_/tests/gpu/test_}" ;;
    probe) bounded "$limit" "$python" -m tests.gpu.probe "$1" "$out/$1.json" ;;
    wait) bounded "$limit" tail --pid="$warm_up" -f /dev/null ;;
    train) bounded "$limit" "$python" -m offload_adam.bench train --json "$out/training.json" \
      --num-layers 24 --width 2048 --num-heads 16 --vocabulary 32000 --batches 48,144 \
      --num-steps 3 --time-limit $((limit - 15)) "${more[@]}" ;;
  esac
}

# Compiles the kernels in the background, on one core. Other processes load the compiled ones.
start_warm_up() {
  timeout "$time_limit" "$python" -m tests.gpu.warm_up >"$out/warm_up.log" 2>&1 &
  warm_up=$!
}

install_wheels() {
  compgen -G '.whl/*.whl' >/dev/null || return 0
  local site
  site="$(mktemp -d)"
  export PYTHONPATH="$PWD:$site"
  bounded 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --upgrade --target "$site" .whl/*.whl || failed+=(wheels)
}

# part NAME STEP...: runs all steps, each within its share of the time that is left.
part() {
  local name="$1" step weight words total=0 start status
  shift
  export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  mkdir -p "$out"
  log="$out/$name.log" lines="$out/$name.jsonl"
  rm -f -- "$log" "$lines"
  failed=()
  install_wheels
  start_warm_up
  for step in "$@"; do
    read -r _ weight _ <<<"$step"
    total=$((total + weight))
  done
  for step in "$@"; do
    read -ra words <<<"$step"
    local limit=$(((time_limit - SECONDS) * words[1] / total))
    total=$((total - words[1]))
    printf '\n== %s, at most %d s\n' "${words[0]}" "$limit" >>"$log"
    start=$SECONDS status=0
    if [[ $limit -le 0 ]]; then
      status=124
    else
      run_step "$limit" "${words[@]:2}" || status=$?
    fi
    [[ $status -eq 0 ]] || failed+=("${words[0]}")
    printf '== %s ended with %d after %d s\n' "${words[0]}" "$status" $((SECONDS - start)) \
      >>"$log"
    tail -n 12 "$log"
  done
  # Kill the warm-up if it still runs: no step is left that could need it.
  kill "$warm_up" 2>/dev/null || wait "$warm_up" || failed+=(warm_up)
  [[ ${#failed[@]} -eq 0 ]] || { printf 'FAILED: %s\n' "${failed[*]}"; exit 1; }
}

time_limit=""
if [[ "${1:-}" == --time-limit ]]; then
  time_limit="${2:?--time-limit takes seconds}"
  shift 2
fi
more=("${@:2}")

case "${1:-}" in
  tests) shift; run_tests "$@" ;;
  bench) shift; run_bench "$@" ;;
  part-1) time_limit="${time_limit:-340}"; part part-1 "${part_1[@]}" ;;
  part-2) time_limit="${time_limit:-280}"; part part-2 "${part_2[@]}" ;;
  long) time_limit="${time_limit:-120}"; part long "${long[@]}" ;;
  "") status=0; run_tests || status=$?; run_bench; exit "$status" ;;
  *) echo "tests/gpu/run.sh: tests, bench, part-1, part-2 or long, not $1" >&2; exit 2 ;;
esac
