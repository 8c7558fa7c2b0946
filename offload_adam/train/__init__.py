"""The example job: a byte-level language model, or the user's own, trained with `OffloadAdam`."""
