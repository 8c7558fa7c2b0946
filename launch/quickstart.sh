#!/usr/bin/env bash
# Trains a small GPT on the source of Python's own standard library. Needs only Python 3.11 or newer.
# Arguments override keys of the configuration: --train.num_steps=20
# The run writes its files below the current folder.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment runtime report
find_torch

# One rank per GPU. Without a GPU two ranks, the fewest that shard anything.
ranks="$(count_gpus)"
[[ "$ranks" -gt 0 ]] || ranks=2

# torchrun would set the same with a warning. offload_adam chooses its own and torch's threads regardless.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec "$TORCH_PYTHON" "$ROOT/launch/torchrun.py" --standalone --nproc-per-node="$ranks" \
  -m offload_adam train "$ROOT/configs/quickstart.yaml" "$@"
