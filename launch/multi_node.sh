#!/usr/bin/env bash
# Trains on several machines. Start the same line on each of them, with the same variables:
#   NUM_NODES=2 HEAD_NODE=first-machine launch/multi_node.sh CONFIG [--section.key=value ...]
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
[[ $# -gt 0 ]] || fail "give a configuration, for example configs/quickstart.yaml"
[[ -n "${NUM_NODES:-}" ]] || fail "set NUM_NODES to the number of machines in the job"
[[ -n "${HEAD_NODE:-}" ]] || fail "set HEAD_NODE to the name or address of one machine, the same everywhere"
find_torchrun

gpus="$(count_gpus)"
ranks="${RANKS_PER_NODE:-$gpus}"
[[ "$ranks" -gt 0 ]] || fail "torch sees no GPU here; set RANKS_PER_NODE to train on the CPU"

# shellcheck source=launch/settings.sh
source "$ROOT/launch/settings.sh"

# A machine with several networks may pick one that the others cannot reach. Where connecting hangs,
# name the interface once, and both libraries use it.
if [[ -n "${NETWORK_INTERFACE:-}" ]]; then
  export NCCL_SOCKET_IFNAME="$NETWORK_INTERFACE" GLOO_SOCKET_IFNAME="$NETWORK_INTERFACE"
fi

# torchrun takes this machine for the head node only where its own name resolves to that address; binding
# to the address tells in every case.
is_head=false
if "$TORCH_PYTHON" -c 'import socket, sys; socket.create_server((sys.argv[1], 0))' "$HEAD_NODE" 2>/dev/null; then
  is_head=true
fi

# --rdzv-backend=c10d: the machines find each other over TCP and agree on the ranks; no machine has a
#   number of its own, so the line is the same on all.
# MAX_RESTARTS: how often a run that has failed is started again, from its newest checkpoint.
# LOCAL_ADDRESS: where the other machines reach this one, if its name does not resolve to that.
# --rdzv-id: keeps two jobs apart that share a head node.
exec "$TORCHRUN" --nnodes="$NUM_NODES" --nproc-per-node="$ranks" \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD_NODE:${HEAD_PORT:-29500}" \
  --rdzv-conf="is_host=$is_head" --rdzv-id="${JOB_ID:-offload-adam}" \
  "$passed_on" ${MAX_RESTARTS:+--max-restarts="$MAX_RESTARTS"} \
  ${LOCAL_ADDRESS:+--local-addr="$LOCAL_ADDRESS"} \
  ${numa_binding:+"$numa_binding"} -m offload_adam train "$@"
