"""What the names in a report mean."""

from __future__ import annotations

from offload_adam.layout.budget import Category
from offload_adam.profiling.peak import REST
from offload_adam.profiling.phases import EXPOSED, LATE

GLOSSARY = {
    # Phases.
    "data": "Read a batch of data.",
    "forward": "The model's forward.",
    "backward": "The model's backward.",
    "loss": "Read the loss, when the work that it depends on is done.",
    "step": "The part of the optimizer's step() that is in no other phase.",
    "other": "The part of a training step that is in no other phase.",
    "pack": "Copy the gradients of a bucket into one slot.",
    "reduce": "Wait until the gradients of all ranks are averaged (reduce-scatter).",
    "agree": "A small all-reduce, in which the ranks agree on the norm of the gradients, on "
    "clipping, and on whether to skip the step.",
    "all-reduce": "Average the loss over the ranks.",
    "gather": "Get updated parameters from the ranks that updated them (all-gather).",
    "D2H copy": "Wait until a bucket's gradients are in host memory, and cast or add them.",
    "H2D copy": "Copy a bucket's updated parameters from the host to the device.",
    "norm": "Sum up the squares of the gradients.",
    "update": "Update a bucket on the CPU.",
    "device update": "Launch the update of a bucket whose state is on the device.",
    "checkpoint wait": "Wait until a checkpoint has read the bucket.",
    "update wait": "Wait in forward for the update of a bucket.",
    "wait previous": "Wait for the updates of the previous step.",
    "edits": "Find weights that were modified outside the optimizer.",
    LATE: "Wait for a rank that enters a collective later. Only then does the transfer begin.",
    EXPOSED: "Time in which the training thread runs the optimizer or waits for it, and so does "
    "not work on the model. On a GPU, kernels that were launched before may run meanwhile. The "
    "rest of the optimizer's time is hidden behind the model's.",
    # What they work on.
    "rank": "One of the processes that train together.",
    "bucket": "Parameters that are averaged, updated and copied together.",
    # Memory.
    Category.PARAMETERS: "The model's trainable weights.",
    Category.GRADIENTS: "Gradients that stay in `.grad`.",
    Category.GRADIENT_SHARDS: "A rank's part of the averaged gradients.",
    Category.ACCUMULATORS: "Sums of the gradients of several backwards.",
    Category.STATE: "Master weights and moments of a rank's part of the parameters.",
    "master_weight": "The fp32 copy of the parameters, or its upper half.",
    "master_remainder": "The bits of the master weight that the parameter lacks.",
    "exp_avg": "Adam's first moment.",
    "exp_avg_sq": "Adam's second moment.",
    "max_exp_avg_sq": "The largest second moment so far, of AMSGrad.",
    "exponents": "One for each block of moments in 8-bit codes.",
    Category.SLOTS: "Buffers into which gradients are packed, and in which they are averaged.",
    Category.STAGING: "Buffers of copies between host and device.",
    Category.BLOCK_SUMS: "Sums of squares of the gradients, for their norm.",
    Category.PREPARED: "Centralized and sparse gradients, as the kernel reads them.",
    Category.KEPT_RECORDS: "What a new process needs to complete the step of a killed one.",
    Category.SNAPSHOT_BUFFER: "Copies for a checkpoint that is written in the background.",
    Category.CHECKPOINT_WRITER: "Buffers of a checkpoint that is being written.",
    Category.FROZEN: "Weights that are not trained.",
    Category.ACTIVATIONS: "What the forward saves for the backward.",
    Category.CONTEXT: "What CUDA and NCCL themselves take of a GPU.",
    Category.GATHERED: "Layers that FSDP2 has gathered, and gradients that it averages.",
    REST: "Activations, data, libraries, and all else that is not listed.",
    "predicted": "Computed from the model and the settings, as `offload-adam plan` does.",
    "USS": "Unique set size: the memory of a process that no other process shares.",
}
"""Names of phases and of categories of memory, and other terms, with their meanings."""
