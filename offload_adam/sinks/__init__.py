"""Destinations of rank 0's metrics in addition to `metrics.jsonl`: HTTP, TensorBoard, wandb."""
