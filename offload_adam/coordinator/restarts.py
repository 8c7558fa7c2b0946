"""What `torchrun --max-restarts` cannot mend is tried once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from offload_adam.errors import NotRetriedError

_MARK = "offload_adam/not_retried"


def attempt() -> int:
    """Return how often torchrun has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def refuse_retry(store: dist.Store) -> None:
    """Stop a restarted run at once when an earlier attempt has left the mark of a final error.

    Raises:
        NotRetriedError: quoting that error.
    """
    agent_store = _agent_store(store)
    if attempt() > 0 and agent_store.check([_mark()]):
        raise NotRetriedError(
            "not tried again, for a restart cannot mend it: " + agent_store.get(_mark()).decode()
        )


@contextmanager
def final(*kinds: type[Exception]) -> Iterator[None]:
    """Mark errors of these kinds, raised in the block, as ones that a restart cannot mend."""
    try:
        yield
    except kinds as error:
        if dist.is_initialized():
            store = _agent_store(c10d._get_default_store())
            store.set(_mark(), f"{type(error).__name__}: {error}")
        raise


def _mark() -> str:
    return f"{_MARK}/{os.environ.get('TORCHELASTIC_RUN_ID', '')}"


def _agent_store(store: Any) -> dist.Store:
    """Return the store beneath all prefixes: torchrun's agent keeps it through its restarts."""
    found: dist.Store = getattr(store, "_underlying_non_prefix_store", store)
    return found
