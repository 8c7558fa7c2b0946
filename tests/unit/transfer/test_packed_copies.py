"""Neighbouring small gradients share a D2H copy, and small parameters an H2D copy."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_adam import OffloadAdam
from offload_adam.gradients import packed_copies
from offload_adam.gradients.packed_copies import PackedCopies, Piece, arrived_pieces
from offload_adam.layout.flat import ParameterSpec, align
from offload_adam.params.selection import bucket_key_of
from offload_adam.plan.inputs import Training
from offload_adam.plan.prediction import predict
from offload_adam.torch_private import foreach_copy
from tests.support.policies import in_policies
from tests.support.scenario import Offloading

CPU = torch.device("cpu")
BLOCK = 128
SLOT_NBYTES = 16 * BLOCK
SMALL_NBYTES = 8 * BLOCK
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pieces_of(
    numels: list[int], dtypes: list[torch.dtype], missing: set[int]
) -> tuple[list[Piece], int]:
    """Return a piece for each parameter that is not missing, and the length of their shard."""
    pieces: list[Piece] = []
    start, follows = 0, False
    for number, (numel, dtype) in enumerate(zip(numels, dtypes, strict=True)):
        if number not in missing:
            values = torch.arange(1, numel + 1).remainder(200).add(number).to(dtype)
            pieces.append(Piece(values, start, start + numel, number % 3 == 0, follows))
        follows = number not in missing
        start += align(numel)
    return pieces, start


def reserved(nbytes: int) -> PackedCopies:
    copies = PackedCopies()
    copies.reserve(nbytes, CPU)
    return copies


def count_copies(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of `Tensor.copy_` on each thread."""
    counts: Counter[str] = Counter()
    copy = torch.Tensor.copy_

    def counted(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        counts[threading.current_thread().name] += 1
        return copy(self, *arguments, **options)

    patch.setattr(torch.Tensor, "copy_", counted)
    return counts


@settings(max_examples=100)
@given(data=st.data(), slot_nbytes=st.sampled_from([0, 4 * BLOCK, SLOT_NBYTES, 1 << 20]))
def test_every_element_arrives_and_missing_parameters_are_not_overwritten(
    data: st.DataObject, slot_nbytes: int
) -> None:
    numels = data.draw(st.lists(st.sampled_from([1, 64, 128, 130, 256, 600]), min_size=1))
    kinds = st.sampled_from(data.draw(st.sampled_from([DTYPES[:1], DTYPES[1:2], DTYPES])))
    dtypes = [data.draw(kinds) for _ in numels]
    missing = data.draw(st.sets(st.integers(0, len(numels) - 1)))
    pieces, shard_numel = pieces_of(numels, dtypes, missing)
    of_pieces = {piece.source.dtype for piece in pieces}
    dtype = of_pieces.pop() if len(of_pieces) == 1 else torch.float32
    target = torch.full((shard_numel,), -7.0, dtype=dtype)
    copies = reserved(slot_nbytes)
    copies.slot(CPU).fill_(255)  # NaN in every dtype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_copies, "SMALL_NBYTES", SMALL_NBYTES)
        counts = count_copies(patch)
        copies.copy(pieces, target, copies.slot(CPU))
    start = 0
    for number, numel in enumerate(numels):
        values = torch.arange(1, numel + 1).remainder(200).add(number)
        expected = torch.full_like(values, -7) if number in missing else values
        assert torch.equal(target[start : start + numel], expected.to(dtypes[number]).to(dtype))
        start += align(numel)
    assert counts.total() <= len(pieces)
    # What the host folds from the buffer covers the same elements, with the same `adds`.
    found = arrived_pieces(pieces, target)
    assert len(found) <= len(pieces)
    for piece in pieces:
        (run,) = [run for run in found if run.start <= piece.start and piece.end <= run.end]
        part = run.source[piece.start - run.start : piece.end - run.start]
        assert torch.equal(part, piece.of(target))
        assert run.adds == piece.adds
    assert not any(
        run.start < start + align(numel) and start < run.end
        for number, (numel, start) in enumerate(zip(numels, _starts(numels), strict=True))
        if number in missing
        for run in found
    )


def _starts(numels: list[int]) -> list[int]:
    return [sum(map(align, numels[:number])) for number in range(len(numels))]


@pytest.mark.parametrize(
    ("numels", "missing", "expected"),
    [
        ([128] * 4, set(), 1),
        ([128] * 9, set(), 3),  # of four, four and one that fills no slot with others
        ([128, 128, 300, 128, 128], set(), 3),  # the large one is not packed
        ([128] * 4, {1}, 2),
        ([300] * 4, set(), 4),
    ],
)
def test_the_number_of_copies(
    numels: list[int], missing: set[int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_copies, "SMALL_NBYTES", SMALL_NBYTES)
    copies = reserved(SLOT_NBYTES)
    pieces, shard_numel = pieces_of(numels, [torch.float32] * len(numels), missing)
    target = torch.zeros(shard_numel, dtype=torch.float32)
    counts = count_copies(monkeypatch)
    copies.copy(pieces, target, copies.slot(CPU))
    assert counts.total() == expected


def test_another_thread_does_not_overwrite_the_slot_before_it_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces, shard_numel = pieces_of([128, 128], [torch.float32] * 2, set())
    others = [piece._replace(source=-piece.source) for piece in pieces]
    first, second = torch.zeros(2, shard_numel, dtype=torch.float32).unbind()
    copies = reserved(SLOT_NBYTES)
    other = threading.Thread(
        target=lambda: copies.copy(others, second, copies.slot(CPU)), daemon=True
    )
    pack = foreach_copy

    def interrupted(targets: Any, sources: Any) -> None:
        pack(targets, sources)
        if threading.current_thread() is not other:
            other.start()
            other.join(0.2)  # it waits, so this only gives it time to do so

    monkeypatch.setattr(packed_copies, "foreach_copy", interrupted)
    copies.copy(pieces, first, copies.slot(CPU))
    other.join(30.0)
    assert torch.equal(first, torch.cat([piece.source for piece in pieces]))
    assert torch.equal(second, -first)


def make(numels: list[int], dtype: torch.dtype) -> torch.nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.ParameterList(
        torch.nn.Parameter(torch.randn(numel, generator=generator).to(dtype)) for numel in numels
    )


MANY = [64] * 250 + [33] * 250
WAYS: dict[str, dict[str, Any]] = {
    "drop-in": {},
    "drop-in, staging": {"pin": "staging"},
    "drop-in, not pinned": {"pin": "none"},
    "streaming, staging": {"pin": "staging", "streams": True},
    "accumulated": {"accumulate": "host", "streams": True},
    "several backwards": {"streams": True, "num_backwards": 2},
    "several accumulated": {"accumulate": "host", "streams": True, "num_backwards": 2},
    "low precision": {"state_format": "bf16", "accumulate": "host", "streams": True},
}


def train(
    kind: type[OffloadAdam], dtype: torch.dtype, counts: Counter[str], **options: Any
) -> tuple[list[torch.Tensor], list[Counter[str]]]:
    """Take four steps; return weights, moments, and the number of copies of each step."""
    module = make(MANY, dtype)
    streams, num_backwards = options.pop("streams", False), options.pop("num_backwards", 1)
    given = {"module": module if streams else None, "lr": 1e-2, "max_grad_norm": 1.0} | options
    optimizer = kind(module.parameters(), **in_policies(**given))
    counted = []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        counts.clear()
        for number in range(num_backwards):
            # In later steps one parameter has no gradient, and one only in some backwards.
            without = () if step < 2 else (100, 300 + 100 * number)
            used = [p for n, p in enumerate(module) if n not in without]
            terms = [
                (p.float() * torch.randn(p.shape, generator=generator)).sum().view(1) for p in used
            ]
            torch.cat(terms).sum().backward()
        optimizer.step()
        optimizer.synchronize()
        counted.append(Counter(counts))
        optimizer.zero_grad()
    found = [parameter.detach().clone() for parameter in module]
    found += [optimizer.state[p]["exp_avg"].detach().clone() for p in module]
    optimizer.close()
    return found, counted


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_hundred_small_parameters_take_a_few_copies(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = WAYS[name]
    if options.get("state_format") == "bf16" and dtype != torch.bfloat16:
        pytest.skip("vectors of other dtypes are not in low precision")
    counts = count_copies(monkeypatch)
    expected, _ = train(OffloadAdam, dtype, counts, **options)
    found, counted = train(Offloading, dtype, counts, **options)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    for step, of_step in enumerate(counted):
        on_bus = of_step["lane down"] + of_step["lane up"]
        # Two missing gradients leave three runs. Each backward copies its gradients.
        num_runs = 1 if step < 2 else 3
        assert on_bus <= num_runs * (1 + options.get("num_backwards", 1)), of_step


def test_gradients_of_several_dtypes_and_layouts_in_one_bucket() -> None:
    shapes = [(4, 6), (30,), (5, 3), (1,), (2, 2, 3, 3), (17,)]
    results = []
    for kind in (OffloadAdam, Offloading):
        module = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(s)) for s in shapes)
        module[4] = torch.nn.Parameter(torch.ones(2, 2, 3, 3).to(memory_format=torch.channels_last))
        frozen = torch.nn.Parameter(torch.ones(9), requires_grad=False)
        optimizer = kind([*module.parameters(), frozen], lr=0.1, eps=1e-3)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for number, parameter in enumerate(module):
                drawn = torch.randn(parameter.shape, generator=generator)
                if number == 0:
                    drawn = drawn.t().contiguous().t()  # not the strides of its parameter
                parameter.grad = None if number == 3 and step == 1 else drawn
            # A gradient of another dtype makes the bucket go through an fp32 buffer.
            module[1].grad_dtype = None
            module[1].grad = module[1].grad.bfloat16() if step == 2 else module[1].grad
            optimizer.step()
        assert torch.equal(frozen, torch.ones(9))
        results.append([parameter.detach().clone() for parameter in module])
        optimizer.close()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("numels", "expected"),
    [
        ([100, 300_000, 200], (128 + 256) * 4),
        ([100, 300_000], 0),
        ([60_000] * 50, 8 * 2**20),
    ],
    ids=["two small", "one small", "more than the slot"],
)
@pytest.mark.parametrize("options", [{}, {"accumulate": "host"}, {"pin": "staging"}], ids=str)
def test_the_slot_is_as_large_as_planned(
    numels: list[int], expected: int, options: dict[str, Any]
) -> None:
    module = make(numels, torch.float32)
    streams = "accumulate" in options
    optimizer = Offloading(
        module.parameters(), module=module if streams else None, **in_policies(**options)
    )
    slots = [entry for entry in optimizer.memory_ledger() if entry.category == "slots"]
    assert sum(entry.nbytes for entry in slots) == expected
    specs = [
        ParameterSpec(i, p.numel(), p.element_size(), bucket_key_of(p))
        for i, p in enumerate(module)
    ]
    plan = predict(specs, Training(streams=streams, accumulates=streams))
    assert plan.device.get("slots", 0) == expected
    for parameter in module:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [entry for entry in optimizer.memory_ledger() if entry.category == "slots"] == slots
    optimizer.close()
