"""Norms and skipped steps of sharded models, by every way to clip, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from offload_adam import OffloadAdamW, OffloadPolicy, StepReport
from offload_adam.fsdp_private import local_of
from tests.support.fsdp2 import (
    EPS,
    LR,
    MAX_NORM,
    NUM_TOKENS,
    Block,
    batch_of,
    make_model,
    shard,
    whole,
)
from tests.support.ranks import RankError, RankPool

NUM_STEPS = 3


class Parallel(nn.Module):
    """A model for tensor parallelism: its sizes divide by 4, but not those of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, 16)
        self.blocks = nn.ModuleList(Block(width=32) for _ in range(2))
        self.head = nn.Linear(16, NUM_TOKENS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        result: torch.Tensor = self.head(hidden)
        return result.flatten(0, 1)


class Experts(nn.Module):
    """A model that uses the expert that `choose` names, or none if it is None."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.dense = make_model()
        self.experts = nn.ModuleList(nn.Linear(NUM_TOKENS, NUM_TOKENS) for _ in range(num_experts))
        self.choose: int | None = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.dense(tokens)
        return result if self.choose is None else self.experts[self.choose](result)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return make()


def parallelize(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard the sequence between the layers, so that gradients of the norms are partial sums."""
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "blocks.*.norm": SequenceParallel(),
        "blocks.*.first": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.second": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    return model


def parallelize_layers(model: nn.Module, mesh: Any) -> nn.Module:
    """Leave the norms and the embedding plain parameters, which every rank has whole."""
    plan = {"blocks.*.first": ColwiseParallel(), "blocks.*.second": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    return model


def grid(*names: str) -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def make_fsdp() -> nn.Module:
    return shard(make_model())


def make_hybrid() -> nn.Module:
    return shard(make_model(), mesh=grid("replicate", "shard"))


def make_tp() -> nn.Module:
    return parallelize(seeded(Parallel), init_device_mesh("cpu", (4,)))


def make_tp_of_layers() -> nn.Module:
    return parallelize_layers(seeded(Parallel), init_device_mesh("cpu", (4,)))


def make_tp_with_fsdp() -> nn.Module:
    mesh = grid("dp", "tp")
    model: Any = parallelize(seeded(Parallel), mesh["tp"])
    return shard(model, mesh=mesh["dp"])


def make_experts() -> Any:
    """Build a model with one expert on ranks 0 and 1, and another one on ranks 2 and 3."""
    model: Any = seeded(lambda: Experts(2))
    model.experts = model.experts[dist.get_rank() // 2 :][:1]
    fully_shard(model.experts[0], mesh=grid("other", "dp")["dp"])
    shard(model.dense)
    return model


def make_copies() -> Any:
    """Build a model whose last layer is sharded over ranks 0 and 1, and over 2 and 3 again."""
    model: Any = seeded(lambda: Experts(1))
    fully_shard(model.experts[0], mesh=grid("other", "dp")["dp"])
    shard(model.dense)
    return model


def make_module_of_two_meshes() -> Any:
    """Build a model as `make_copies`, but with one call of `fully_shard`."""
    model: Any = seeded(lambda: Experts(1))
    dense, experts = (
        _fsdp_common.FSDPMeshInfo(mesh=mesh, shard_mesh_dim=0)
        for mesh in (init_device_mesh("cpu", (4,)), grid("other", "dp")["dp"])
    )
    own = list(model.experts.parameters())

    def place(parameter: nn.Parameter) -> Any:
        mesh_info = experts if any(parameter is one for one in own) else dense
        return _fsdp_common.ShardPlacementResult(placement=Shard(0), mesh_info=mesh_info)

    return fully_shard(model, mesh=dense.mesh, shard_placement_fn=place)


class Case(NamedTuple):
    """A sharded model, and what it is compared with.

    data_of: which batch a rank has.
    exact: the same model whole, with all experts.
    replicas: the option of the parameters of `experts`.
    is_torch_right: torch's function finds the norm of gradients in `.grad`. If not, the model is
        trained with streaming only.
    idles: the second half of the ranks uses no expert in the second step.
    """

    make: Callable[[], nn.Module]
    data_of: Callable[[int], int]
    exact: Callable[[], nn.Module]
    replicas: str | None = None
    is_torch_right: bool = True
    idles: bool = False

    def expert_of(self, rank: int, world_size: int, step: int, num_experts: int) -> int | None:
        idles = self.idles and step == 1 and rank >= world_size // 2
        return None if idles else rank * num_experts // world_size


CASES: dict[str, Case] = {
    "fsdp": Case(make_fsdp, lambda rank: rank, make_model),
    "hsdp": Case(make_hybrid, lambda rank: rank, make_model),
    # Before torch 2.12, its function takes a part of a sum for the whole gradient.
    "tp": Case(make_tp, lambda rank: 0, Parallel, is_torch_right=torch.__version__ >= "2.12"),
    "tp of layers": Case(make_tp_of_layers, lambda rank: 0, Parallel, is_torch_right=False),
    "tp and fsdp": Case(make_tp_with_fsdp, lambda rank: rank // 2, Parallel),
    "experts": Case(
        make_experts, lambda rank: rank, lambda: Experts(2), "distinct", is_torch_right=False
    ),
    "idle expert": Case(
        make_experts,
        lambda rank: rank,
        lambda: Experts(2),
        "distinct",
        is_torch_right=False,
        idles=True,
    ),
    "copies": Case(
        make_copies, lambda rank: rank % 2, lambda: Experts(1), "copies", is_torch_right=False
    ),
}
if hasattr(_fsdp_common, "ShardPlacementResult"):  # since torch 2.12
    CASES["module of two meshes"] = CASES["copies"]._replace(make=make_module_of_two_meshes)


def tokens_of(step: int, data: int) -> torch.Tensor:
    return batch_of(step, data)[:, :4].contiguous()


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens), tokens.flatten())


def groups_of(model: nn.Module, replicas: str | None) -> list[dict[str, Any]]:
    """Put the parameters of the experts into a group of their own."""
    own = [(name, p) for name, p in model.named_parameters() if "experts" in name]
    rest = [(name, p) for name, p in model.named_parameters() if "experts" not in name]
    groups: list[dict[str, Any]] = [{"params": rest}]
    if own:
        groups.append({"params": own, **({"replicas": replicas} if replicas else {})})
    return groups


def train_exactly(case: Case, world_size: int, rank: int) -> tuple[list[float], list[torch.Tensor]]:
    """Train the whole model in float64; return the norms, and the parameters of this rank."""
    model: Any = seeded(case.exact).double()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, eps=EPS, foreach=False)
    num_experts = len(model.experts) if case.replicas else 1
    norms = []
    for step in range(NUM_STEPS):
        losses = []
        for other in range(world_size):
            model.choose = case.expert_of(other, world_size, step, num_experts)
            losses.append(loss_of(model, tokens_of(step, case.data_of(other))))
        (sum(losses, torch.zeros(())) / world_size).backward()
        for parameter in model.experts.parameters() if case.replicas else ():
            if parameter.grad is not None:
                # FSDP2 averages over the ranks of the expert alone.
                parameter.grad *= num_experts
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    if case.replicas:
        own = rank * num_experts // world_size
        model.experts = model.experts[own : own + 1]
    return norms, list(model.state_dict().values())


def train_clipped(case: Case, *, streams: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Train the sharded model, clipping in another way in each step."""
    rank = dist.get_rank()
    model: Any = case.make()
    optimizer = OffloadAdamW(
        groups_of(model, case.replicas),
        lr=LR,
        eps=EPS,
        module=model if streams else None,
        overlap=True if streams else None,
        num_threads=1,
    )
    norms = []
    for step in range(NUM_STEPS):
        model.choose = case.expert_of(rank, dist.get_world_size(), step, 1)
        loss_of(model, tokens_of(step, case.data_of(rank))).backward()
        norm: Any = None
        if step == 0:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        elif step == 1:
            norm = optimizer.clip_grad_norm_(MAX_NORM)
        else:
            optimizer.max_grad_norm = MAX_NORM
        optimizer.step()
        optimizer.max_grad_norm = None
        assert optimizer.last_step is not None
        norms.append(optimizer.last_step.total_norm if norm is None else float(norm))
        optimizer.zero_grad()
    parameters = whole(model)
    optimizer.close()
    return norms, parameters


def compare(rank: int, world_size: int) -> list[tuple[str, float, float]]:
    found = []
    for name, case in CASES.items():
        exact_norms, exact_parameters = train_exactly(case, world_size, rank)
        for streams in (True, False) if case.is_torch_right else (True,):
            norms, parameters = train_clipped(case, streams=streams)
            pairs = zip(norms, exact_norms, strict=True)
            relative = max(abs(norm / exact - 1.0) for norm, exact in pairs)
            tensors = zip(parameters, exact_parameters, strict=True)
            difference = max(float((one.double() - other).abs().max()) for one, other in tensors)
            found.append((f"{name}, {streams=}", relative, difference))
    return found


def test_every_norm_is_that_of_one_process(ranks: RankPool) -> None:
    for found in ranks.run(compare, 4, timeout=200.0):
        for name, relative, difference in found:
            assert relative < 1e-6, name
            assert difference < 2e-6, name


def construct_undeclared(rank: int, world_size: int) -> None:
    model = make_experts()
    OffloadAdamW(groups_of(model, None), module=model)


def test_a_mesh_of_some_ranks_needs_a_declaration(ranks: RankPool) -> None:
    for error in ranks.run(construct_undeclared, 4, expect_errors=True):
        assert isinstance(error, RankError)
        assert error.type is ValueError
        assert "'experts.0.weight' is sharded over 2 of 4 ranks" in error.message
        assert "'replicas': 'copies'" in error.message


def lay_out(rank: int, world_size: int) -> list[list[int]]:
    """Lay out layers of three rows over two ranks, so that one rank has twice as many rows."""
    model = nn.ModuleList(nn.Linear(1000, 3, bias=False) for _ in range(4))
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"*": ColwiseParallel()})
    optimizer = OffloadAdamW(
        model.parameters(), module=model, offload=OffloadPolicy(bucket_nbytes=10_000), num_threads=1
    )
    core = optimizer._alive()
    return [state.indices.tolist() for state in core.states]


def test_all_ranks_have_the_same_buckets(ranks: RankPool) -> None:
    # A bucket with a gradient that is a partial sum is read collectively, in the order of buckets.
    first, second = ranks.run(lay_out, 2)
    assert first == second == [[3], [2], [1], [0]]


def bits_of(model: nn.Module, optimizer: OffloadAdamW) -> list[torch.Tensor]:
    """Return copies of this rank's parameters and of all their state."""
    parameters = list(model.parameters())
    held = [*parameters, *(v for p in parameters for v in optimizer.state.get(p, {}).values())]
    return [local_of(tensor).detach().clone() for tensor in held]


# A model, the option of its experts, and the parameter whose gradient is made not finite.
SKIPPING: dict[str, tuple[Callable[[], Any], str | None, str]] = {
    "base": (make_fsdp, None, "blocks.1.first.weight"),
    "weights in host memory": (
        lambda: shard(make_model(), offload_policy=CPUOffloadPolicy(pin_memory=False)),
        None,
        "head.weight",
    ),
    "bf16": (lambda: shard(make_model(torch.bfloat16)), None, "embedding.weight"),
    "experts": (make_experts, "distinct", "experts.0.weight"),
}


def skip_one(rank: int, world_size: int) -> list[tuple[str, list[StepReport], bool]]:
    """Take a step, one with a gradient that is not finite on the last rank, and one more."""
    found = []
    for name, (make, replicas, where) in SKIPPING.items():
        for streams in (True, False) if name == "base" else (True,):
            model = make()
            poisons = False

            def poison(parameter: Any) -> None:
                if poisons:  # noqa: B023
                    parameter.grad.to_local().view(-1)[1] = float("inf")

            # Before the hook of the optimizer, which takes the gradient out of `.grad`.
            model.get_parameter(where).register_post_accumulate_grad_hook(poison)
            optimizer = OffloadAdamW(
                groups_of(model, replicas),
                lr=LR,
                module=model if streams else None,
                num_threads=1,
            )
            reports, bits = [], []
            for step in range(3):
                poisons = step == 1 and rank == world_size - 1
                loss_of(model, tokens_of(step, rank)).backward()
                optimizer.step()
                optimizer.zero_grad()
                optimizer.synchronize()
                assert optimizer.last_step is not None
                reports.append(optimizer.last_step)
                bits.append(bits_of(model, optimizer))
            kept = all(map(torch.equal, bits[0], bits[1]))
            found.append((name, reports, kept and not all(map(torch.equal, bits[1], bits[2]))))
            optimizer.close()
    return found


def test_a_non_finite_part_skips_the_step_on_all_ranks(ranks: RankPool) -> None:
    for found in ranks.run(skip_one, 4, timeout=100.0):
        for name, reports, kept in found:
            assert [report.skipped for report in reports] == [False, True, False], name
            assert reports[1].non_finite == (SKIPPING[name][2],), name
            assert kept, name
