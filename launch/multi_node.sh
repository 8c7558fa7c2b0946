#!/usr/bin/env bash
# Trains on several machines. Run the same command on each of them, with the same variables:
#   NUM_NODES=2 HEAD_NODE=first-machine launch/multi_node.sh CONFIG [--section.key=value ...]
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
[[ $# -gt 0 ]] || fail "give a configuration, for example configs/quickstart.yaml"
[[ -n "${NUM_NODES:-}" ]] || fail "set NUM_NODES to the number of machines in the job"
[[ -n "${HEAD_NODE:-}" ]] || fail "set HEAD_NODE to the name or address of one machine, the same everywhere"
find_torch

gpus="$(count_gpus)"
ranks="${RANKS_PER_NODE:-$gpus}"
[[ "$ranks" -gt 0 ]] || fail "torch sees no GPU here; set RANKS_PER_NODE to train on the CPU"

# shellcheck source=launch/settings.sh
source "$ROOT/launch/settings.sh"

# A machine with several networks may pick one that the others cannot reach. If connecting hangs,
# set NETWORK_INTERFACE; NCCL and gloo both use it.
if [[ -n "${NETWORK_INTERFACE:-}" ]]; then
  export NCCL_SOCKET_IFNAME="$NETWORK_INTERFACE" GLOO_SOCKET_IFNAME="$NETWORK_INTERFACE"
fi

# torchrun recognizes the head node only if its host name resolves to HEAD_NODE. Binding a socket to
# HEAD_NODE works in every case.
is_head=false
if "$TORCH_PYTHON" -c 'import socket, sys; socket.create_server((sys.argv[1], 0))' "$HEAD_NODE" 2>/dev/null; then
  is_head=true
fi

# --rdzv-backend=c10d: the machines find each other over TCP and agree on the ranks. No machine has
#   a fixed number, so the command is the same on all.
# MAX_RESTARTS: how often a failed run is restarted, from its newest checkpoint.
# LOCAL_ADDRESS: the address of this machine, if its host name resolves to another one.
# --rdzv-id: separates two jobs that share a head node.
exec "$TORCH_PYTHON" "$ROOT/launch/torchrun.py" --nnodes="$NUM_NODES" --nproc-per-node="$ranks" \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD_NODE:${HEAD_PORT:-29500}" \
  --rdzv-conf="is_host=$is_head" --rdzv-id="${JOB_ID:-offload-adam}" \
  "$passed_on" ${MAX_RESTARTS:+--max-restarts="$MAX_RESTARTS"} \
  ${LOCAL_ADDRESS:+--local-addr="$LOCAL_ADDRESS"} \
  ${numa_binding:+"$numa_binding"} -m offload_adam train "$@"
