"""Compares this package with other Adam implementations, on this machine and in one run.

Start at `harness.py` for `bench kernel` and `bench step`, at `training/` for `bench train`.
"""
