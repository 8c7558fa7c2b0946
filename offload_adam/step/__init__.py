"""One step: reduce gradients, agree, clip or skip, update bucket by bucket.

step             ShardedAdam: construction and the step, top-down; start here
backward_hooks   hooks that pass gradients to the reducer during backward
reducer          when each bucket's gradients are reduced, and what `.grad` holds afterwards
executor         which thread runs each task, and which thread or stream waits for it
update_pipeline  updates of several buckets on two threads, without a pause of the kernels
update_thread    a thread that runs jobs: that of the kernels, and the one that serves it
update_tasks     norm, update, H2D copy and all-gather of one bucket, and their stream waits
host_update      the update of state in host memory
device_update    norm and update of state on a device, bucket by bucket
foreach_update   the update there in float64, for what the fused kernel cannot do
fused_update     the update there by torch's fused kernel, in float32
device_norm      sums of squares on a device
messages         inputs, decision, report and errors of a step
forward_waits    forward hooks: each unit of a model waits for its own buckets
unshard_waits    FSDP2 waits for a unit's buckets before it gathers the unit
external_edits   finds weights that the user modified, and syncs their master weights
version_watch    parameters that were written in place, or whose data or object were replaced
snapshot_lock    makes updates wait for a background checkpoint that still reads the state
absence          warns about parameters that never get a gradient
build            allocates the state of new parameters
ledger           bytes by category, bucket and device
"""
