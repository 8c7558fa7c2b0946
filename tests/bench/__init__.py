"""Measurements for developers, run by `python -m tests.bench.NAME`.

`offload_adam.bench` has the measurements that help users to decide.
"""
