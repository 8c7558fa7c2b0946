"""Parameters, their groups, and their buckets.

selection    select parameters to optimize, and reject unsupported ones; start here
groups       check parameter groups, read their hyperparameters, detect later edits
local_shard  parameters that FSDP2 or tensor parallelism has sharded
bucket       BucketState: one bucket's flat tensor, its state and its segments
elements     supported dtypes, and the order of a tensor's elements in memory
"""
