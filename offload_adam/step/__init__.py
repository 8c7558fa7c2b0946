"""One step: reduce gradients, agree, clip or skip, update bucket by bucket.

step             ShardedAdam: construction and the step, top-down; start here
backward_hooks   tell the reduction of each gradient and of the end of a backward
reducer          which bucket is sent when, and what `.grad` holds afterwards
executor         on which thread tasks run, and what waits for them; update_thread is that thread
update_tasks     sum, update, H2D copy and gather of one bucket, with the waits of layout.schedule
host_update      the update where the state is in host memory
device_update    the update where the state is on a device
messages         what a step is told, decides and reports, and its errors
forward_waits    hooks that let each unit of a model wait for its own buckets
external_edits   weights that users changed; snapshot_lock keeps updates off a checkpoint
absence          a warning about parameters that never get a gradient
build            the state of new parameters; ledger counts bytes
"""
