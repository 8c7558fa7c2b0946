"""Folding gradients into a shard: torch's bits, for any formats, lengths, offsets and threads."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from offload_adam.kernels import fold, threads
from offload_adam.params.elements import FORMATS, bits_of
from offload_adam.step.host_update import HostUpdate
from tests.support.policies import in_policies
from tests.support.scenario import Offloading

PAIRS = list(product(FORMATS, FORMATS))
INTEGERS = {2: torch.int16, 4: torch.int32}


@pytest.fixture(autouse=True, scope="module")
def start_threads() -> None:
    threads.plan_threads(2)


def random_bits(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return random bit patterns: all exponents, denormals, infinities and NaNs among them.

    Every other element is of a common size, so that sums round.
    """
    generator = torch.Generator().manual_seed(seed)
    nbytes = numel * dtype.itemsize
    patterns = torch.randint(256, (nbytes,), generator=generator, dtype=torch.uint8).view(dtype)
    values = torch.randn(numel, generator=generator, dtype=torch.float32).to(dtype)
    return torch.where(torch.arange(numel) % 2 == 0, patterns, values)


def folded_by_torch(target: torch.Tensor, source: torch.Tensor, *, adds: bool) -> torch.Tensor:
    target = target.clone()
    return target.add_(source) if adds else target.copy_(source)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Any NaN serves for a NaN; everything else is compared by its bits, also the sign of a 0."""
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    integer = INTEGERS[ours.dtype.itemsize]
    assert torch.equal(ours.view(integer)[~nan], theirs.view(integer)[~nan])


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("to", "of"), PAIRS)
@pytest.mark.parametrize(
    ("numel", "offset", "num_pieces"), [(0, 0, 1), (1, 1, 2), (127, 3, 3), (70_001, 1, 7)]
)
def test_bits_are_torchs(
    to: torch.dtype, of: torch.dtype, numel: int, offset: int, num_pieces: int, adds: bool
) -> None:
    whole, source = random_bits(numel + offset + 5, to, 1), random_bits(numel, of, 2)
    before = whole.clone()
    target = whole[offset : offset + numel]
    expected = folded_by_torch(target, source, adds=adds)
    threads.use_threads(2)
    fold.fold(bits_of(target), bits_of(source), num_pieces, adds=adds)
    assert_same_bits(target, expected)
    integer = INTEGERS[to.itemsize]
    for outside in (slice(0, offset), slice(offset + numel, None)):
        assert torch.equal(whole[outside].view(integer), before[outside].view(integer))


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_copy_in_one_format_keeps_the_bits_of_every_nan(dtype: torch.dtype) -> None:
    source, target = random_bits(70_001, dtype, 3), torch.zeros(70_001, dtype=dtype)
    fold.fold(bits_of(target), bits_of(source), 2, adds=False)
    assert source.isnan().any()
    assert torch.equal(target.view(torch.uint8), source.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_is_cast_and_added_as_torch_does(dtype: torch.dtype) -> None:
    source = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16)).view(dtype)
    for adds in (False, True):
        target = torch.full((2**16,), 2.0**-130)  # a denormal, which must not be flushed
        expected = folded_by_torch(target, source, adds=adds)
        fold.fold(bits_of(target), bits_of(source), 2, adds=adds)
        assert_same_bits(target, expected)


@pytest.mark.parametrize(
    ("dtype", "options", "pair"),
    [
        (torch.bfloat16, {}, None),  # copied straight
        (torch.bfloat16, {"accumulate": "host"}, (torch.float32, torch.bfloat16)),
        (torch.bfloat16, {"pin": "none"}, (torch.bfloat16, torch.bfloat16)),
        (torch.float32, {"pin": "staging"}, (torch.float32, torch.float32)),
    ],
)
def test_the_kernel_is_compiled_at_construction_where_a_bucket_needs_it(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    options: dict[str, Any],
    pair: tuple[torch.dtype, torch.dtype] | None,
) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(fold, "compile_kernel", lambda *formats: compiled.append(formats))
    module = torch.nn.Linear(8, 8, dtype=dtype)
    if "accumulate" in options:
        options = {**options, "module": module, "gradient_reduction": "optimizer"}
    optimizer = Offloading(module.parameters(), **in_policies(**options))
    optimizer.close()
    assert compiled == ([] if pair is None else [tuple(FORMATS[each] for each in pair)])


def test_dtypes_that_no_bucket_has_are_folded_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fold, "fold")
    update = HostUpdate(2)
    shard, source = torch.ones(1000), torch.full((1000,), 0.1, dtype=torch.float64)
    for adds in (False, True):
        expected = folded_by_torch(shard, source, adds=adds)
        update.fold(shard, source, adds=adds)
        assert torch.equal(shard, expected)
