"""The commands `offload-adam` and `python -m offload_adam`."""
