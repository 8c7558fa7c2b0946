"""Compares this package with other Adam implementations, on this machine and in one run.

Start at `harness.py` for `bench kernel`, `bench step` and `bench fsdp2`, at `training/` for
`bench train`.
"""
