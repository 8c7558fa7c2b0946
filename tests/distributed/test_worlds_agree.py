"""Invariant 1 over worlds: equal reduced gradients give equal bits, for 1, 2, 3 and 4 ranks."""

from __future__ import annotations

import pytest
import torch

from tests.support.ranks import RankPool
from tests.support.scenario import Scenario, tensors_in, train

pytestmark = pytest.mark.distributed

OVERLAP = (("overlap", True),)

SCENARIOS = {
    "drop_in": Scenario(),
    "by_hand": Scenario("by_hand"),
    "external": Scenario("external", max_grad_norm=0.5),
    "streaming": Scenario("streaming", max_grad_norm=0.5),
    "one_bucket": Scenario("streaming", bucket_nbytes=1 << 30),
    "uneven_presence": Scenario("streaming", uneven_presence=True),
    "drop_in_uneven_presence": Scenario(uneven_presence=True, max_grad_norm=0.5),
    "no_sync": Scenario("no_sync", max_grad_norm=0.5),
    "accumulate_on_host": Scenario("accumulate", max_grad_norm=0.5),
    "reduce_in_fp32": Scenario("streaming", options=(("reduce_dtype", torch.float32),)),
    "nesterov_maximize": Scenario(options=(("nesterov", True), ("maximize", True))),
    "offloaded": Scenario("streaming", max_grad_norm=0.5, offloads=True),
    "offloaded_external": Scenario("external", offloads=True),
    "overlapped": Scenario("streaming", max_grad_norm=0.5, options=OVERLAP),
    "overlapped_one_bucket": Scenario("streaming", bucket_nbytes=1 << 30, options=OVERLAP),
    "overlapped_uneven_presence": Scenario("streaming", uneven_presence=True, options=OVERLAP),
    "overlapped_no_sync": Scenario("no_sync", max_grad_norm=0.5, options=OVERLAP),
    "overlapped_accumulate": Scenario("accumulate", max_grad_norm=0.5, options=OVERLAP),
    "overlapped_offloaded": Scenario("streaming", offloads=True, options=OVERLAP),
    "partly_offloaded": Scenario(
        "streaming", max_grad_norm=0.5, offloads=True, options=(("offload_fraction", 0.6),)
    ),
    "overlapped_partly_offloaded": Scenario(
        "streaming", offloads=True, options=(*OVERLAP, ("offload_fraction", 0.6))
    ),
}

# Every scenario with uneven shards; in the other worlds one of each way of use.
CASES = [
    *((name, 3) for name in SCENARIOS),
    *(
        (name, world_size)
        for name in ("external", "streaming", "drop_in_uneven_presence", "overlapped")
        for world_size in (2, 4)
    ),
]


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_equal_reduced_gradients_give_equal_bits(
    ranks: RankPool, name: str, world_size: int
) -> None:
    scenario = SCENARIOS[name]
    expected_bits, expected_norms, expected_full = train(0, 1, scenario)
    results = ranks.run(train, world_size, scenario)
    for bits, norms, _ in results:
        assert bits == expected_bits
        assert norms == expected_norms
    full = dict(tensors_in(results[0][2]))
    expected = dict(tensors_in(expected_full))
    assert full.keys() == expected.keys()
    for key, tensor in full.items():
        assert torch.equal(tensor, expected[key]), key
    assert all(result[2] == {} for result in results[1:])
