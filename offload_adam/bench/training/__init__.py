"""`bench train`: training steps of this package and its peers, on the same model and batches."""
