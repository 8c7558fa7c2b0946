"""Read gradients from `.grad`, and reject those that cannot be used, by the parameter's name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

import torch

from offload_adam.gradients.sparse import GradientRows, read_rows
from offload_adam.gradients.stand_in import StandIn, StreamedGradients, gradient_of
from offload_adam.params.elements import FORMATS


class LocalGradients(NamedTuple):
    """The gradients of one bucket where autograd left them, one entry a parameter.

    tensors: dense, in the parameter's memory order; None where there is none. Holding them keeps
        the memory alive that `addresses` point to.
    addresses: of the first element, 0 where there is none.
    dtypes: all that occur, in a fixed order.
    rows: sparse gradients, by position; they have no entry in `tensors`.
    """

    tensors: list[torch.Tensor | None]
    addresses: list[int]
    dtypes: list[torch.dtype]
    rows: dict[int, GradientRows]


class GradientReader:
    """Reads the gradients of one bucket's parameters in their memory order.

    Each gradient is looked at once, all of it together: among ten thousand small ones every object
    is a cache miss, and those cost more than the interpreter.

    Args:
        takes_rows: sparse gradients are read as rows instead of rejected.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[torch.nn.Parameter],
        *,
        takes_rows: bool = False,
    ) -> None:
        self._takes_rows = takes_rows
        self._names = list(names)
        self._parameters = list(parameters)
        self._numels = [parameter.numel() for parameter in parameters]
        self._all_contiguous = all(parameter.is_contiguous() for parameter in parameters)
        self._on_cuda = parameters[0].is_cuda
        self._has_taken = False
        self._taken: list[torch.Tensor | None] = [None] * len(self._parameters)
        self._addresses = [0] * len(self._parameters)
        self.stand_ins: list[StandIn | None] = [None] * len(self._parameters)

    def make_stand_ins(self, source: StreamedGradients | None, indices: Sequence[int]) -> None:
        """Make what `.grad` holds after a gradient has left; without them it is None then.

        Args:
            source: knows the gradients' norms, and multiplies them.
            indices: what it knows these parameters by.
        """
        rows = zip(self._names, self._parameters, indices, strict=True)
        self._source, self._indices = source, indices
        self.stand_ins = [
            StandIn(name, parameter, source, index) for name, parameter, index in rows
        ]

    def take(self, positions: Sequence[int]) -> None:
        """Take gradients out of `.grad` while they are still warm from backward.

        What needs a second look is left to `read`. A gradient that comes again before that is
        added, as autograd would have added it in `.grad`.
        """
        if not self._all_contiguous:
            return
        self._has_taken = True
        taken, stand_ins, numels = self._taken, self.stand_ins, self._numels
        for position in positions:
            parameter = self._parameters[position]
            gradient = parameter.grad
            # `_is_plain` once more, without the call.
            if (
                gradient is None
                or type(gradient) is StandIn
                or gradient.layout is not torch.strided
                or gradient.dtype not in FORMATS
                or not gradient.is_contiguous()
                or gradient.numel() != numels[position]
                or gradient.is_cuda != self._on_cuda
                or gradient.is_neg()
            ):
                continue
            try:
                parameter.grad = stand_ins[position]
            except RuntimeError:
                self._remake_stand_in(position)
            before = taken[position]
            if before is not None:
                gradient = before.add_(gradient)
            taken[position] = gradient
            self._addresses[position] = gradient.data_ptr()

    def read(self, *, keep: bool) -> LocalGradients:
        """Return each parameter's gradient in the parameter's own element order, or None.

        A gradient whose strides differ from the parameter's is copied; all others are returned as
        they are, those that have been taken first.

        Args:
            keep: leave `.grad` as it is; else a stand-in is there afterwards where it was read.

        Raises:
            ValueError: naming the parameter, for a sparse or complex gradient or one on another
                device; nothing is taken then.
        """
        tensors, addresses = list(self._taken), list(self._addresses)
        rest = [position for position, tensor in enumerate(tensors) if tensor is None]
        rows: dict[int, GradientRows] = {}
        for position in rest:
            gradient = gradient_of(self._parameters[position])
            if gradient is None:
                continue
            if not self._is_plain(gradient, self._numels[position]):
                if gradient.is_sparse and self._takes_rows:
                    rows[position] = self._rows_of(position, gradient)
                    continue
                gradient = self._conform(position, gradient)
            tensors[position] = gradient
            addresses[position] = gradient.data_ptr()
        self.forget()
        if not keep:
            for position in rest:
                if tensors[position] is None and position not in rows:
                    self._parameters[position].grad = None
                else:
                    self._leave_stand_in(position)
        dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
        return LocalGradients(tensors, addresses, sorted(dtypes, key=str), rows)

    def forget(self) -> None:
        """Drop gradients that were taken and not read, as where `read` has raised."""
        if self._has_taken:
            self._has_taken = False
            self._taken[:] = [None] * len(self._taken)
            self._addresses[:] = [0] * len(self._addresses)

    def emptied(self, left: Sequence[bool]) -> str | None:
        """Return the name of a parameter whose `.grad` was set to None after its gradient had left.

        Args:
            left: by position, whether a gradient has left, besides those that have been taken.
        """
        for name, parameter, has_left, taken in zip(
            self._names, self._parameters, left, self._taken, strict=True
        ):
            if (has_left or taken is not None) and parameter.grad is None:
                return name
        return None

    def hide_stand_ins(self) -> None:
        """Empty `.grad` where it holds a stand-in, so that autograd need not replace it."""
        for parameter in self._parameters:
            if type(parameter.grad) is StandIn:
                parameter.grad = None

    def show_stand_ins(self, positions: Iterable[int]) -> None:
        """Put stand-ins where gradients have left, unless `.grad` holds another one."""
        for position in positions:
            if self._parameters[position].grad is None:
                self._leave_stand_in(position)

    def _leave_stand_in(self, position: int) -> None:
        try:
            self._parameters[position].grad = self.stand_ins[position]
        except RuntimeError:
            self._remake_stand_in(position)

    def _remake_stand_in(self, position: int) -> None:
        """Replace a stand-in that no longer fits: module.to() may have changed the parameter."""
        parameter = self._parameters[position]
        stand_in = StandIn(self._names[position], parameter, self._source, self._indices[position])
        self.stand_ins[position] = parameter.grad = stand_in

    def _is_plain(self, gradient: torch.Tensor, numel: int) -> bool:
        """Tell whether a gradient can be read as it lies in memory."""
        return (
            self._all_contiguous
            and gradient.layout is torch.strided
            and gradient.dtype in FORMATS
            and gradient.is_contiguous()
            and gradient.numel() == numel
            and gradient.is_cuda == self._on_cuda
            and not gradient.is_neg()
        )

    def _conform(self, position: int, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient in its parameter's memory order, copied only where it is not."""
        parameter = self._parameters[position]
        if parameter.numel() != self._numels[position]:
            raise ValueError(
                f"parameter {self._names[position]!r} has {parameter.numel()} elements, and had "
                f"{self._numels[position]} when the optimizer was constructed. Wrap, shard or "
                "resize a model before the optimizer is constructed"
            )
        if (
            gradient.layout is not torch.strided
            or gradient.dtype not in FORMATS
            or gradient.shape != parameter.shape
            or gradient.is_cuda != self._on_cuda
        ):
            self._reject(position, gradient)
        # A view of a conjugate's imaginary part is negated only when it is read by torch.
        gradient = gradient.resolve_neg()
        if gradient.stride() == parameter.stride():
            return gradient
        if parameter.is_contiguous() and gradient.is_contiguous():
            return gradient
        ordered = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=gradient.dtype, device=gradient.device
        )
        return ordered.copy_(gradient)

    def _rows_of(self, position: int, gradient: torch.Tensor) -> GradientRows:
        parameter = self._parameters[position]
        if (
            gradient.dtype not in FORMATS
            or gradient.shape != parameter.shape
            or gradient.is_cuda != self._on_cuda
        ):
            self._reject(position, gradient)
        return read_rows(self._names[position], parameter, gradient)

    def _reject(self, position: int, gradient: torch.Tensor | None) -> NoReturn:
        assert gradient is not None
        name = self._names[position]
        known = (torch.strided, torch.sparse_coo) if self._takes_rows else (torch.strided,)
        if gradient.layout not in known:
            raise ValueError(
                f"the gradient of parameter {name!r} is {gradient.layout}: OffloadAdam "
                "takes dense ones only, and so does amsgrad (for nn.Embedding pass sparse=False)"
            )
        if gradient.dtype not in FORMATS:
            raise ValueError(
                f"the gradient of parameter {name!r} has dtype {gradient.dtype}; supported are "
                "float32, bfloat16 and float16"
            )
        parameter = self._parameters[position]
        raise ValueError(
            f"the gradient of parameter {name!r} has shape {tuple(gradient.shape)} on "
            f"{gradient.device}, the parameter {tuple(parameter.shape)} on {parameter.device}"
        )
