"""`StandIn`: placeholder in `.grad` after a gradient was moved out during backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.compiling import never_compiled
from offload_adam.errors import StreamedGradientError
from offload_adam.fsdp_private import dtensor_type, local_of
from offload_adam.torch_private import (
    ATEN_FOREACH_DIV,
    ATEN_FOREACH_MUL,
    ATEN_FOREACH_NORM,
    ATEN_TO_COPY,
    NO_GRAPH_TASK,
    accumulating_parameter,
    current_graph_task,
    make_wrapper_subclass,
    no_torch_function,
    version_of,
)

_aten = torch.ops.aten
S = TypeVar("S", bound="StandIn")

_CLIP = (
    "Clip to a 2-norm, with max_grad_norm=, optimizer.clip_grad_norm_() or torch's own function, "
    "drop gradients with optimizer.zero_grad()"
)
_LOSS_SCALE = (
    "Instead of using a GradScaler, scale the loss and set optimizer.grad_scale (a non-finite "
    "gradient skips the step)"
)


class StandIn(torch.Tensor):
    """A gradient without storage: it shows that its parameter had a gradient, and has no values.

    It has the parameter's shape, strides and device, and the dtype of its gradients. The next
    backward replaces it. It supports the two operations of `torch.nn.utils.clip_grad_norm_`:

    - Its 2-norm is the norm of the gradient averaged over all ranks. Collective.
    - Multiplying it in place by a number multiplies the gradient in the next update.

    Every other operation raises `StreamedGradientError`.

    Owns: nothing. It keeps neither the parameter nor the optimizer alive. It has no weak reference
        to the parameter either: `torch.utils.swap_tensors`, which `module.to()` may call, rejects
        tensors that have one.
    """

    # torch's default would convert results of operations to this class.
    __torch_function__ = no_torch_function

    _name: str
    _source: StreamedGradients | None
    _index: int
    _is_copy: bool
    added: torch.Tensor | None = None
    """Of a `ShardStandIn`: this rank's part of a gradient that FSDP2 has added since."""

    @staticmethod
    def __new__(
        cls,
        name: str,
        parameter: torch.Tensor,
        source: StreamedGradients | None = None,
        index: int = 0,
    ) -> StandIn:
        """Make the stand-in of one parameter's gradient.

        Args:
            name: for error messages.
            source: computes norms and multiplies gradients; None to reject both.
            index: index of the parameter in the optimizer, for `source`.
        """
        # torch rejects a `.grad` of another dtype. None accepts any.
        dtype = parameter.grad_dtype
        return _make(cls, parameter, name, source, index, dtype)

    @classmethod
    @never_compiled
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has mangled names
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Handle autograd, `module.to()`, `zero_()` and gradient clipping; reject all else."""
        first = args[0] if args else None
        if isinstance(first, StandIn):
            if func is _aten.detach.default:
                return first._other(is_copy=first._is_copy)
            if func is ATEN_TO_COPY:  # module.to() converts .grad too
                return first._other(kwargs.get("dtype"), kwargs.get("device"), is_copy=True)
            if func in (_aten.add_.Tensor, _aten.add.Tensor):
                parameter = accumulating_parameter()
                if parameter is not None and parameter.grad is first:
                    # Clone, because autograd may share this gradient with other parameters.
                    gradient = args[1].clone()
                    if func is _aten.add.Tensor:  # create_graph=True: autograd puts it into .grad
                        return gradient
                    parameter.grad = gradient  # autograd ignores the result
                    return first
            if first._source is not None and _is_plain_norm(func, args, kwargs):
                return first._norm(first._source)
            # Multiplying a copy (of `.to()` or deepcopy) must not change the gradient.
            scales = func in _SCALED and _is_number(args[1]) and not first._is_copy
            if first._source is not None and scales:
                first._source.multiply(first._index, args[1], inverse=_SCALED[func])
                return first
            if func is _aten.zero_.default and not (first._source and first._source.has_gradients):
                return first  # module.zero_grad(set_to_none=False) after the step
        elif func in _FOREACH and isinstance(first, (list, tuple)) and not kwargs:
            results = [_FOREACH[func](tensor, *args[1:]) for tensor in first]
            return results if func is ATEN_FOREACH_NORM else None
        raise next(_stand_ins_in((args, kwargs)))._error(func.overloadpacket.__name__)

    @property
    def data(self) -> StandIn:
        """The stand-in itself, which has no autograd graph to detach from."""
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """Accept another stand-in, as module.to() assigns it; reject a tensor with values."""
        if not isinstance(value, StandIn):
            raise self._error("an assignment to .data")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        """Return another stand-in of the same gradient."""
        return self._other(is_copy=True)

    def __repr__(self) -> str:  # type: ignore[override]
        """Show the parameter's name and the gradient's shape, dtype and device."""
        return (
            f"StandIn(the gradient of {self._name!r} has left .grad, shape={list(self.shape)}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    def _other(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        *,
        is_copy: bool,
    ) -> StandIn:
        made = _make(type(self), self, self._name, self._source, self._index, dtype, device)
        made._is_copy = is_copy
        return made

    def _norm(self, source: StreamedGradients) -> torch.Tensor:
        return torch.tensor(source.norm(self._index), dtype=torch.float32, device=self.device)

    def _error(self, operation: str) -> StreamedGradientError:
        remedy = _LOSS_SCALE if operation.startswith("_amp_") else _CLIP
        return StreamedGradientError(
            f"{operation} needs the gradient of parameter {self._name!r}, but the optimizer moved "
            f"it out of .grad during backward. {remedy}, or construct the optimizer without "
            "module= to keep gradients in .grad."
        )


def _reject(name: str) -> Callable[..., Any]:
    def method(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        raise self._error(name)

    return method


# These access memory without a dispatched operation, so __torch_dispatch__ cannot reject them.
for _method in (
    *("item", "tolist", "numpy", "data_ptr", "storage", "share_memory_"),
    *("__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__"),
    *("__dlpack__", "__reduce_ex__"),
):
    setattr(StandIn, _method, _reject(_method))


def gradient_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return `.grad`; of a stand-in, what was added to it since, None if nothing was."""
    gradient = parameter.grad
    return gradient.added if isinstance(gradient, StandIn) else gradient


