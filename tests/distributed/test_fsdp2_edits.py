"""Edits of sharded parameters, models that are rejected, and the lives of optimizers over them."""

from __future__ import annotations

import gc
import re
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.utils import _pytree as pytree

from offload_adam import Adam, OffloadAdamW
from offload_adam.fsdp_private import local_of
from tests.support.fsdp2 import (
    EPS,
    LR,
    MAX_NORM,
    Model,
    Run,
    batch_of,
    delayed_updates,
    largest_difference,
    loss_of,
    make_model,
    shard,
    train_plain,
    whole,
)
from tests.support.ranks import RankPool

BF16 = torch.bfloat16
OFFLOADED = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}


def make_optimizer(model: nn.Module, params: Any = None, **options: Any) -> OffloadAdamW:
    options = {"module": model, "overlap": True, "lr": LR, "num_threads": 1, **options}
    return OffloadAdamW(model.named_parameters() if params is None else params, eps=EPS, **options)


def take_step(model: nn.Module, *optimizers: torch.optim.Optimizer, number: int) -> None:
    loss_of(model, batch_of(number, dist.get_rank())).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def locals_of(model: nn.Module) -> list[torch.Tensor]:
    return [local_of(parameter) for parameter in model.parameters()]


def copies_of(model: nn.Module) -> list[torch.Tensor]:
    return [local.detach().clone() for local in locals_of(model)]


def of_dtensors(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def of_local_tensors(model: Any) -> None:
    for local in locals_of(model):
        local.add_(0.25)


def of_views(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().add_(0.25)


def by_load_state_dict(model: Any) -> None:
    model.load_state_dict({key: 0.5 * value + 0.1 for key, value in model.state_dict().items()})


def by_set_model_state_dict(model: Any) -> None:
    values: Any = {key: torch.full(value.shape, 0.37) for key, value in model.state_dict().items()}
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True))


def through_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def through_data_of_local_tensors(model: Any) -> None:
    for local in locals_of(model):
        local.data.mul_(1.5)


def through_data_on_one_rank(model: Any) -> None:
    if dist.get_rank() == 1:
        local_of(model.head.weight).data.mul_(1.5)


def through_numpy(model: Any) -> None:
    for local in locals_of(model):
        array = local.detach().view(torch.int16 if local.dtype is BF16 else torch.int32).numpy()
        array[...] = np.flip(array).copy()


EDITS: Sequence[Callable[[Any], None]] = (
    of_dtensors,
    of_local_tensors,
    of_views,
    by_load_state_dict,
    by_set_model_state_dict,
    through_data,
    through_data_of_local_tensors,
    through_data_on_one_rank,
    through_numpy,
)


def edit(rank: int, world_size: int) -> list[tuple[str, bool, bool]]:
    """Edit a model between two steps, of which the second one has a learning rate of 0."""
    found = []
    rows: list[tuple[torch.dtype, bool, Sequence[Callable[[Any], None]]]] = [
        (BF16, True, EDITS),
        (BF16, False, (of_local_tensors, through_numpy)),
        (torch.float32, True, (of_dtensors, of_views)),
    ]
    for dtype, overlap, edits in rows:
        for make_edit in edits:
            model = shard(make_model(dtype))
            optimizer = make_optimizer(model, overlap=overlap)
            take_step(model, optimizer, number=0)
            optimizer.synchronize()
            make_edit(model)
            wanted = copies_of(model)
            optimizer.param_groups[0]["lr"] = 0.0
            take_step(model, optimizer, number=2)
            optimizer.synchronize()
            kept = all(map(torch.equal, wanted, copies_of(model)))
            optimizer.param_groups[0]["lr"] = LR
            take_step(model, optimizer, number=3)
            optimizer.synchronize()
            moved = not torch.equal(wanted[0], copies_of(model)[0])
            found.append((f"{make_edit.__name__}, {dtype}, {overlap=}", kept, moved))
            optimizer.close()
    return found


def test_an_edit_survives_the_next_step(ranks: RankPool) -> None:
    for found in ranks.run(edit, 2, timeout=100.0):
        for name, kept, moved in found:
            assert kept, name
            assert moved, name


