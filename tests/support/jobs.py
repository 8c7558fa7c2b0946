"""Jobs of `offload-adam train` on the ranks of a pool, which join as under torchrun."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from offload_adam.config import RunConfig
from offload_adam.train.job import run_job
from tests.support.ranks import RankPool


def train_as_a_rank(rank: int, world_size: int, sections: dict[str, Any]) -> None:
    dist.destroy_process_group()  # the job opens its own
    run_job(RunConfig.model_validate(sections), Console(file=io.StringIO()))
    torch.set_num_threads(1)  # as the pool has it


def run_on_ranks(
    ranks: RankPool,
    world_size: int,
    sections: dict[str, Any],
    train: Callable[[int, int, dict[str, Any]], Any] = train_as_a_rank,
) -> list[Any]:
    """Run the job on ranks that join, as under torchrun, through a store in another process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }
    return ranks.run(train, world_size, sections, env=agent)
