"""Give options of the policies as plain keyword arguments."""

from __future__ import annotations

from typing import Any

from offload_adam import FailurePolicy, OffloadPolicy
from offload_adam.options import options_of


def in_policies(**arguments: Any) -> dict[str, Any]:
    """Return an optimizer's arguments, with options of a policy moved into that policy."""
    for argument, kind in (("offload", OffloadPolicy), ("failures", FailurePolicy)):
        names = {option.name for option in options_of(kind)} & set(arguments)
        if names:
            arguments[argument] = kind(**{name: arguments.pop(name) for name in names})
    return arguments
