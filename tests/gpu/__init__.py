"""Tests that need a GPU. `tests/gpu/run.sh` runs all of them, and fails if no test ran."""
