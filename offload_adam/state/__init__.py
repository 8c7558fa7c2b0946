"""The optimizer state as callers save and load it."""
