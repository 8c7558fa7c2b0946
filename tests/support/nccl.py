"""A stand-in for NCCL: torch's own Python code opens its groups, and gloo does the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d


class NcclOptions:
    """The options of `ProcessGroupNCCL` that torch and this package set."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream
        self.split_from: Any = None
        self.split_color: int | None = None
        self._timeout = timedelta(minutes=10)


class StandInNccl(dist.ProcessGroupGloo):
    """Takes the place of `ProcessGroupNCCL`.

    opened: the instances in the order in which torch made them.
    """

    Options = NcclOptions  # type: ignore[assignment]
    opened: list[StandInNccl]
    supports_splitting = True

    def __init__(self, store: dist.Store, rank: int, size: int, options: NcclOptions) -> None:
        super().__init__(store, rank, size, options._timeout)
        self.given = options
        self.opened.append(self)

    def eager_connect_single_device(self, device: object) -> None:
        pass


@contextmanager
def stand_in_nccl() -> Iterator[list[StandInNccl]]:
    """Let torch use the stand-in, and yield the instances that it makes."""
    StandInNccl.opened = []
    with (
        mock.patch.object(c10d, "ProcessGroupNCCL", StandInNccl, create=True),
        mock.patch.object(c10d, "is_nccl_available", return_value=True),
    ):
        yield StandInNccl.opened
