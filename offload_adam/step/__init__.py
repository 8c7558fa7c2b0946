"""One step: gradients reduced and landed, clipping and skip, the update of each bucket, the executor."""
