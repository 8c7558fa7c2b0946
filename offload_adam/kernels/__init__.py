"""The arithmetic on the host: the fused Adam update, block sums of squares, and their threads.

adam             the update of a table of segments; start here
adam_ir          its loop over elements as LLVM IR: a software pipeline over vectors
adam_plain       the same loop in Python, with the same bits
sparse           the update of the rows of a table that have a gradient
norm             block sums of squares
scalars          hyperparameters and the scalars of one update
formats          element formats, and the NumPy dtypes that carry their bits
intrinsics       operations that Numba lacks; ir_vectors emits their instructions
compilation      compilation and the disk cache; numba_private names Numba's private parts
threads          the cores and threads of a rank, and Numba's threading layer
first_touch      the first write to fresh memory; probe measures the memory's bandwidth

No module imports torch: kernels take NumPy arrays and raw addresses. Modules that need Numba are
imported when an optimizer is constructed, so that `import offload_adam` stays quick.
"""
