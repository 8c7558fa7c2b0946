# shellcheck shell=bash disable=SC2034,SC2154  # variables that cross files
# Sourced by single_node.sh and multi_node.sh once $gpus is set. Holds the settings that a process
# needs before it starts; all others are in the YAML.

# NUMA: each step reads and writes a rank's optimizer state in host memory, so it should lie in the
# memory next to the rank's own GPU and cores. "node", not "exclusive": the ranks of one NUMA node
# share its cores, and the package divides them. torchrun finds the GPU's NUMA node and needs numactl.
numa_binding=""
if [[ "$gpus" -gt 0 ]]; then
  if ! command -v numactl >/dev/null; then
    printf 'warning: no numactl, so ranks are not bound to NUMA nodes; apt-get install numactl\n' >&2
  # Containers forbid what numactl does, by default, and ranks would not start.
  elif ! numactl --localalloc true 2>/dev/null; then
    printf 'warning: numactl fails here, so ranks are not bound to NUMA nodes; give the container SYS_NICE\n' >&2
  else
    numa_binding="--numa-binding=node"
  fi
fi

# Threads: torchrun would set 1 with a warning. offload_adam ignores the value: it chooses its own and
# torch's threads from the cores that torchrun may use, the ranks that share them, and the cores that
# a rank is bound to. --optimizer.num_threads=N overrides this.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Allocator: growing segments keep a long run from failing on fragmented device memory. A value that
# is set already is kept.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# Preemption: a scheduler that needs the machine sends SIGTERM or SIGUSR1. torchrun passes it on to the
# ranks, which end after the current step with a checkpoint. torchrun kills ranks that still run after
# this many seconds, so it must exceed the time of a step and a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
# By default torchrun ends at SIGUSR1 without passing it on to its ranks.
passed_on="--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
