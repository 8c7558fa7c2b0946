"""Where a run's metrics go besides its own file: a web page, Prometheus, TensorBoard, wandb."""
