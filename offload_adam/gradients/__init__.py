"""From `.grad` to the gradient shard that the update reads."""