def count_versions(rank: int, world_size: int) -> list[tuple[bool, str, str]]:
    """Save values of a parameter and of its local tensor for a backward, and take a step."""
    found = []
    for overlap in (True, False):
        model = shard(make_model())
        optimizer = make_optimizer(model, overlap=overlap)
        take_step(model, optimizer, number=0)
        optimizer.synchronize()
        parameter: Any = model.head.weight
        local = local_of(parameter)
        before = parameter._version, local._version
        of_dtensor = (parameter * parameter).full_tensor().sum()
        of_local = (local.requires_grad_() ** 2).sum()
        local.requires_grad_(False)
        take_step(model, optimizer, number=1)
        optimizer.synchronize()
        both = parameter._version > before[0] and local._version > before[1]
        found.append((both, error_of(of_dtensor.backward), error_of(of_local.backward)))
        optimizer.close()
    return found


def error_of(call: Callable[[], Any]) -> str:
    """Return the type and message of the error that a call raises, "none" if it raises none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_a_step_moves_both_version_counters(ranks: RankPool) -> None:
    for found in ranks.run(count_versions, 2):
        for both, of_dtensor, of_local in found:
            assert both
            assert "modified by an inplace operation" in of_dtensor
            assert "modified by an inplace operation" in of_local


def write_during_update(rank: int, world_size: int) -> list[str]:
    found = []
    for write in (of_dtensors, of_local_tensors):
        model = shard(make_model())
        optimizer = make_optimizer(model)
        with delayed_updates(0.05):
            take_step(model, optimizer, number=0)
            write(model)
            found.append(error_of(optimizer.synchronize))
            error_of(optimizer.close)
    return found


def test_a_write_during_the_update_is_rejected(ranks: RankPool) -> None:
    for found in ranks.run(write_during_update, 2):
        for error in found:
            assert re.match("UnreadyParameterError: Parameter '.*' was modified while", error)


def replace_local(model: Any) -> None:
    model.head.weight._local_tensor = local_of(model.head.weight).clone()


def replace_data(model: Any) -> None:
    local_of(model.head.weight).data = local_of(model.head.weight).clone()


def cast(model: Any) -> None:
    model.to(BF16)


def assign(model: Any) -> None:
    values = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)


REPLACEMENTS: Sequence[tuple[Callable[[Any], None], str]] = (
    (replace_local, "'head.weight' .* its local tensor was replaced"),
    (replace_data, "'head.weight' .* its local tensor was replaced"),
    (cast, "'embedding.weight' .* its data are torch.bfloat16"),
    (assign, "'embedding.weight' .* FSDP2 has another parameter in its place"),
)


def replace_parameters(rank: int, world_size: int) -> list[tuple[str, str]]:
    found = []
    for replace, pattern in REPLACEMENTS:
        model = shard(make_model())
        optimizer = make_optimizer(model)
        take_step(model, optimizer, number=0)
        loss_of(model, batch_of(1, rank)).backward()
        optimizer.synchronize()
        replace(model)
        error = error_of(optimizer.step)
        found.append((f"ParameterReplacedError: Parameter {pattern}", error))
        optimizer.close()
    return found


def test_replaced_parameters_are_rejected(ranks: RankPool) -> None:
    for found in ranks.run(replace_parameters, 2):
        for pattern, error in found:
            assert re.match(pattern, error), error


class Extension(torch.Tensor):
    """A tensor of which FSDP2 gathers another form, as torchao's fp8 weights."""

    _inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Extension:
        made: Extension = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype
        )
        made._inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = pytree.tree_map_only(cls, lambda one: one._inner, (args, kwargs or {}))
        return pytree.tree_map_only(torch.Tensor, cls, func(*args, **kwargs))

    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        return (self._inner,), None

    def fsdp_post_all_gather(self, inputs: Any, *_: Any, out: Any = None) -> Any:
        return inputs[0], inputs


def evaluated(**options: Any) -> Model:
    """Return a model whose root is gathered."""
    model = shard(make_model(), **options)
    with torch.no_grad():
        loss_of(model, batch_of(0, 0))
    return model


def with_extension() -> Model:
    model: Any = make_model()
    layer = model.blocks[0].first
    layer.weight = nn.Parameter(Extension(layer.weight.detach()))
    return shard(model)


