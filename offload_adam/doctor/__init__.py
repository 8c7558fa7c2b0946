"""Checks of this machine before a run: what was found, and what to do about it.

examination      runs all checks in the order in which they are printed; start here
finding          one result: ok, warning or failed, with advice; the table of all results
host             cores, threads, Numba, memory, huge pages and NUMA nodes
devices          GPUs, pinned memory and the speed of the bus
storage          free space and write speed of the disk
network          collectives between the ranks that torchrun started
load             cores that other processes use during a measurement
bandwidth        measurements of host memory, of an optimizer step and of the bus
bandwidth_cache  file of measured bandwidths, read by training and by `offload-adam plan`
"""
