"""The arithmetic on the host: the fused Adam update, block sums of squares, and their threads.

adam             the update of a table of segments; start here
adam_ir          loop over float32 state as LLVM IR: a software pipeline over vectors
adam_bf16_ir     loop over bfloat16 state as LLVM IR: blocks of 128 elements
adam_formula     the arithmetic of both IR loops
adam_plain       both loops in Python, with the same bits
random_bits      random bits for stochastic rounding, from a key and an element's index
random_keys      keys of the random bits, from a parameter's name and step count
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
