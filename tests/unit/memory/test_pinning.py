"""`CudaRuntime` against a stand-in for torch.cuda that has a current device and contexts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from offload_adam.memory.pinning import CudaRuntime, cuda_runtime
from offload_adam.step.build import empty_cache
from tests.support.cuda_runtime import StandInRuntime

OWN = torch.device("cuda", 1)


class FakeCuda:
    """Two GPUs; a call of the driver leaves a context on the current one, which is GPU 0 first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.contexts: set[int] = set()
        self.calls = 0
        for name in ("device", "cudart", "empty_cache", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        # Our own device has memory in use, and GPU 0 is another rank's.
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: index)
        monkeypatch.setattr(torch, "empty", self.empty)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def cudart(self) -> Any:
        return self

    def call(self, *arguments: object) -> int:
        self.calls += 1
        self.contexts.add(self.current)
        return 0

    cudaHostRegister = cudaHostUnregister = empty_cache = call

    def synchronize(self, index: int) -> None:
        self.calls += 1
        self.contexts.add(index)

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        self.calls += 1
        index: int | None = torch.device(device).index
        self.contexts.add(self.current if index is None else index)
        return torch.zeros(numel, dtype=dtype, device="cpu")


@pytest.mark.parametrize(
    "use",
    [
        lambda: CudaRuntime(OWN).register(4096, 4096),
        lambda: CudaRuntime(OWN).unregister(4096),
        lambda: CudaRuntime(OWN).clear_error(),
        lambda: CudaRuntime(OWN).finish_copies(),
        lambda: empty_cache(OWN),
    ],
    ids=["register", "unregister", "clear_error", "finish_copies", "empty_cache"],
)
def test_no_context_is_created_but_on_the_given_device(
    use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch)
    use()
    assert cuda.calls == 1
    assert cuda.contexts == {1}
    assert cuda.current == 0


def test_the_stand_in_finds_a_call_on_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = StandInRuntime()
    assert runtime.register(4096, 4096) == 0
    monkeypatch.setattr(runtime, "on_device", lambda: torch.no_grad())
    with pytest.raises(AssertionError, match="context"):
        runtime.unregister(4096)


def test_nothing_is_pinned_or_emptied_for_another_kind_of_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    assert cuda_runtime(torch.device("cpu")) is None
    empty_cache(torch.device("cpu"))
    assert cuda.calls == 0
