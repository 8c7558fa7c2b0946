"""Adapters of peft: only they have state, and they are trained as by torch's AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from offload_adam import OffloadAdamW, OffloadPolicy, load_checkpoint, save_checkpoint
from tests.integrations.language_model import EPS, LR, Texts, make_model
from tests.support.ranks import RankPool

NUM_STEPS = 4
# fp32 roundings of the update and of the averaged gradients.
TOLERANCE = 2e-6
SECOND = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)


def make_adapted(
    dtype: torch.dtype = torch.float32, recompute: bool | None = None, **config: Any
) -> PeftModel:
    """Return a model with LoRA adapters.

    Args:
        dtype: of the frozen weights; peft makes adapters in fp32.
        recompute: gradient checkpointing: None for none, else whether it is reentrant.
        config: of LoRA.
    """
    model = make_model(dtype)
    if recompute is not None:
        model.gradient_checkpointing_enable({"use_reentrant": recompute})
        model.enable_input_require_grads()
    torch.manual_seed(1)
    # init_lora_weights=False: random values in both matrices, so that both have gradients.
    lora = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, **config}
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **lora))


def make_optimizer(kind: str, model: PeftModel) -> torch.optim.Optimizer:
    """Return torch's AdamW, or ours without or with streaming."""
    if kind == "torch":
        return torch.optim.AdamW(model.named_parameters(), lr=LR, eps=EPS)
    streamed = model if kind == "streaming" else None
    return OffloadAdamW(
        model.named_parameters(),
        lr=LR,
        eps=EPS,
        module=streamed,
        gradient_reduction="optimizer",
        offload=OffloadPolicy(bucket_nbytes=512),
        num_threads=1,
    )


def train(model: Any, optimizer: Any, steps: range = range(NUM_STEPS)) -> list[float]:
    """Train on this rank's rows of each step's batch; return the losses over all ranks."""
    texts = Texts()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = []
    for step in steps:
        rows = [texts[4 * step + number]["input_ids"] for number in range(4)]
        batch = torch.stack(rows).chunk(world_size)[rank]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return losses


def weights_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = TOLERANCE
) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        if "lora" in name:
            assert torch.allclose(found[name], weight, rtol=0.0, atol=atol), name
        else:  # frozen
            assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["drop-in", "streaming"])
def test_training_adapters_equals_adamw(
    kind: str, dtype: torch.dtype, recompute: bool | None
) -> None:
    reference = make_adapted(dtype, recompute)
    expected = train(reference, make_optimizer("torch", reference))
    model = make_adapted(dtype, recompute)
    losses = train(model, make_optimizer(kind, model))
    # Rounding to bf16 in the forward turns differences of 1e-8 into some of 1e-3, which
    # depends on the CPU.
    tolerance = TOLERANCE if dtype is torch.float32 else 1e-3
    assert losses == pytest.approx(expected, abs=max(tolerance, 1e-5))
    assert_close(weights_of(model), weights_of(reference), tolerance)


@pytest.mark.parametrize("kind", ["drop-in", "streaming"])
def test_only_adapters_have_state(kind: str) -> None:
    model = make_adapted(torch.bfloat16, r=64)
    optimizer = make_optimizer(kind, model)
    assert isinstance(optimizer, OffloadAdamW)
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 4
    assert {id(p) for p in optimizer.state} == {id(model.get_parameter(n)) for n in adapters}
    num_trained = sum(model.get_parameter(name).numel() for name in adapters)
    # exp_avg and exp_avg_sq in fp32, without padding; fp32 adapters are their own master weights.
    assert optimizer.host_nbytes["state"] == 8 * num_trained


