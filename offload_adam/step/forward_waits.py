"""Forward hooks: each unit of a model waits for its own parameters before its forward."""

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

from offload_adam.compiling import never_compiled
from offload_adam.coordinator.ranks import RankGroup
from offload_adam.errors import UnreadyParameterError
from offload_adam.step.executor import Executor
from offload_adam.torch_private import compiled_call, is_compiled, set_compiled_call

logger = logging.getLogger(__name__)


BucketOf = Mapping[nn.Parameter, int]


@dataclass(eq=False)
class Unit:
    """A module, and the buckets that its forward waits for; tracing adds to them."""

    module: nn.Module
    name: str
    buckets: set[int]


def find_units(
    root: nn.Module, bucket_of: BucketOf, chosen: Sequence[nn.Module] | None, *, whole: bool
) -> list[Unit]:
    """Return the units of a model, the root first.

    A unit waits for the parameters of its whole subtree: if a parent reads the parameters of its
    child, as `nn.MultiheadAttention` does, the child's hook does not run. A module outside of all
    units waits for its own parameters.

    Args:
        bucket_of: the bucket of each parameter of the optimizer.
        chosen: the units; None for the children of every outermost ModuleList.
        whole: the root waits for all parameters outside of units, because tracing is impossible.

    Raises:
        ValueError: a chosen unit is not a module of the root.
    """
    named = {module: name for name, module in root.named_modules()}
    modules = list(_list_children(root)) if chosen is None else list(chosen)
    for module in modules:
        if module not in named:
            raise ValueError(
                f"units contains a {type(module).__name__} that is not a submodule of module=. "
                "Pass modules of the model that is passed as module=."
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


def buckets_outside(root: nn.Module, bucket_of: BucketOf) -> set[int]:
    """Return the buckets with a parameter that the model does not have."""
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


# Attributes and methods of a tensor that read none of its elements.
_METADATA_ATTRIBUTES = (
    "dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad", "grad_fn", "is_leaf",
    "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes",
    "_version", "names", "output_nr", "retains_grad",
)  # fmt: skip
_METADATA_METHODS = (
    "size", "dim", "numel", "nelement", "stride", "storage_offset", "data_ptr", "element_size",
    "is_contiguous", "is_floating_point", "is_complex", "get_device", "ndimension", "__len__",
    "__hash__",
)  # fmt: skip


def _metadata_functions() -> set[Any]:
    """Return torch's functions that read only metadata of a tensor, none of its elements."""
    getters = (getattr(torch.Tensor, name, None) for name in _METADATA_ATTRIBUTES)
    found: set[Any] = {getter.__get__ for getter in getters if getter is not None}
    methods = (getattr(torch.Tensor, name, None) for name in _METADATA_METHODS)
    return found | {method for method in methods if method is not None}


class FirstUse(TorchFunctionMode):
    """Calls back before each torch function that has a parameter among its arguments.

    Cost: about 1.5 us per function, during one forward.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], seen: Callable[[int], None]
    ) -> None:
        """Watch these parameters.

        Args:
            seen: called with `id(parameter)`.
        """
        super().__init__()
        self._ids = {id(parameter) for parameter in parameters}
        self._seen = seen
        self._metadata_functions = _metadata_functions()

    def begin(self) -> None:
        """Watch the functions of the calling thread until `end`."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Stop watching."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Report parameters among the arguments, then call the function."""
        kwargs = kwargs or {}
        # torch.compile would trace `_look` into the code that it compiles.
        if not torch.compiler.is_compiling() and func not in self._metadata_functions:
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
    """Lets the forward of each unit of a model wait for the unit's own buckets.

    `check` finds parameters that were read without our hooks: their bucket produced a gradient, but
    no hook waited for it. Where there are no gradients, nothing would find such a read. So the
    following wait for all buckets: the root's forward under no_grad (an evaluation), a unit called
    outside of the root's forward, and `state_dict` and `load_state_dict` of any module.

    The first forward is traced, before any update runs. If it reads a parameter whose bucket no
    unit has waited for, the unit that was entered last waits for that bucket from then on.

    Owns: hooks on the model until `remove`. Copies and pickles of the model have no hooks. Closing
        `removals` removes the hooks too; `removals` refers to the model only if it is compiled.
    """

    def __init__(
        self,
        ranks: RankGroup,
        root: nn.Module,
        executor: Executor,
        chosen: Sequence[nn.Module] | None,
    ) -> None:
        """Construct without hooks on the model; `attach` puts them on.

        Args:
            ranks: rank 0 warns about a compiled model, which is the same on all ranks.
            chosen: the units, None for the children of every ModuleList.
        """
        self._ranks = ranks
        self._root = root
        self._executor = executor
        self._chosen = chosen
        self._bucket_of: BucketOf = {}
        self._always: set[int] = set()  # buckets that `step()` itself waits for
        self.removals = ExitStack()
        self._depth = 0  # how many forwards of the root are running, one inside another
        self._waited: set[int] = set()  # buckets waited for since the last step
        self._latest: Unit | None = None  # the unit entered last
        self._tracing: FirstUse | None = None
        self._is_traced = False
        self._has_overlapped = False
        self._was_pending = False
        self._forward_unseen = False

    def attach(self, bucket_of: BucketOf) -> None:
        """Put hooks on the model, instead of earlier ones. No update may be running.

        Args:
            bucket_of: the bucket of each parameter of the optimizer.
        """
        self.remove()
        if self._bucket_of:
            # Parameters that were added later may already have a gradient: `check` must accept it.
            self._waited |= set(bucket_of.values()) - set(self._bucket_of.values())
        self._bucket_of = bucket_of
        self._always = buckets_outside(self._root, bucket_of)
        inner = [module for module in self._root.modules() if module is not self._root]
        self._is_traced = any(map(is_compiled, (self._root, *inner)))
        units = find_units(self._root, bucket_of, self._chosen, whole=self._is_traced)
        if is_compiled(self._root):
            if self._ranks.rank == 0:
                logger.warning(
                    "The model is compiled as a whole, so its forward waits for all parameters at "
                    "once. Compile its layers one by one to overlap the updates with the forward."
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
            # First: other pre-hooks may read parameters, as that of weight_norm does.
            self._keep(unit.module.register_forward_pre_hook(hook, prepend=True))
            return

        # torch.compile would trace a hook into the compiled code, or drop it. So wrap the compiled
        # call: the wrapper runs outside of it.
        def call(*args: Any, **kwargs: Any) -> Any:
            hook()
            return compiled(*args, **kwargs)

        set_compiled_call(unit.module, call)
        self.removals.callback(set_compiled_call, unit.module, compiled)

    def _keep(self, handle: RemovableHandle) -> None:
        self.removals.callback(handle.remove)

    def remove(self) -> None:
        """Remove all hooks. Idempotent."""
        self.removals.close()

    def step_begins(self) -> None:
        """Reset: a forward that raised an error may not have reached `_leave`."""
        self._leave_tracing()
        self._depth = 0

    def accept_earlier_forward(self) -> None:
        """Accept the gradients of a forward that ran before these hooks were put on the model.

        It shows nothing about later forwards. So the coming step waits for all its updates.
        """
        self._forward_unseen = True

    def step_ended(self) -> None:
        """Note whether `step()` has left updates running. Waits for the buckets of `_always`."""
        needed = set(self._bucket_of.values()) if self._forward_unseen else self._always
        self._forward_unseen = False
        if self._executor.is_pending and needed:
            self._executor.wait_for_buckets(needed)
        self._was_pending = self._executor.is_pending
        self._has_overlapped |= self._was_pending
        self._waited = set(self._always)

    def wait_for_all(self) -> None:
        """Wait for all buckets and all updates."""
        self._executor.wait_for_buckets(set(self._bucket_of.values()))
        self._executor.finish_updates()
        self._waited.update(self._bucket_of.values())

    def check(self, with_gradient: Iterable[int], name_of: Callable[[int], str]) -> None:
        """Check that a hook has waited for each bucket that produced a gradient.

        If no update was running, the forward has read the right parameters. Before the first step
        with overlap, `step()` then waits for such buckets itself from now on, with a warning.

        Args:
            with_gradient: buckets with a gradient since the last step.
            name_of: returns the name of a bucket's first parameter.

        Raises:
            UnreadyParameterError: a forward may have read parameters before their update.
        """
        own = set(self._bucket_of.values())  # FSDP2 waits for its buckets itself
        missed = sorted(own.intersection(with_gradient) - self._waited)
        if not missed or self._forward_unseen:
            return
        if self._was_pending:
            raise UnreadyParameterError(
                f"Parameter {name_of(missed[0])!r} has a gradient, but no hook waited for the "
                "update of its bucket before the forward: the forward was called in a way that "
                "skips hooks, or the gradient was set by hand. Call synchronize() after step(), "
                "call the model instead of its forward(), or construct the optimizer with "
                "overlap=False."
            )
        if not self._has_overlapped:
            self._always.update(missed)
            logger.warning(
                "From now on, step() itself waits for %d of %d buckets, such as that of %r. The "
                "forward used them without running a hook (a model compiled as a whole, or a "
                "direct call of forward()). To overlap their updates with the forward, compile the "
                "layers one by one, and call the model instead of its forward().",
                len(missed),
                len(set(self._bucket_of.values())),
                name_of(missed[0]),
            )

    def _enter(self, unit: Unit) -> None:
        """Wait for the parameters that a unit's forward is about to read."""
        if not self._bucket_of:
            return
        if torch.compiler.is_compiling():
            # The compiled code contains no wait, and `check` finds that none ran. But without
            # gradients it does not, so interrupt the compiled code for a wait.
            if not torch.is_grad_enabled():
                _wait_for_all(self)
            return
        if unit.module is self._root:
            self._depth += 1
            if not torch.is_grad_enabled():
                # There will be no gradients, from which `check` finds a read without a wait.
                self.wait_for_all()
                return
            self._begin_tracing()
        if self._depth == 0:  # called outside of the root's forward, so its reads were not traced
            self.wait_for_all()
            return
        self._latest = unit
        self._executor.wait_for_buckets(unit.buckets)
        self._waited |= unit.buckets
        self._executor.gather_ready()

    def _leave(self) -> None:
        """Leave the root's forward, also if it raised an error."""
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._leave_tracing()

    def _begin_tracing(self) -> None:
        if self._is_traced:
            return
        self._is_traced = True
        if self._executor.is_pending:
            # Tracing again, for parameters that were added later: no update may run meanwhile.
            self.wait_for_all()
        # Count only the waits of this forward, so that every first use is seen.
        self._waited = set(self._always)
        buckets = {id(parameter): bucket for parameter, bucket in self._bucket_of.items()}
        self._tracing = FirstUse(self._bucket_of, lambda found: self._used(buckets[found]))
        self._tracing.begin()

    def _leave_tracing(self) -> None:
        if self._tracing is not None:
            self._tracing.end()
            self._tracing = None

    def _used(self, bucket: int) -> None:
        """Let the unit that was entered last wait for a bucket, if no unit has waited for it."""
        if bucket not in self._waited and self._latest is not None:
            self._latest.buckets.add(bucket)
            self._waited.add(bucket)


@never_compiled
def _wait_for_all(hooks: ForwardHooks) -> None:
    hooks.wait_for_all()


class _Hook:
    """A hook on a module. In copies and pickles of the module, a no-op function replaces it.

    Otherwise a copy of the model would copy the optimizer too, or wait for this model's updates.
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
                "The model was copied while its parameters were being updated. Call synchronize() "
                "on the optimizer before you copy the model."
            )


def _nothing(*_: Any) -> None:
    """Do nothing: replaces a hook in copies of the model."""


def _make_nothing() -> Callable[..., None]:
    return _nothing
