"""What this machine gives a run, what is wrong with it, and what to do about that.

examination      all findings in the order in which they are shown; start here
finding          one finding: ok, a warning or an error, with advice
processors       cores, threads and Numba
host_memory      memory, huge pages and NUMA nodes
devices          GPUs, pinned memory and the bus
storage          the disk that checkpoints are written to
network          collectives of the ranks that torchrun started
bandwidth        memory bandwidth by number of threads
step             bandwidth of a whole optimizer step
bandwidth_cache  measured bandwidths, kept for plans
tables           findings as tables for users
"""
