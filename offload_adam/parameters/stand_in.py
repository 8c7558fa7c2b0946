"""Stand-ins: what `.grad` holds after a streamed gradient has left it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from offload_adam.errors import StreamedGradientError

_aten = torch.ops.aten

_CLIP = (
    "Clip with max_grad_norm= or optimizer.clip_grad_norm_(), drop gradients with "
    "optimizer.zero_grad()"
)
_LOSS_SCALE = (
    "In place of a GradScaler, scale the loss and set optimizer.grad_scale (a non-finite gradient "
    "skips the step)"
)


class StandIn(torch.Tensor):
    """A gradient without storage: it shows that its parameter had a gradient, and has no values.

    It has the parameter's shape, strides, dtype and device. The next backward replaces it. Every
    other operation raises an error, so that no tool computes with values that are not there.

    Owns: nothing; it keeps neither the parameter nor the optimizer alive.
    """

    # torch's default would turn the results of operations into this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _name: str
    _parameter: weakref.ref[torch.Tensor]

    @staticmethod
    def __new__(cls, name: str, parameter: torch.Tensor) -> StandIn:
        """Make the stand-in of one parameter's gradient; `name` is for error messages."""
        return _make(parameter, name, weakref.ref(parameter))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has mangled names
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Let autograd replace the stand-in and modules convert it; reject everything else."""
        first = args[0] if args else None
        if isinstance(first, StandIn):
            if func is _aten.detach.default:
                return first._copy()
            if func is _aten._to_copy.default:  # module.to() converts .grad too
                return first._copy(kwargs.get("dtype"), kwargs.get("device"))
            if func is _aten.add_.Tensor and _autograd_accumulates():
                return first._replace(args[1])
            if func is _aten.add.Tensor and _autograd_accumulates():
                return args[1].clone()  # create_graph=True: autograd puts the result into .grad
        raise next(_stand_ins_in((args, kwargs)))._error(func.overloadpacket.__name__)

    @property
    def data(self) -> StandIn:
        """The stand-in itself, for it has no graph."""
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """Take another dtype and device, as module.to() does; reject values."""
        if not isinstance(value, StandIn):
            raise self._error("an assignment to .data")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        """Return another stand-in of the same gradient."""
        return self._copy()

    def __repr__(self) -> str:  # type: ignore[override]
        """Show what it stands for."""
        return (
            f"StandIn(the gradient of {self._name!r} has left .grad, shape={list(self.shape)}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    def _copy(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> StandIn:
        return _make(self, self._name, self._parameter, dtype, device)

    def _replace(self, gradient: torch.Tensor) -> StandIn:
        """Put the gradient of a further backward into `.grad`.

        Autograd adds to `.grad` in-place and does not look at the result. The clone is needed
        because the gradient may be shared with other parameters.
        """
        parameter = self._parameter()
        assert parameter is not None, "autograd holds it"
        parameter.grad = gradient.clone()
        return self

    def _error(self, operation: str) -> StreamedGradientError:
        remedy = _LOSS_SCALE if operation.startswith("_amp_") else _CLIP
        return StreamedGradientError(
            f"{operation} needs the gradient of parameter {self._name!r}, which has left .grad "
            f"during backward because the optimizer streams gradients. {remedy}, or construct the "
            "optimizer without module= to keep gradients in .grad"
        )


def _reject(name: str) -> Callable[..., Any]:
    def method(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        raise self._error(name)

    return method


# These read or write memory without an operation that torch would dispatch.
for _method in (
    *("item", "tolist", "numpy", "data_ptr", "storage", "untyped_storage", "share_memory_"),
    *("__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__"),
    *("__dlpack__", "__reduce_ex__"),
):
    setattr(StandIn, _method, _reject(_method))


def gradient_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return what `.grad` holds, None where that is a stand-in."""
    gradient = parameter.grad
    return None if type(gradient) is StandIn else gradient


def _make(
    like: torch.Tensor,
    name: str,
    parameter: weakref.ref[torch.Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> StandIn:
    made = torch.Tensor._make_wrapper_subclass(
        StandIn,
        like.shape,
        strides=like.stride(),
        dtype=dtype or like.dtype,
        device=device or like.device,
    )
    assert isinstance(made, StandIn)
    made._name = name
    made._parameter = parameter
    return made


def _autograd_accumulates() -> bool:
    """Tell whether the current operation is autograd's own addition to `.grad`."""
    node: torch.autograd.graph.Node | None = torch._C._current_autograd_node()
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


def _stand_ins_in(value: Any) -> Iterator[StandIn]:
    """Yield the stand-ins among an operation's arguments."""
    if isinstance(value, StandIn):
        yield value
    elif isinstance(value, dict):
        yield from _stand_ins_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _stand_ins_in(item)
