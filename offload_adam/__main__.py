"""Run the command line as `python -m offload_adam`, which torchrun needs."""

from offload_adam.cli.app import main

if __name__ == "__main__":
    main()
