"""`offload-adam bench`: pass the arguments on to `offload_adam.bench`, which needs no typer."""

from __future__ import annotations

import typer


def bench(context: typer.Context) -> None:
    """Compare this package with other Adam implementations on this machine."""
    from offload_adam.bench.__main__ import main

    main(context.args, prog="offload-adam bench")
