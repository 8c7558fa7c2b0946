"""`CodedTensor`: a moment in 8-bit codes, as the tensor that `optimizer.state` shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Never, SupportsIndex

import torch

from offload_adam.memory.codes import CodedMoment
from offload_adam.params.elements import in_memory_order, in_shape_of
from offload_adam.torch_private import (
    make_wrapper_subclass,
    schema_of,
    tree_leaves,
    tree_map_only,
)


class CodedTensor(torch.Tensor):
    """A moment in 8-bit codes that behaves as a bfloat16 tensor.

    Every operation decodes it first. An operation in place is applied to the decoded values, which
    are then encoded, rounded to nearest: a change of less than half a step has no effect. A view,
    such as a row, has the values of the time when it was taken. Writing to a view raises an error,
    because the codes would not change. Copies, pickles and other results are plain tensors.
    """

    _moment: CodedMoment | None  # None for a view
    _taken: torch.Tensor | None  # values of a view

    @staticmethod
    def __new__(cls, moment: CodedMoment, like: torch.Tensor) -> CodedTensor:
        """Construct a tensor over the memory of the codes.

        Args:
            moment: (n,) elements in memory order.
            like: has the shape, and the order of elements in memory, of the new tensor.
        """
        tensor = cls._wrapper(like, moment.dtype)
        tensor._moment, tensor._taken = moment, None
        return tensor

    @classmethod
    def _view(cls, values: torch.Tensor) -> CodedTensor:
        tensor = cls._wrapper(values, values.dtype)
        tensor._moment, tensor._taken = None, values
        return tensor

    @classmethod
    def _wrapper(cls, like: torch.Tensor, dtype: torch.dtype) -> CodedTensor:
        tensor = make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype, device=torch.device("cpu")
        )
        assert isinstance(tensor, CodedTensor)
        return tensor

    def decoded(self) -> torch.Tensor:
        """Return the values as a plain tensor with the same strides."""
        if self._moment is None:
            assert self._taken is not None
            return self._taken
        return in_shape_of(self._moment.values(), self)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write to a part of the whole moment."""
        values = self.decoded().clone()
        values[index] = value
        self.copy_(values)

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self.decoded().tolist()

    def __format__(self, spec: str) -> str:
        """Format the values."""
        return format(self.decoded(), spec)

    def share_memory_(self) -> Never:
        """Reject sharing with other processes.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A moment in 8-bit codes cannot be shared with other processes. Share its clone()."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return the values as a plain tensor."""
        return self.decoded().clone()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle the values as a plain tensor."""
        return self.decoded().clone().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        """Show the values."""
        return f"CodedTensor({self.decoded()!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has mangled names
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the decoded values; encode them if it writes to them."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            raise NotImplementedError(
                "Collectives cannot write to a moment in 8-bit codes. Pass a clone(), and copy the "
                "result back with copy_()."
            )
        written = [each for each in _written(func, args, kwargs) if isinstance(each, cls)]
        if any(tensor._moment is None for tensor in written):
            raise NotImplementedError(
                "A view of a moment in 8-bit codes, such as a slice or .data, cannot be modified "
                "in place. Assign to it, as in state['exp_avg'][rows] = values, or modify the "
                "whole moment."
            )
        decoded: dict[int, torch.Tensor] = {}

        def decode(tensor: CodedTensor) -> torch.Tensor:
            return decoded.setdefault(id(tensor), tensor.decoded())

        plain_args, plain_kwargs = tree_map_only(cls, decode, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        owners = {}
        for tensor in written:
            values = decoded[id(tensor)]
            if values.shape != tensor.shape or values.stride() != tensor.stride():
                raise NotImplementedError(
                    f"{func} cannot change the shape of a moment in 8-bit codes."
                )
            assert tensor._moment is not None
            tensor._moment.copy_(in_memory_order(values))
            owners[id(values)] = tensor
        if written:
            return tree_map_only(torch.Tensor, lambda each: owners.get(id(each), each), result)
        is_view = any(value.alias_info is not None for value in schema_of(func).returns)
        return tree_map_only(torch.Tensor, cls._view, result) if is_view else result


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """Yield the tensors that an operation writes to, by its schema."""
    for place, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(args[place] if place < len(args) else kwargs.get(argument.name))
