"""What only a GPU can show; `tests/gpu/run.sh` runs all of it, and fails where none ran."""