@pytest.mark.parametrize("kind", ["drop-in", "streaming"])
def test_a_trained_adapter_is_saved_loaded_and_merged(kind: str, tmp_path: Path) -> None:
    model = make_adapted()
    optimizer = make_optimizer(kind, model)
    assert isinstance(optimizer, OffloadAdamW)
    train(model, optimizer)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    batch = torch.stack([Texts()[number]["input_ids"] for number in range(3)])
    with torch.no_grad():
        expected = model(input_ids=batch).logits
    optimizer.close()
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=batch).logits, expected, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("kind", ["drop-in", "streaming"])
def test_merging_during_training_changes_no_update(kind: str) -> None:
    """As an evaluation with merged weights does."""
    reference, model = make_adapted(), make_adapted()
    for adapted, optimizer in [
        (reference, make_optimizer("torch", reference)),
        (model, make_optimizer(kind, model)),
    ]:
        train(adapted, optimizer, range(2))
        adapted.merge_adapter()
        adapted.unmerge_adapter()
        train(adapted, optimizer, range(2, 4))
    assert_close_with_roundings(weights_of(model), weights_of(reference))


def assert_close_with_roundings(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=0.0, atol=1e-5), name


@pytest.mark.parametrize("kind", ["drop-in", "streaming"])
def test_an_adapter_that_is_added_later_is_trained_after_add_param_group(kind: str) -> None:
    reference, model = make_adapted(), make_adapted()
    for adapted, optimizer in [
        (reference, make_optimizer("torch", reference)),
        (model, make_optimizer(kind, model)),
    ]:
        train(adapted, optimizer, range(2))
        torch.manual_seed(2)
        adapted.add_adapter("second", SECOND)
        train(adapted, optimizer, range(2, 3))  # of the first adapter, which is still active
        adapted.set_adapter("second")
        named = [(n, p) for n, p in adapted.named_parameters() if "second" in n]
        optimizer.add_param_group({"params": named})
        train(adapted, optimizer, range(3, 5))
        adapted.set_adapter("default")
        train(adapted, optimizer, range(5, 6))
        adapted.delete_adapter("second")
        train(adapted, optimizer, range(6, 7))
    assert_close(weights_of(model), weights_of(reference))


@pytest.mark.parametrize("kind", ["drop-in", "streaming"])
def test_an_adapter_that_no_group_has_is_reported_and_not_trained(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_adapted()
    optimizer = make_optimizer(kind, model)
    model.add_adapter("second", SECOND)
    model.set_adapter("second")
    before = weights_of(model)
    train(model, optimizer, range(2))
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())
    assert caplog.text.count("step() found no gradient on any parameter") == 1


# --- on ranks ---


def train_adapters(rank: int, world_size: int, kind: str, folder: str, steps: range) -> Any:
    """Train; start from the checkpoint in the folder if the steps do not start at 0."""
    model = make_adapted(torch.bfloat16, r=64)
    optimizer = make_optimizer(kind, model)
    assert isinstance(optimizer, OffloadAdamW)
    if steps.start:
        load_checkpoint(folder, model=model, optimizer=optimizer)
    losses = train(model, optimizer, steps)
    if not steps.start:
        save_checkpoint(folder, model=model, optimizer=optimizer)
    found = weights_of(model), losses, optimizer.host_nbytes["state"]
    optimizer.close()
    return found


@pytest.mark.parametrize("kind", ["drop-in", "streaming"])
def test_adapters_on_ranks_equal_adamw_and_resume_in_another_world(
    ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    reference = make_adapted(torch.bfloat16, r=64)
    expected = train(reference, make_optimizer("torch", reference))
    folder = str(tmp_path / "checkpoint")
    # The first call imports transformers and peft in each process.
    first, _ = ranks.run(train_adapters, 2, kind, folder, range(2), timeout=110.0)
    for world_size in (1, 2):
        rest = range(2, NUM_STEPS)
        results = ranks.run(train_adapters, world_size, kind, folder, rest, timeout=110.0)
        for weights, losses, nbytes in results:
            # The loss is computed in bf16, from half of the rows on two ranks.
            assert first[1] + losses == pytest.approx(expected, abs=3e-2)
            assert_close_with_roundings(weights, weights_of(reference))
            # Four adapters of 8192 elements; several ranks also keep their averaged gradients.
            assert nbytes == (8 if world_size == 1 else 12) * 8192 / world_size
