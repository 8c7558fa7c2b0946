"""The job of `offload-adam train`: it trains a byte-level GPT or the user's model."""
