"""The error if a library of the extra `integrations` is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from offload_adam.errors import MissingExtraError


@contextmanager
def explain_missing(library: str) -> Iterator[None]:
    """Name the extra to install if the body's import of `library` fails.

    Raises:
        MissingExtraError: `library` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != library:
            raise  # a broken installation: its own message names the missing module
        raise MissingExtraError(
            f"{library} is not installed. Run: pip install 'offload-adam[integrations]'"
        ) from error
