"""The host arithmetic: the fused Adam update, block sums of squares, and the threads they run on.

Nothing here knows torch. Kernels take NumPy arrays and raw addresses, and modules that need Numba
are imported where an optimizer is constructed, so that `import offload_adam` stays quick.
"""
