"""What `torchrun --max-restarts` cannot mend is tried once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from offload_adam.errors import NotRetriedError
from offload_adam.torch_private import default_store, store_without_prefixes

_MARK = "offload_adam/not_retried"


def attempt() -> int:
    """Return how often torchrun has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def refuse_retry(store: dist.Store) -> None:
    """Stop a restarted run at once when an earlier attempt has left the mark of a final error.

    Raises:
        NotRetriedError: quoting that error.
    """
    agent_store = store_without_prefixes(store)  # torchrun's agent keeps it through restarts
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
            store = store_without_prefixes(default_store())
            store.set(_mark(), f"{type(error).__name__}: {error}")
        raise


def _mark() -> str:
    return f"{_MARK}/{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
