"""What is optimized: parameters, their groups and buckets.

selection    which parameters are optimized, and which are rejected; start here
groups       checks of parameter groups, their hyperparameters and later edits
bucket       BucketState: one bucket's flat tensor, its state and its segments
elements     supported dtypes, and the order of a tensor's elements in memory
"""
