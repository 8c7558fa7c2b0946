"""One step: reduce gradients, agree, clip or skip, update bucket by bucket."""
