"""A second moment in low precision follows the scale of the gradients, however it changes."""

from __future__ import annotations

import pytest
import torch

from tests.support.tracking import Sample, Store, nearest_store, optimizer_store, track


def last_samples(store: Store, beta2: float, *, coded: bool = False) -> dict[str, Sample]:
    """Return the last sample of each phase, after a check of all of them."""
    last = {}
    # 2,500 steps with a beta2 of 0.999: a tenth of the moment is from before the fall.
    num_steps = int(2.5 / (1 - beta2))
    for sample in track(store, beta2, num_steps=num_steps, every=num_steps // 25, coded=coded):
        # No update is more than 4 times that of an exact second moment.
        assert sample.ratio.min() > 1 / 4, (sample.phase, sample.step)
        last[sample.phase] = sample
    return last


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
@pytest.mark.parametrize("state_format", ["bf16", "int8"])  # "mixed" has the codes of "int8"
def test_the_mean_is_within_one_percent(state_format: str, beta2: float) -> None:
    store, coded = optimizer_store(beta2, state_format=state_format), state_format != "bf16"
    for phase, sample in last_samples(store, beta2, coded=coded).items():
        assert float(sample.ratio.mean()) == pytest.approx(1.0, abs=0.01), phase
        # The root halves the relative error, whose mean is at most its standard deviation.
        spread = float((sample.ratio - 1).abs().mean())
        assert spread < float((sample.deviation / sample.exact).mean()) / 2, phase


def test_rounding_to_nearest_never_follows_a_fall() -> None:
    sample = last_samples(nearest_store(0.999), 0.999)["after a tenfold fall"]
    assert sample.ratio.mean() > 3.0


def test_fp32_is_the_reference() -> None:
    samples = last_samples(optimizer_store(0.99), 0.99)
    for sample in samples.values():
        torch.testing.assert_close(sample.stored, sample.exact, rtol=1e-5, atol=0)
