# shellcheck shell=bash disable=SC2034,SC2154  # variables that cross files
# Sourced by single_node.sh and multi_node.sh after $gpus is known: what a process has to be told before
# it starts. Everything that can be decided later is in the YAML.

# NUMA: a rank's optimizer state lies in host memory and is read and written at each step, so it
# belongs in the memory next to the rank's own GPU and cores. "node" rather than "exclusive": ranks
# of one node share its cores, and the package divides them. torchrun asks the GPU for its node and needs numactl.
numa_binding=""
if [[ "$gpus" -gt 0 ]]; then
  if command -v numactl >/dev/null; then
    numa_binding="--numa-binding=node"
  else
    printf 'warning: no numactl, so ranks are not bound to NUMA nodes; apt-get install numactl\n' >&2
  fi
fi

# Threads: 1 is what torchrun would set, with a warning. offload_adam does not take it for a choice: it plans
# its own and torch's threads from the cores that torchrun may use, the ranks that share them, and the cores
# that a rank is bound to. --optimizer.num_threads=N says otherwise.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Allocator: growing segments keep a long run from failing on fragmented device memory. A choice
# of the user's stands.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# Preemption: a scheduler that wants its machine back sends SIGTERM or SIGUSR1. torchrun passes it on to
# the ranks, which end after their step and save; it kills those that have not ended after this many
# seconds, so it has to be more than a step and a checkpoint take.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
# Left alone, torchrun would end at SIGUSR1 without a word to its ranks.
passed_on="--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
