"""One rank's range of a parameter's state, as `state_dict()` gives it with several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Never, SupportsIndex

import torch

from offload_adam.step.box_tensor import BoxSource, BoxTensor, range_sources
from offload_adam.torch_private import ATEN_TO_COPY, make_wrapper_subclass

_aten = torch.ops.aten
_LIKE_ITSELF = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.detach.default,
    ATEN_TO_COPY,
    _aten.empty_like.default,
    _aten.zeros_like.default,
}


class StateShard(BoxTensor):
    """A tensor of the parameter's shape of which this rank holds a flat range.

    `torch.distributed.checkpoint` saves and loads it in any world. It can be copied, moved, cast,
    compared and loaded; `to_local()` gives the elements themselves. It cannot be pickled, because
    one rank's file would not hold the state of the others.
    """

    _order: tuple[int, ...]
    _start: int
    _local: torch.Tensor

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], order: tuple[int, ...], start: int, local: torch.Tensor
    ) -> StateShard:
        """Make one of a rank's range.

        Args:
            shape: of the parameter.
            order: its dimensions as they lie in memory, the outermost first.
            start: index in memory order of the first element of `local`.
            local: (n,) elements [start, start + n); shared, not copied.
        """
        shard = make_wrapper_subclass(
            cls, torch.Size(shape), dtype=local.dtype, device=local.device
        )
        assert isinstance(shard, StateShard)
        shard._order, shard._start, shard._local = order, start, local
        return shard

    def to_local(self) -> torch.Tensor:
        """Return this rank's elements, 1-d in memory order, sharing memory."""
        return self._local

    def has_range_of(self, order: tuple[int, ...], start: int, end: int) -> bool:
        """Tell whether it holds exactly elements [start, end) in this memory order."""
        own = (self._start, self._start + self._local.numel())
        return self._order == order and own == (start, end)

    def __deepcopy__(self, memo: dict[int, Any]) -> StateShard:
        """Copy this rank's elements."""
        memo[id(self)] = copied = self._with(self._local.clone())
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> Never:
        """Refuse to be pickled, as `torch.save` does.

        Raises:
            TypeError: naming what saves the state of every rank.
        """
        raise TypeError(
            f"state_dict() holds {self._range()} on this rank only, so that its file would lose "
            "the state of the other ranks. Call full_state_dict() on every rank and save what rank "
            "0 gets, or use offload_adam.save_checkpoint or torch.distributed.checkpoint; for a "
            "file for each rank, save local_state_dict()"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        """Show the shape, and the range that is here."""
        return f"StateShard({self._range()}, shape={list(self.shape)})"

    def _boxes(self) -> dict[tuple[int, ...], BoxSource]:
        # Made when asked for: dcp.async_save copies a tensor by its attributes, and would keep
        # boxes that are views of the optimizer's memory.
        sources = range_sources(self.shape, self._order, self._start, self._local)
        return {source.box.offsets: source for source in sources}

    def _range(self) -> str:
        end = self._start + self._local.numel()
        return f"elements [{self._start}, {end}) of {self.shape.numel()}"

    def _with(self, local: torch.Tensor) -> StateShard:
        return StateShard(self.shape, self._order, self._start, local)

    def _local_part(self, value: torch.Tensor) -> torch.Tensor | None:
        """Return the elements of another tensor that lie where this rank's do, None if not here."""
        end = self._start + self._local.numel()
        if isinstance(value, StateShard):
            fits = value.shape == self.shape and value.has_range_of(self._order, self._start, end)
            return value._local if fits else None
        if value.shape == self.shape:
            return value.permute(self._order).reshape(-1)[self._start : end]
        return value if value.dim() == 0 else None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has mangled names
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Copy, move, cast, compare or load the local elements; reject everything else."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, StateShard):
            if func in _LIKE_ITSELF:
                kwargs.pop("memory_format", None)  # one of the whole shape, and this is 1-d
                return first._with(func(first._local, *args[1:], **kwargs))
            if func is _aten.new_empty.default and tuple(args[1]) == first.shape:
                return first._with(func(first._local, first._local.shape, **kwargs))
            if func in (_aten.copy_.default, _aten.equal.default):
                part = first._local_part(args[1])
                if part is not None:
                    result = func(first._local, part, *args[2:], **kwargs)
                    return first if func is _aten.copy_.default else result
        raise NotImplementedError(
            f"{func} cannot be computed from {first!r}. Use to_local() for the elements of this "
            "rank, or the optimizer's full_state_dict() for whole tensors"
        )
