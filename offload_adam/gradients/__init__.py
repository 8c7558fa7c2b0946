"""Gradients of one bucket: from `.grad` to the gradient shard that the update reads.

reader             read `.grad`, and reject gradients that cannot be used; start here
stand_in           placeholder in `.grad` for a gradient that was moved out during backward
gradient_transfer  pack, reduce, D2H copy, cast or add
segments           addresses of a step's gradients of a bucket, as a table for the kernels
whole              centralized and sparse gradients, which are prepared before the kernel
sparse             sparse gradients as rows
row_exchange       average sparse gradients over the ranks, by an all-gather of their rows
"""
