#!/usr/bin/env bash
# Trains a small GPT on the source of Python's own standard library, from a machine with nothing but
# Python 3.11 or newer. Arguments are overrides of the configuration: --train.num_steps=20
# The run is written below the current folder.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment runtime report
find_torchrun

# A rank for each GPU. Without one, two ranks: the least that shards anything.
ranks="$(count_gpus)"
[[ "$ranks" -gt 0 ]] || ranks=2

# What torchrun would set with a warning. offload_adam plans its own and torch's threads whatever this says.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec "$TORCHRUN" --standalone --nproc-per-node="$ranks" \
  -m offload_adam train "$ROOT/configs/quickstart.yaml" "$@"
