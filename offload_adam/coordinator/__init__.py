"""The control plane: how ranks start, agree, detect failed peers, and exit.

launcher     rank and world size that torchrun's environment variables give
startup      join the ranks that torchrun started; errors that a restart cannot fix
ranks        RankGroup: rank, size, our process groups, and waits for collectives
rank_checks  raise an error on all ranks; compare settings over ranks
agreement    the one all-reduce of a step
node_memory  check that the state of a node's ranks fits into its memory
progress     phase and step of the training thread, which every rank publishes to its peers
watchdog     heartbeats through the store; detects failed ranks
verdicts     decide from the ranks' records which ranks have failed; the errors for users
shutdown     exit in bounded time after a failure; save and exit after a signal
waiting      the polling loop of every wait that must not hang
"""
