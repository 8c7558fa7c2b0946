"""Train with the optimizers of this package in Trainer, Accelerate and Lightning.

missing   the error if a library is not installed
"""
