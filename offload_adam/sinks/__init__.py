"""Where rank 0's metrics go besides `metrics.jsonl`: an HTTP server, TensorBoard and wandb."""
