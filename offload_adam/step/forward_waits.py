"""Let each part of a model wait, before its forward, for its own parameters and no others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from offload_adam.errors import UnreadyParameterError
from offload_adam.step.executor import Executor
from offload_adam.torch_private import compiled_call, is_compiled, set_compiled_call

logger = logging.getLogger(__name__)


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


_METADATA = (
    "dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad", "grad_fn", "is_leaf",
    "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes",
    "_version", "names", "output_nr", "retains_grad",
)  # fmt: skip
_QUESTIONS = (
    "size", "dim", "numel", "nelement", "stride", "storage_offset", "data_ptr", "element_size",
    "is_contiguous", "is_floating_point", "is_complex", "get_device", "ndimension", "__len__",
    "__hash__",
)  # fmt: skip


def _harmless() -> set[Any]:
    """Return the functions that read no element of their arguments."""
    getters = (getattr(torch.Tensor, name, None) for name in _METADATA)
    found: set[Any] = {getter.__get__ for getter in getters if getter is not None}
    questions = (getattr(torch.Tensor, name, None) for name in _QUESTIONS)
    return found | {question for question in questions if question is not None}


class FirstUse(TorchFunctionMode):
    """Calls back when a function of torch is given a parameter, before the function runs.

    Cost: about 1.5 us a function; it is on for one forward.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], seen: Callable[[int], None]
    ) -> None:
        """Watch these parameters.

        Args:
            seen: is given the id of the parameter.
        """
        super().__init__()
        self._ids = {id(parameter) for parameter in parameters}
        self._seen = seen
        self._harmless = _harmless()

    def begin(self) -> None:
        """Be on, until `end`, for the calling thread."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Be off."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at the arguments, and call the function."""
        kwargs = kwargs or {}
        # What is being compiled would be compiled with this very look into it.
        if not torch.compiler.is_compiling() and func not in self._harmless:
            self._look(args)
            self._look(kwargs.values())
        return func(*args, **kwargs)

    def _look(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self._look(value)
            elif id(value) in self._ids:
                self._seen(id(value))


class ForwardHooks:
    """Waits, before the forward of each unit of a model, for the unit's own buckets.

    The root without gradients (an evaluation), a unit that is called outside of the root's forward,
    and `state_dict` and `load_state_dict` of any module wait for everything: nothing would notice
    there what was read too early. Where gradients flow, `check` does: if a bucket produced a
    gradient but no hook waited for it, its parameters were read without our hooks.

    The first forward is traced, while nothing is under way yet: a parameter that is read before any
    unit has waited for its bucket is from then on waited for by the unit that was entered last.

    Owns: hooks on the model until `remove`. Copies and pickles of the model have none. `removals`
        takes them off, too, and holds the model only where it is compiled.
    """

    def __init__(
        self, root: nn.Module, executor: Executor, chosen: Sequence[nn.Module] | None
    ) -> None:
        """Prepare for a model; `attach` puts the hooks on.

        Args:
            chosen: the units, None for the children of every ModuleList.
        """
        self._root = root
        self._executor = executor
        self._chosen = chosen
        self._bucket_of: BucketOf = {}
        self._always: set[int] = set()
        self.removals = ExitStack()
        self._depth = 0
        self._waited: set[int] = set()
        self._latest: Unit | None = None
        self._tracing: FirstUse | None = None
        self._is_traced = False
        self._has_overlapped = False
        self._was_pending = False

    def attach(self, bucket_of: BucketOf) -> None:
        """Put hooks on for these parameters, in place of earlier ones. Nothing is under way."""
        self.remove()
        if self._bucket_of:
            # The later ones may have a gradient of a backward before they were attached.
            self._waited |= set(bucket_of.values()) - set(self._bucket_of.values())
        self._bucket_of = bucket_of
        self._always = outside(self._root, bucket_of)
        inner = [module for module in self._root.modules() if module is not self._root]
        self._is_traced = any(map(is_compiled, (self._root, *inner)))
        units = find_units(self._root, bucket_of, self._chosen, whole=self._is_traced)
        if is_compiled(self._root):
            logger.warning(
                "the model is compiled as a whole, so its forward waits for all of its parameters "
                "at once: compile its layers one by one to hide the updates under it"
            )
            units[0].buckets |= set(bucket_of.values())
        for unit in units:
            self._attach_to(unit)
        leave = _Hook(self, self._leave)
        self._keep(self._root.register_forward_hook(leave, always_call=True))
        wait = _Hook(self, self.wait_for_all)
        for module in self._root.modules():
            self._keep(module.register_state_dict_pre_hook(wait))
            self._keep(module.register_load_state_dict_pre_hook(wait))

    def _attach_to(self, unit: Unit) -> None:
        hook = _Hook(self, lambda: self._enter(unit))
        compiled = compiled_call(unit.module)
        if compiled is None:
            self._keep(unit.module.register_forward_pre_hook(hook, prepend=True))
            return

        # A hook would be compiled into the module, or be left out: its caller waits.
        def call(*args: Any, **kwargs: Any) -> Any:
            hook()
            return compiled(*args, **kwargs)

        set_compiled_call(unit.module, call)
        self.removals.callback(set_compiled_call, unit.module, compiled)

    def _keep(self, handle: RemovableHandle) -> None:
        self.removals.callback(handle.remove)

    def remove(self) -> None:
        """Take every hook off. Idempotent."""
        self.removals.close()

    def step_begins(self) -> None:
        """Hear that the forward and backward of a step are over."""
        self._leave_tracing()
        self._depth = 0

    def step_ended(self) -> None:
        """Hear that `step()` has left updates running, or not."""
        if self._executor.is_pending and self._always:
            self._executor.wait_for_buckets(self._always)
        self._was_pending = self._executor.is_pending
        self._has_overlapped |= self._was_pending
        self._waited = set(self._always)

    def wait_for_all(self) -> None:
        """Wait for everything."""
        self._executor.wait_for_buckets(set(self._bucket_of.values()))
        self._executor.finish_updates()
        self._waited.update(self._bucket_of.values())

    def check(self, brought: Iterable[int], name_of: Callable[[int], str]) -> None:
        """Look whether the buckets that brought gradients had been waited for.

        In the first step nothing was under way, so nothing wrong was read: such buckets are waited
        for inside `step()` from then on, with a warning.

        Args:
            brought: buckets with a gradient since the last step.
            name_of: gives the name of a bucket's first parameter.

        Raises:
            UnreadyParameterError: a gradient was computed from parameters that may not have
                arrived.
        """
        missed = sorted(set(brought) - self._waited)
        if not missed:
            return
        if self._was_pending:
            raise UnreadyParameterError(
                f"parameter {name_of(missed[0])!r} (and its bucket) has a gradient, but the "
                "forward that used it did not wait for the last step's update: it was called in a "
                "way that skips hooks, or the gradient was set by hand. Call synchronize() after "
                "step(), call the model instead of its forward(), or make the optimizer with "
                "overlap=False"
            )
        if not self._has_overlapped:
            self._always.update(missed)
            logger.warning(
                "step() waits for %d of %d buckets, such as that of %r: the forward that used them "
                "ran no hook (a model compiled as a whole, or a direct call of forward())",
                len(missed),
                len(set(self._bucket_of.values())),
                name_of(missed[0]),
            )

    def _enter(self, unit: Unit) -> None:
        """Wait for what a unit's forward is about to read."""
        if torch.compiler.is_compiling():
            return  # compiled away: then nobody waits, and `check` notices
        if unit.module is self._root:
            self._depth += 1
            if not torch.is_grad_enabled():
                self.wait_for_all()
                return
            self._begin_tracing()
        if self._depth == 0:
            self.wait_for_all()
            return
        self._latest = unit
        self._executor.wait_for_buckets(unit.buckets)
        self._waited |= unit.buckets

    def _leave(self) -> None:
        """Leave the root's forward, also where it has raised."""
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._leave_tracing()

    def _begin_tracing(self) -> None:
        if self._is_traced:
            return
        self._is_traced = True
        if self._executor.is_pending:
            # Tracing must see the first reader of parameters that were attached later.
            self.wait_for_all()
        self._waited = set(self._always)
        buckets = {id(parameter): bucket for parameter, bucket in self._bucket_of.items()}
        self._tracing = FirstUse(self._bucket_of, lambda found: self._used(buckets[found]))
        self._tracing.begin()

    def _leave_tracing(self) -> None:
        if self._tracing is not None:
            self._tracing.end()
            self._tracing = None

    def _used(self, bucket: int) -> None:
        """Let the unit that was entered last wait for a bucket that nobody has waited for."""
        if bucket not in self._waited and self._latest is not None:
            self._latest.buckets.add(bucket)
            self._waited.add(bucket)


class _Hook:
    """A hook of the optimizer's, of which copies of the model have nothing.

    A copy that kept it would copy the optimizer with it, or wait for updates of another model.
    """

    def __init__(self, owner: ForwardHooks, action: Callable[[], None]) -> None:
        self._owner = owner
        self._action = action

    def __call__(self, *_: Any) -> None:
        self._action()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        self._reject_torn()
        return _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        self._reject_torn()
        return _make_nothing, ()

    def _reject_torn(self) -> None:
        if self._owner._executor.is_pending:
            raise UnreadyParameterError(
                "the model is copied while its parameters are being updated: call synchronize() on "
                "the optimizer first"
            )


def _nothing(*_: Any) -> None:
    """Do nothing, in the place of a hook."""


def _make_nothing() -> Callable[..., None]:
    return _nothing
