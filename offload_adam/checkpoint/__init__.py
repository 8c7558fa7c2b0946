"""Checkpoints: written from the shards as they lie, verified as they are read, for any world."""