def replicated() -> Any:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(make_model())


def stepped() -> tuple[Model, OffloadAdamW]:
    model = shard(make_model())
    optimizer = make_optimizer(model)
    take_step(model, optimizer, number=0)
    return model, optimizer


def in_small_group() -> object:
    group = dist.new_group([0], group_desc="one rank")
    model = shard(make_model())
    return None if dist.get_rank() else make_optimizer(model, process_group=group)


REJECTED: dict[str, tuple[Callable[[], Any], str]] = {
    "gathered": (lambda: make_optimizer(evaluated()), r"ValueError: .*model\.reshard\(\)"),
    "gathered, no module": (
        lambda: OffloadAdamW(evaluated(reshard_after_forward=False).parameters()),
        r"ValueError: .*model\.reshard\(\)",
    ),
    "gradient_reduction": (
        lambda: make_optimizer(shard(make_model()), gradient_reduction="optimizer"),
        "ValueError: gradient_reduction='optimizer' .*Leave gradient_reduction out",
    ),
    "reduce_dtype": (
        lambda: make_optimizer(shard(make_model(BF16)), reduce_dtype=torch.float32),
        r"ValueError: reduce_dtype .*MixedPrecisionPolicy\(reduce_dtype=",
    ),
    "replicate": (
        lambda: make_optimizer(replicated()),
        r"ValueError: .*replicate\(\).*DistributedDataParallel",
    ),
    "mindspore": (
        lambda: Adam(shard(make_model()).parameters()),
        "ValueError: Sharded parameters .*use_offload=True",
    ),
    "overlap": (
        lambda: OffloadAdamW(shard(make_model()).parameters(), overlap=True),
        "ValueError: overlap=True needs module=",
    ),
    "replicas": (
        lambda: OffloadAdamW(
            [{"params": list(shard(make_model()).named_parameters()), "replicas": "none"}]
        ),
        "ValueError: replicas of the group of parameter 'embedding.weight' must be",
    ),
    "extension": (
        lambda: make_optimizer(with_extension()),
        "TypeError: Parameter 'blocks.0.first.weight' is a Extension.*as fp32 or bf16",
    ),
}


def reject(rank: int, world_size: int) -> list[tuple[str, str]]:
    return [(pattern, error_of(call)) for call, pattern in REJECTED.values()]


def reject_on_meshes(rank: int, world_size: int) -> tuple[str, str, str]:
    by_number = error_of(lambda: make_optimizer(shard(make_model(), reshard_after_forward=2)))
    as_true = error_of(lambda: make_optimizer(shard(make_model(), reshard_after_forward=4)).close())
    return by_number, as_true, error_of(in_small_group)


def test_what_cannot_be_right_is_rejected(ranks: RankPool) -> None:
    for found in ranks.run(reject, 2):
        for pattern, error in found:
            assert re.match(pattern, error), error


def test_meshes_that_do_not_fit_are_rejected(ranks: RankPool) -> None:
    for rank, (by_number, as_true, small) in enumerate(ranks.run(reject_on_meshes, 4)):
        assert "reshard_after_forward=<number>" in by_number
        assert as_true == "none"
        if rank == 0:
            assert re.search("'embedding.weight' is sharded .*process_group lacks", small)


class Trap(NamedTuple):
    """A way to train, and how many backwards of a plain run one of its steps stands for.

    of_backward: called before each backward with model, optimizer, step and turn.
    of_step: called before each step.
    """

    num_backwards: int = 1
    of_backward: Callable[[Any, OffloadAdamW, int, int], None] = lambda *_: None
    of_step: Callable[[Any, OffloadAdamW], None] = lambda *_: None
    zeroes: bool = True
    scale: float = 1.0


def sync_last(model: Any, optimizer: OffloadAdamW, step: int, turn: int) -> None:
    model.set_requires_gradient_sync(turn == 1)


def keep_gathered(model: Any, optimizer: OffloadAdamW, step: int, turn: int) -> None:
    model.set_reshard_after_backward(False)


held: list[torch.Tensor | None] = []


