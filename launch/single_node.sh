#!/usr/bin/env bash
# Trains on all GPUs of this machine: launch/single_node.sh CONFIG [--section.key=value ...]
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
[[ $# -gt 0 ]] || fail "give a configuration, for example configs/quickstart.yaml"
find_torch

gpus="$(count_gpus)"
ranks="${RANKS_PER_NODE:-$gpus}"
[[ "$ranks" -gt 0 ]] || fail "torch sees no GPU here; set RANKS_PER_NODE to train on the CPU"

# shellcheck source=launch/settings.sh
source "$ROOT/launch/settings.sh"

# --standalone: a store on a free port, so that two jobs on one machine do not collide.
# MAX_RESTARTS: how often a failed run is restarted, from its newest checkpoint.
exec "$TORCH_PYTHON" "$ROOT/launch/torchrun.py" --standalone --nproc-per-node="$ranks" \
  "$passed_on" ${MAX_RESTARTS:+--max-restarts="$MAX_RESTARTS"} ${numa_binding:+"$numa_binding"} \
  -m offload_adam train "$@"
