"""One step: reduce gradients, agree, clip or skip, update bucket by bucket.

step             ShardedAdam: the step, top-down; start here
reducer          from `.grad` over the reduction to the gradient shard
executor         when, and on which thread, a task runs; update_thread is that thread
tasks            one task on one bucket, with the waits of layout.schedule
host_update      the update where the state is in host memory
device_update    the update where the state is on a device
messages         what a step is told, decides and reports, and its errors
forward_waits    hooks that let each unit of a model wait for its own buckets
external_edits   weights that users changed; snapshot_lock keeps updates off a checkpoint
build            construction; ledger counts its bytes
"""