def hold_gradients(model: Any, optimizer: OffloadAdamW, step: int, turn: int) -> None:
    held.extend(parameter.grad for parameter in model.parameters())


def set_scale(model: Any, optimizer: OffloadAdamW) -> None:
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(256.0), torch.tensor(0.0)


TRAPS: dict[str, Trap] = {
    "kept gradients": Trap(2, hold_gradients),
    "no zero_grad": Trap(zeroes=False),
    "gradient sync": Trap(2, sync_last),
    "no reshard": Trap(of_backward=keep_gathered),
    "no_sync": Trap(2),
    "scale": Trap(of_step=set_scale, scale=256.0),
}


def spring(rank: int, world_size: int) -> list[tuple[str, float]]:
    """Train through each trap, with and without streaming, and compare with float64."""
    exact = {
        backwards: train_plain(
            make_model(), world_size, num_steps=3, num_backwards=backwards, rank=rank
        )
        for backwards in (1, 2)
    }
    found = []
    for name, trap in TRAPS.items():
        for options in ({}, OFFLOADED):
            # Without streaming, gradients accumulate in `.grad` if it is not emptied, as in torch.
            for streams in (True, False) if trap.zeroes and not options else (True,):
                model = shard(make_model(), **options)
                given = {} if streams else {"module": None, "overlap": None}
                optimizer = make_optimizer(model, max_grad_norm=MAX_NORM, **given)
                run = train_through(trap, model, optimizer, waits=name == "no_sync")
                different = largest_difference(run, exact[trap.num_backwards])
                found.append((f"{name}, {options}, {streams=}", different))
    return found


def train_through(trap: Trap, model: Model, optimizer: OffloadAdamW, *, waits: bool) -> Run:
    values = []
    for step in range(3):
        for turn in range(trap.num_backwards):
            trap.of_backward(model, optimizer, step, turn)
            loss = loss_of(model, batch_of(step * trap.num_backwards + turn, dist.get_rank()))
            if waits and turn == 0:
                with optimizer.no_sync():
                    loss.backward()
            else:
                (loss * trap.scale).backward()
            values.append(loss.item())
        trap.of_step(model, optimizer)
        optimizer.step()
        assert optimizer.last_step is not None
        values.append(optimizer.last_step.total_norm)
        if trap.zeroes:
            optimizer.zero_grad()
    held.clear()
    run = Run(values, whole(model))
    optimizer.close()
    return run


def test_no_trap_changes_the_training(ranks: RankPool) -> None:
    for found in ranks.run(spring, 2, timeout=100.0):
        for name, difference in found:
            assert difference < 2e-6, name


LATE = ("blocks.1", "head")


