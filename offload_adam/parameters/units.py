"""Units: the parts of a model before whose forward their own parameters must have arrived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

BucketOf = Mapping[nn.Parameter, int]


@dataclass(eq=False)
class Unit:
    """A module, and the buckets that are waited for before its forward; tracing adds to them."""

    module: nn.Module
    name: str
    buckets: set[int]


def find_units(
    root: nn.Module, bucket_of: BucketOf, chosen: Sequence[nn.Module] | None, *, whole: bool
) -> list[Unit]:
    """Return the units of a model, the root first.

    A unit waits for everything in its subtree: a child whose parameters its parent reads fires no
    hook of its own, as in `nn.MultiheadAttention`. What lies outside of all units is waited for by
    the module that owns it.

    Args:
        bucket_of: the bucket of every parameter that the optimizer has.
        chosen: the units; None for the children of every ModuleList (the outermost ones).
        whole: the root waits for what lies outside of the units, as where nothing can be traced.

    Raises:
        ValueError: a chosen unit is no part of the root.
    """
    named = {module: name for name, module in root.named_modules()}
    modules = list(_list_children(root)) if chosen is None else list(chosen)
    for module in modules:
        if module not in named:
            raise ValueError(
                f"units: a {type(module).__name__} is given that is no part of module="
            )
    inside = {member for module in modules for member in module.modules()} - {root}
    first = Unit(root, "", _buckets(root.parameters(recurse=False), bucket_of))
    units = [first]
    for module in modules:
        if module is not root:
            units.append(Unit(module, named[module], _buckets(module.parameters(), bucket_of)))
        else:
            first.buckets |= _buckets(root.parameters(), bucket_of)
    for module, name in named.items():
        own = _buckets(module.parameters(recurse=False), bucket_of)
        if module in inside or module is root or not own:
            continue
        if whole:
            first.buckets |= own
        else:
            units.append(Unit(module, name, own))
    return units


def outside(root: nn.Module, bucket_of: BucketOf) -> set[int]:
    """Return the buckets with a parameter that is none of the model's."""
    members = set(root.parameters())
    return {bucket for parameter, bucket in bucket_of.items() if parameter not in members}


def _list_children(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of the outermost ModuleLists."""
    for child in root.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _list_children(child)


def _buckets(parameters: Iterable[nn.Parameter], bucket_of: BucketOf) -> set[int]:
    return {bucket_of[parameter] for parameter in parameters if parameter in bucket_of}
