"""Read gradients from `.grad`, and reject those that cannot be used, by the parameter's name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

import torch

from offload_adam.fsdp_private import is_dtensor, local_gradient, local_of
from offload_adam.gradients.sparse import GradientRows, read_rows
from offload_adam.gradients.stand_in import (
    ShardStandIn,
    StandIn,
    StreamedGradients,
    gradient_of,
)
from offload_adam.params.elements import FORMATS


class LocalGradients(NamedTuple):
    """The gradients of one bucket in the tensors of autograd, by position in the bucket.

    tensors: dense gradients in the parameter's memory order; None for a missing or sparse one. The
        references keep the memory at `addresses` alive.
    addresses: address of the first element, 0 for None.
    dtypes: the dtypes that occur, sorted by name.
    rows: sparse gradients, by position.
    """

    tensors: list[torch.Tensor | None]
    addresses: list[int]
    dtypes: list[torch.dtype]
    rows: dict[int, GradientRows]


class GradientReader:
    """Reads the gradients of one bucket's parameters in their memory order.

    For a DTensor, it reads this rank's part of the gradient.

    Args:
        accepts_sparse: read sparse gradients as rows instead of rejecting them.

    Cost: one visit of each gradient. With ten thousand small gradients each object is a cache miss,
    which costs more than the interpreter, so `take` checks and takes a gradient in one visit.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[torch.nn.Parameter],
        *,
        accepts_sparse: bool = False,
    ) -> None:
        self._accepts_sparse = accepts_sparse
        self._names = list(names)
        self._parameters = list(parameters)
        local = list(map(local_of, parameters))
        self._numels = [tensor.numel() for tensor in local]
        self._strides = [tensor.stride() for tensor in local]
        self._are_contiguous = [tensor.is_contiguous() for tensor in local]
        self._all_contiguous = all(self._are_contiguous)
        self._on_cuda = local[0].is_cuda
        self._are_parts = is_dtensor(parameters[0])  # as all of the bucket
        self._has_taken = False
        self._taken: list[torch.Tensor | None] = [None] * len(self._parameters)
        self._addresses = [0] * len(self._parameters)
        self.stand_ins: list[StandIn | None] = [None] * len(self._parameters)

    def make_stand_ins(self, source: StreamedGradients | None, indices: Sequence[int]) -> None:
        """Construct the placeholders for `.grad`. Without this call, taken gradients become None.

        Args:
            source: computes norms of the gradients, and multiplies them.
            indices: index of each of these parameters in the optimizer, for `source`.
        """
        self._source, self._indices = source, indices
        self.stand_ins = list(map(self._make_stand_in, range(len(self._parameters))))

    def _make_stand_in(self, position: int) -> StandIn:
        kind = ShardStandIn if self._are_parts else StandIn
        name, parameter = self._names[position], self._parameters[position]
        return kind(name, parameter, self._source, self._indices[position])

    @property
    def has_added(self) -> bool:
        """Whether FSDP2 has added a gradient to a stand-in, which was not read yet."""
        if not self._are_parts:
            return False
        gradients = (parameter.grad for parameter in self._parameters)
        return any(isinstance(found, StandIn) and found.added is not None for found in gradients)

    def take(self, positions: Sequence[int]) -> None:
        """Take gradients out of `.grad` right after backward wrote them, while they are in cache.

        Gradients that must be checked or copied are left for `read`. A second gradient before
        `read` is added to the first, as autograd adds in `.grad`.
        """
        if not self._all_contiguous or self._are_parts:
            return
        self._has_taken = True
        taken, stand_ins, numels = self._taken, self.stand_ins, self._numels
        for position in positions:
            parameter = self._parameters[position]
            gradient = parameter.grad
            # The same as `_is_plain`, inlined: a call costs more than the checks.
            if (
                gradient is None
                or isinstance(gradient, StandIn)
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
            except RuntimeError:  # `module.to()` changed the parameter
                self._remake_stand_in(position)
            before = taken[position]  # of an earlier backward, not read yet
            if before is not None:
                gradient = before.add_(gradient)
            taken[position] = gradient
            self._addresses[position] = gradient.data_ptr()

    def read(self, *, keep: bool) -> LocalGradients:
        """Return each parameter's gradient in the parameter's own element order, or None.

        A gradient whose strides differ from the parameter's is copied; others share memory.

        Args:
            keep: do not modify `.grad`. Otherwise a stand-in replaces each gradient that was read.

        Collective if a DTensor's gradient is placed otherwise than its parameter.

        Raises:
            ValueError: a gradient is sparse, complex or on another device; the message names the
                parameter. `.grad` was not modified.
        """
        tensors, addresses = list(self._taken), list(self._addresses)
        rest = [position for position, tensor in enumerate(tensors) if tensor is None]
        rows: dict[int, GradientRows] = {}
        for position in rest:
            gradient = gradient_of(self._parameters[position])
            if gradient is None:
                continue
            if self._are_parts:
                gradient = local_gradient(gradient, self._parameters[position])
            if not self._is_plain(gradient, self._numels[position]):
                if gradient.is_sparse and self._accepts_sparse:
                    rows[position] = self._rows_of(position, gradient)
                    continue
                gradient = self._conform(position, gradient)
            tensors[position] = gradient
            addresses[position] = gradient.data_ptr()
        self.forget()
        if not keep:
            for position in rest:
                if tensors[position] is None and position not in rows:
                    # A stand-in from an earlier backward must not remain: there is no gradient.
                    self._parameters[position].grad = None
                else:
                    self._leave_stand_in(position)
        dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
        return LocalGradients(tensors, addresses, sorted(dtypes, key=str), rows)

    def forget(self) -> None:
        """Drop gradients that were taken but not read, for example after `read` has raised."""
        for stand_in in self.stand_ins if self._are_parts else ():
            if stand_in is not None:
                stand_in.added = None
        if self._has_taken:
            self._has_taken = False
            self._taken[:] = [None] * len(self._taken)
            self._addresses[:] = [0] * len(self._addresses)

    def emptied(self, left: Sequence[bool]) -> str | None:
        """Return the name of a parameter whose `.grad` was set to None after its gradient had left.

        Args:
            left: by position, whether a gradient was read and sent. Gradients that were taken but
                not read are known here.
        """
        for name, parameter, has_left, taken in zip(
            self._names, self._parameters, left, self._taken, strict=True
        ):
            if (has_left or taken is not None) and parameter.grad is None:
                return name
        return None

    def hide_stand_ins(self) -> None:
        """Set `.grad` to None if it is a stand-in, so that autograd stores its gradient there."""
        for parameter in self._parameters:
            if isinstance(parameter.grad, StandIn) and parameter.grad.added is None:
                parameter.grad = None

    def show_stand_ins(self, positions: Iterable[int]) -> None:
        """Put stand-ins into `.grad` at these positions, unless it holds a gradient."""
        for position in positions:
            if self._parameters[position].grad is None:
                self._leave_stand_in(position)

    def _leave_stand_in(self, position: int) -> None:
        stand_in = self.stand_ins[position]
        if stand_in is not None:
            stand_in.added = None  # it was read
        try:
            self._parameters[position].grad = stand_in
        except RuntimeError:
            self._remake_stand_in(position)

    def _remake_stand_in(self, position: int) -> None:
        """Replace a stand-in that no longer fits: module.to() may have changed the parameter."""
        parameter = self._parameters[position]
        stand_in = self._make_stand_in(position)
        self.stand_ins[position] = parameter.grad = stand_in

    def _is_plain(self, gradient: torch.Tensor, numel: int) -> bool:
        """Return whether the kernels can read a gradient's memory without a check or copy."""
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
        """Check a gradient, and return it in its parameter's memory order, as a copy if needed."""
        parameter = local_of(self._parameters[position])
        if parameter.numel() != self._numels[position]:
            raise ValueError(
                f"Parameter {self._names[position]!r} has {parameter.numel()} elements, but had "
                f"{self._numels[position]} when the optimizer was constructed. Wrap, shard or "
                "resize a model before you construct the optimizer."
            )
        if (
            gradient.layout is not torch.strided
            or gradient.dtype not in FORMATS
            or gradient.shape != parameter.shape
            or gradient.is_cuda != self._on_cuda
        ):
            self._reject(position, gradient)
        # The imaginary part of a conjugate is a lazily negated view: torch negates when it reads,
        # but the kernels read the memory.
        gradient = gradient.resolve_neg()
        # Not `parameter.stride()`: the user may have replaced the parameter's data by others with
        # other strides. The step copies their values to the bucket, in the bucket's order.
        strides = self._strides[position]
        if gradient.stride() == strides:
            return gradient
        if gradient.is_contiguous() and self._are_contiguous[position]:
            return gradient  # only the strides of dimensions of size 1 differ, which have no effect
        ordered = torch.empty_strided(
            parameter.shape, strides, dtype=gradient.dtype, device=gradient.device
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
        known = (torch.strided, torch.sparse_coo) if self._accepts_sparse else (torch.strided,)
        if gradient.layout not in known:
            raise ValueError(
                f"The gradient of parameter {name!r} is {gradient.layout}, but OffloadAdam and "
                "amsgrad support only dense gradients. For nn.Embedding, pass sparse=False."
            )
        if gradient.dtype not in FORMATS:
            raise ValueError(
                f"The gradient of parameter {name!r} has dtype {gradient.dtype}. Supported are "
                "float32, bfloat16 and float16."
            )
        parameter = local_of(self._parameters[position])
        raise ValueError(
            f"The gradient of parameter {name!r} has shape {tuple(gradient.shape)} on "
            f"{gradient.device}, but the parameter has shape {tuple(parameter.shape)} on "
            f"{parameter.device}. Set .grad to a tensor of the parameter's shape and device."
        )
