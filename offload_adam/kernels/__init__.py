"""The arithmetic on the host: the fused Adam update, block sums of squares, and their threads.

adam             the update of a table of segments; start here
adam_ir          loop over float32 state as LLVM IR: a software pipeline over vectors
adam_bf16_ir     loop over bfloat16 state as LLVM IR: blocks of 128 elements
adam_8bit_ir     loop over state with 8-bit codes as LLVM IR
adam_formula     the arithmetic of the IR loops; ir_blocks handles blocks of 128 elements
adam_plain       the loops over float32 and bfloat16 state in Python, with the same bits
adam_8bit_plain  the loop over state with 8-bit codes in Python, with the same bits
codes            the 8-bit codes of moments
undo             the log from which a killed update is completed; undo_ir writes it
random_bits      random bits for stochastic rounding, from a key and an element's index
random_keys      keys of the random bits, from a parameter's name and step count
sparse           the update of the rows of a table that have a gradient
norm             block sums of squares
scalars          hyperparameters and the scalars of one update
formats          element formats, and the NumPy dtypes that carry their bits
intrinsics       operations that Numba lacks; ir_vectors and ir_bytes emit their instructions
compilation      compilation and the disk cache; numba_private names Numba's private parts
threads          the cores and threads of a rank, and Numba's threading layer
first_touch      the first write to fresh memory; probe measures the memory's bandwidth

No module imports torch: kernels take NumPy arrays and raw addresses. Modules that need Numba are
imported when an optimizer is constructed, so that `import offload_adam` stays quick.
"""
