"""The arithmetic on the host: the fused Adam update, block sums of squares, and their threads.

    adam            the update of a table of segments; chooses one of the two element loops
    adam_ir         the element loop as LLVM IR: a software pipeline over vectors
    adam_plain      the element loop in Python, with the same bits
    sparse          the update of the rows of a table that have a gradient
    norm            block sums of squares
    probe           a pass without arithmetic, to measure the memory's bandwidth
    first_touch     the first write to fresh memory
    scalars         hyperparameters, and the row of float32 that a kernel reads
    formats         element formats, and the dtypes that carry their bits
    intrinsics, ir_vectors, numba_private      what Numba lacks, and what it does not document
    compilation     compilation and the disk cache
    threads         the number of threads, and Numba's threading layer

No module imports torch: kernels take NumPy arrays and raw addresses. Modules that need Numba are
imported when an optimizer is constructed, so that `import offload_adam` stays quick.
"""