def local_gradient_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's part of `gradient_of(parameter)`."""
    gradient = gradient_of(parameter)
    return None if gradient is None else local_of(gradient)


class ShardStandIn(StandIn):
    """The stand-in of a DTensor's gradient.

    FSDP2 adds a further gradient to the local tensor of the one in `.grad`. The stand-in holds what
    is added, until it is read.
    """

    @property
    def __class__(self) -> type:
        """Pass for a DTensor while a backward runs, for which FSDP2 asks before it adds."""
        # Not at other times: torch 2.11 would take operations on it for those of a DTensor.
        if current_graph_task() == NO_GRAPH_TASK:
            return ShardStandIn
        return dtensor_type() or ShardStandIn

    @__class__.setter
    def __class__(self, kind: type) -> None:
        """Change the class, as `torch.utils.swap_tensors` does when a module is moved."""
        object.__dict__["__class__"].__set__(self, kind)

    @property
    def _local_tensor(self) -> torch.Tensor | _Nothing:
        return _Nothing() if self.added is None else self.added

    @_local_tensor.setter
    def _local_tensor(self, total: torch.Tensor) -> None:
        self.added = total


class _Nothing:
    """The local tensor of a stand-in to which nothing was added yet."""

    def __iadd__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


for _method in ("to_local", "full_tensor", "redistribute"):
    setattr(ShardStandIn, _method, _reject(_method))


