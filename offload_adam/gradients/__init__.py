"""Gradients of one bucket: from `.grad` to the gradient shard that the update reads.

reader             read `.grad`, and reject gradients that cannot be used
stand_in           what `.grad` holds after a gradient has left
gradient_transfer  pack, reduce, D2H copy, cast or add
segments           where a step's gradients of a bucket are, as a table for the kernels
whole              gradients that are prepared whole: centralized and sparse ones
sparse             sparse gradients as rows; row_exchange averages them over the ranks
"""
