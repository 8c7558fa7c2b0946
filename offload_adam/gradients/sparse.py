"""Sparse gradients as rows of a table."""

from __future__ import annotations

from typing import NamedTuple

import torch

from offload_adam.torch_private import coo_indices, coo_values


class GradientRows(NamedTuple):
    """The entries of a sparse gradient, unordered and with repeated rows.

    rows: (k,) int64, each in [0, number of rows).
    values: (k, width) floating point, on the same device. Values of a repeated row add up.
    """

    rows: torch.Tensor
    values: torch.Tensor

    def joined(self, other: GradientRows) -> GradientRows:
        """Return the entries of both."""
        return GradientRows(*map(torch.cat, zip(self, other, strict=True)))


def width_of(parameter: torch.Tensor) -> int:
    """Return the number of elements of one row (index of the first dimension); 1 for a vector."""
    width = 1
    for size in parameter.shape[1:]:
        width *= size
    return width


def read_rows(name: str, parameter: torch.Tensor, gradient: torch.Tensor) -> GradientRows:
    """Return the entries of a COO gradient whose sparse dimension is the parameter's first.

    Args:
        gradient: torch.sparse_coo of the parameter's shape and device; it need not be coalesced.

    Raises:
        ValueError: the gradient has another form or an index is out of range; the message names the
            parameter.
    """
    if not parameter.is_contiguous():
        raise ValueError(
            f"The gradient of parameter {name!r} is sparse, but the parameter is not contiguous, "
            "so its rows are not contiguous in memory. Make it contiguous before you construct the "
            "optimizer."
        )
    if gradient.sparse_dim() != 1:
        raise ValueError(
            f"The gradient of parameter {name!r} is sparse in {gradient.sparse_dim()} dimensions. "
            "Only the first may be sparse, as in nn.Embedding(sparse=True)."
        )
    rows, values = coo_indices(gradient)[0], coo_values(gradient)
    if rows.numel() > 0:
        low, high = (int(bound) for bound in torch.aminmax(rows))
        if low < 0 or high >= parameter.shape[0]:
            raise ValueError(
                f"The gradient of parameter {name!r} has an index of {low if low < 0 else high}. "
                f"Its rows are 0 to {parameter.shape[0] - 1}."
            )
    return GradientRows(rows, values.reshape(rows.numel(), width_of(parameter)))


def sum_duplicates(entries: GradientRows) -> GradientRows:
    """Return unique rows in ascending order, with the sum of the values of each row."""
    rows, values = entries
    if rows.numel() == 0:
        return entries
    # Coalescing sorts, so it adds in a deterministic order. On a device, index_add_ does not.
    size = (int(rows.max()) + 1, values.shape[1])
    summed = torch.sparse_coo_tensor(
        rows[None],
        values,
        size=size,
        dtype=values.dtype,
        device=values.device,
        check_invariants=False,  # the rows are valid; torch warns if this is left out
    ).coalesce()
    return GradientRows(summed.indices()[0], summed.values())
