"""One step: gradients reduced and landed, clip or skip, each bucket updated."""
