"""The control plane: how ranks start, agree and end together.

startup      join the ranks that torchrun started; errors that a restart cannot fix
ranks        RankGroup: rank, size, our process groups, and waits for collectives
admission    raise an error on all ranks; compare settings over ranks
agreement    the one all-reduce of a step
node_memory  check that the state of a node's ranks fits into its memory
progress     where this process is, and the record of it for its peers
watchdog     heartbeats through the store; detects failed ranks
verdicts     which ranks have failed, from their records, and the error for users
endings      end in bounded time after a failure; save and end after a signal
waiting      the loop behind every wait that must not hang
"""
