"""`Adam` as the documentation of `mindspore.nn.Adam` specifies it, on this package's update."""