def split(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Return the named parameters that train from the start, and those that come late."""
    pairs = list(model.named_parameters())
    late = [pair for pair in pairs if pair[0].startswith(LATE)]
    return [pair for pair in pairs if not pair[0].startswith(LATE)], late


class Lives:
    """A sharded model with our optimizers beside the whole one in float64 with torch's AdamW."""

    def __init__(self, *, streams: bool, freezes: bool = False, **options: Any) -> None:
        self.model, self.exact = make_model(), make_model().double()
        self.given: dict[str, Any] = {} if streams else {"module": None, "overlap": None}
        if freezes:
            self.set_late_trains(False)
        shard(self.model, **options)

    def set_late_trains(self, trains: bool) -> None:
        for model in (self.model, self.exact):
            for _, parameter in split(model)[1]:
                parameter.requires_grad_(trains)

    def construct(self, which: Sequence[int] = (0, 1)) -> tuple[OffloadAdamW, torch.optim.AdamW]:
        """Construct both optimizers, of the early parameters, the late ones or both."""
        own, exact = (
            [pair for part in which for pair in split(model)[part]]
            for model in (self.model, self.exact)
        )
        return (
            make_optimizer(self.model, own, **self.given),
            torch.optim.AdamW(exact, lr=LR, eps=EPS, foreach=False),
        )

    def step(self, number: int, *optimizers: tuple[OffloadAdamW, torch.optim.AdamW]) -> None:
        take_step(self.model, *(own for own, _ in optimizers), number=number)
        losses = []
        for rank in range(dist.get_world_size()):
            tokens = batch_of(number, rank)
            losses.append(nn.functional.cross_entropy(self.exact(tokens), tokens.flatten()))
        (sum(losses, torch.zeros(())) / len(losses)).backward()
        for _, optimizer in optimizers:
            optimizer.step()
        for model in (self.model, self.exact):
            for parameter in model.parameters():
                parameter.grad = None

    def difference(self, *optimizers: tuple[OffloadAdamW, torch.optim.AdamW]) -> float:
        for own, _ in optimizers:
            own.synchronize()
        run = Run([], whole(self.model))
        for own, _ in optimizers:
            own.close()
        pairs = zip(run.parameters, self.exact.state_dict().values(), strict=True)
        return max(float((one.double() - same).abs().max()) for one, same in pairs)


def add_late_group(lives: Lives) -> float:
    own, exact = lives.construct([0])
    for number in range(4):
        if number == 2:
            own.add_param_group({"params": split(lives.model)[1], "lr": 2 * LR})
            exact.add_param_group({"params": split(lives.exact)[1], "lr": 2 * LR})
        lives.step(number, (own, exact))
    return lives.difference((own, exact))


def unfreeze(lives: Lives) -> float:
    lives.set_late_trains(False)
    both = lives.construct()
    for number in range(4):
        if number == 2:
            lives.set_late_trains(True)
        lives.step(number, both)
    return lives.difference(both)


def use_two(lives: Lives) -> float:
    first, second = lives.construct([0]), lives.construct([1])
    with delayed_updates(0.002):
        for number in range(3):
            lives.step(number, first, second)
        return lives.difference(first, second)


def close_and_construct(lives: Lives) -> float:
    both = lives.construct()
    for number in range(3):
        if number == 2:
            both[0].close()
            both = lives.construct()
        lives.step(number, both)
    return lives.difference(both)


def take_over(lives: Lives) -> float:
    both = lives.construct()
    for number in range(3):
        if number == 2:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the new one closes the old one
                both = lives.construct()
        lives.step(number, both)
    return lives.difference(both)


LIVES: Sequence[Callable[[Lives], float]] = (
    add_late_group,
    unfreeze,
    use_two,
    close_and_construct,
    take_over,
)


def live(rank: int, world_size: int) -> list[tuple[str, float]]:
    found = []
    for run in LIVES:
        for options in ({}, OFFLOADED):
            for streams in (True, False) if not options else (True,):
                lives = Lives(streams=streams, freezes=run is unfreeze, **options)
                found.append((f"{run.__name__}, {options}, {streams=}", run(lives)))
    return found


def test_optimizers_may_come_and_go(ranks: RankPool) -> None:
    for found in ranks.run(live, 2, timeout=100.0):
        for name, difference in found:
            assert difference < 2e-6, name


def drop(rank: int, world_size: int) -> list[tuple[str, bool]]:
    """Drop optimizers and models, and look what is still alive."""
    found = []
    for streams in (True, False):
        model: Any = shard(make_model())
        given = {} if streams else {"module": None, "overlap": None}
        optimizer: Any = make_optimizer(model, **given)
        for number in range(2):
            take_step(model, optimizer, number=number)
        of_optimizer, of_model = weakref.ref(optimizer), weakref.ref(model)
        del optimizer
        gc.collect()
        found.append((f"optimizer, {streams=}", of_optimizer() is None))
        loss_of(model, batch_of(2, rank)).backward()
        del model
        gc.collect()
        found.append((f"model, {streams=}", of_model() is None))
    model = fully_shard(make_model())
    first = make_optimizer(model, split(model)[0])
    second = make_optimizer(model, split(model)[1])
    executors = [weakref.ref(one._alive().executor) for one in (first, second)]
    # The second one's wait is on the same group of FSDP2, and was put there after the first one's.
    first.close()
    gc.collect()
    found.append(("closed optimizer", executors[0]() is None))
    take_step(model, second, number=0)
    second.close()
    del model, first, second
    gc.collect()
    found.append(("both", executors[1]() is None))
    return found


def test_nothing_outlives_its_optimizer_and_model(ranks: RankPool) -> None:
    for found in ranks.run(drop, 2):
        for name, is_gone in found:
            assert is_gone, name