def _make(
    kind: type[S],
    like: torch.Tensor,
    name: str,
    source: StreamedGradients | None,
    index: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> S:
    made = make_wrapper_subclass(
        kind,
        like.shape,
        strides=like.stride(),
        dtype=dtype or like.dtype,
        device=device or like.device,
    )
    assert isinstance(made, kind)
    made._name = name
    made._source = source
    made._index = index
    made._is_copy = False
    return made


# In-place multiplications by a number; True for divisions.
_SCALED = {
    _aten.mul_.Tensor: False,
    _aten.mul_.Scalar: False,
    _aten.div_.Tensor: True,
    _aten.div_.Scalar: True,
}

_FOREACH: dict[Any, Callable[..., torch.Tensor]] = {
    ATEN_FOREACH_NORM: torch.linalg.vector_norm,
    **dict.fromkeys(ATEN_FOREACH_MUL, torch.Tensor.mul_),
    **dict.fromkeys(ATEN_FOREACH_DIV, torch.Tensor.div_),
}


def _is_plain_norm(func: Any, args: Sequence[Any], kwargs: Any) -> bool:
    """Return whether an operation computes the 2-norm of a whole tensor."""
    if func not in (_aten.linalg_vector_norm.default, _aten.norm.Scalar):
        return False
    order, *rest = [*args[1:], 2]
    return order == 2 and not kwargs and all(value in (None, 2, False) for value in rest)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (
        isinstance(value, torch.Tensor) and value.numel() == 1 and not isinstance(value, StandIn)
    )


def _stand_ins_in(value: Any) -> Iterator[StandIn]:
    """Yield the stand-ins among an operation's arguments."""
    if isinstance(value, StandIn):
        yield value
    elif isinstance(value, dict):
        yield from _stand_ins_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _stand_ins_in(item)


class StreamedGradients:
    """Norms of this step's streamed gradients, and the factors that users multiplied them by.

    Args:
        take_norms: returns the 2-norm of each parameter's reduced gradient, (num parameters,)
            float64. Collective.

    Lifecycle: `gradients_moved` for each bucket with gradients, `forget` after each step.
    """

    def __init__(self, take_norms: Callable[[], npt.NDArray[np.float64]]) -> None:
        self._take_norms = take_norms
        self.forget()

    def forget(self) -> None:
        """Reset for the next step."""
        self.has_gradients = False
        self._norms: npt.NDArray[np.float64] | None = None
        self._factors: dict[int, float] = {}
        self._added_later = False
        self._scalar: tuple[torch.Tensor, int, float] | None = None

    def gradients_moved(self) -> None:
        """Record that another bucket's gradients were moved out of `.grad`."""
        self.has_gradients = True
        self._norms = None  # computed without these gradients
        self._added_later = bool(self._factors)

    def norm(self, index: int) -> float:
        """Return the 2-norm of one parameter's gradient. Collective, once after each backward."""
        if self._norms is None:
            self._norms = self._take_norms()
        return float(self._norms[index]) * abs(self._factors.get(index, 1.0))

    def multiply(self, index: int, factor: float | torch.Tensor, *, inverse: bool = False) -> None:
        """Multiply one parameter's gradient in the next update; divide it if `inverse`."""
        value = self._read(factor) if isinstance(factor, torch.Tensor) else float(factor)
        before = self._factors.get(index, 1.0)
        # By np.float64: as in torch, a division by zero gives infinity and raises no error.
        self._factors[index] = float(np.float64(before) / value if inverse else before * value)

    def _read(self, factor: torch.Tensor) -> float:
        """Return a scalar tensor's value, cached by identity and version."""
        # Clipping multiplies thousands of gradients by one tensor; each float() may sync a device.
        known = self._scalar
        if known is None or known[0] is not factor or known[1] != version_of(factor):
            known = self._scalar = (factor, version_of(factor), float(factor))
        return known[2]

    def factor(self) -> float:
        """Return the one factor of all gradients, 1.0 if none was multiplied.

        Raises:
            ValueError: gradients have different factors, or some came after a multiplication.
        """
        # By repr, so that several NaN count as one value.
        factors = {*map(repr, self._factors.values())}
        if len(factors) > 1:
            raise ValueError(
                f"Gradients that were moved out of .grad were multiplied by different factors: "
                f"{', '.join(sorted(factors)[:3])}. Multiply all of them by one number, or "
                "construct the optimizer without module=."
            )
        if self._added_later:
            raise ValueError(
                "A backward produced more gradients after those of this step were multiplied "
                "(clipped) in .grad. Multiply or clip after the last backward of a step."
            )
        return next(iter(self._factors.values()), 1.0)

    @property
    def multiplied(self) -> Collection[int]:
        """The indices of the parameters whose gradients have a factor."""
        return self._factors.keys()
