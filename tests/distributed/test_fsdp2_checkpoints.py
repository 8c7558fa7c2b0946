"""Checkpoints of sharded models load under every other sharding, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from offload_adam import (
    CheckpointError,
    OffloadAdamW,
    OffloadPolicy,
    begin_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.checkpoint.dcp import OptimizerState
from offload_adam.checkpoint.export import export_dcp, export_torch
from offload_adam.checkpoint.format import flat_pieces
from offload_adam.checkpoint.load import load_optimizer_state, verify_checkpoint
from offload_adam.checkpoint.save import save_optimizer_state
from tests.support.ranks import RankPool

Values = dict[str, torch.Tensor]

NUM_STEPS = 3


class Net(nn.Module):
    """Has sizes that four ranks do not divide, a frozen embedding and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8).requires_grad_(False)
        self.first, self.second = nn.Linear(8, 22), nn.Linear(22, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(3, 4, 2)
        self.head = nn.Linear(8, 3)
        self.register_buffer("scale", torch.rand(8))
        self.first.register_buffer("offset", torch.rand(3))  # a DTensor, too, if `first` is one
        self.aliases = nn.ModuleList([self.embedding, self.second])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.second(torch.tanh(self.first(hidden).clone()))
        images = self.conv(hidden[:, None].expand(-1, 3, -1, -1)).clone()
        result: torch.Tensor = self.head(self.norm(hidden) * self.scale) + images.mean()
        return result.clone()


def fsdp(net: Net) -> None:
    fully_shard(net.first)
    fully_shard(net)


def fsdp_by_column(net: Net) -> None:
    def placed(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() > 1 and parameter.shape[1] % 2 == 0 else None

    fully_shard(net, shard_placement_fn=placed)


def tensor_parallel(net: Net) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {
        "embedding": ColwiseParallel(),
        "first": ColwiseParallel(),
        "second": RowwiseParallel(),
    }
    plan["embedding"] = ColwiseParallel(output_layouts=torch.distributed.tensor.Replicate())
    parallelize_module(net, mesh["tp"], plan)
    fully_shard(net, mesh=mesh["dp"])


def hybrid(net: Net) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(net.second, mesh=mesh)
    fully_shard(net, mesh=mesh, ignored_params={net.norm.bias})  # stays a plain parameter


def plain(net: Net) -> None:
    """Shard nothing, but keep the convolution's weight in another order."""
    net.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def make(
    shard: Callable[[Net], None], dtype: torch.dtype, seed: int, *, overlaps: bool = False
) -> tuple[Net, OffloadAdamW]:
    torch.manual_seed(seed)
    net = Net().to(dtype)
    shard(net)
    divided = [*net.first.parameters(), net.second.weight, net.embedding.weight]
    known = {id(parameter) for parameter in divided}
    rest = [parameter for parameter in net.parameters() if id(parameter) not in known]
    groups: list[dict[str, Any]] = [
        {"params": divided, "lr": 0.1 if seed == 1 else 0.2},
        {"params": rest},
    ]
    if shard is tensor_parallel:
        groups[1]["replicas"] = "copies"  # tensor parallelism leaves copies of these
    offload = OffloadPolicy(bucket_nbytes=256)
    module = net if overlaps else None
    return net, OffloadAdamW(groups, lr=0.05, num_threads=1, offload=offload, module=module)


def train(net: Net, optimizer: OffloadAdamW, start: int, end: int) -> None:
    """Take steps with the same batch on all ranks."""
    for step in range(start, end):
        generator = torch.Generator().manual_seed(step)
        loss = net(torch.randint(0, 10, (4, 5), generator=generator)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor that torch has gathered."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def values_of(net: Net, optimizer: OffloadAdamW) -> Values:
    """Return all values by name; the state of a plain optimizer of two ranks on rank 0 alone."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {f"net/{name}": whole(value) for name, value in net.state_dict().items()}
    members = [member for group in optimizer.param_groups for member in group["params"]]
    full = optimizer.full_state_dict()
    masters = full.get("offload_adam", {}).get("master_weight", {})
    is_plain = not any(isinstance(member, DTensor) for member in members)
    saved = {} if is_plain else optimizer.state_dict()["state"]
    for number, member in enumerate(members):
        entry = {**full["state"].get(number, {})} if full else {}
        if number in masters:
            entry["master_weight"] = masters[number]
        name = names[id(member)]
        gathered = {f"{name}/{key}": value for key, value in entry.items()}
        if not is_plain and member.requires_grad:
            # torch's own gather; that of the optimizer must be the same, on rank 0 alone.
            by_torch = {f"{name}/{key}": whole(value) for key, value in saved[number].items()}
            assert bool(full) == (dist.get_rank() == 0)
            if full:
                assert_same(gathered, by_torch)
            gathered = by_torch
        found |= gathered
    return found


def assert_same(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def check(net: Net, optimizer: OffloadAdamW, expected: Values) -> None:
    found = values_of(net, optimizer)
    if any(isinstance(parameter, DTensor) for parameter in net.parameters()) or (
        not dist.is_initialized() or dist.get_rank() == 0
    ):
        assert_same(found, expected)
    assert optimizer.num_steps == NUM_STEPS
    # What the other ranks have is not of the saved run.
    norm = net.norm.weight
    has_copies = isinstance(norm, DTensor) and norm.device_mesh.size() < dist.get_world_size()
    replicas = [group.get("replicas") for group in optimizer.param_groups]
    assert replicas == [None, "copies" if has_copies else None]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    assert optimizer.state[net.norm.weight]["step"] == NUM_STEPS


LAYOUTS: dict[str, tuple[int, Callable[[Net], None]]] = {
    "fsdp 4": (4, fsdp),
    "tp": (4, tensor_parallel),
    "hsdp": (4, hybrid),
    "fsdp 2": (2, fsdp),
    "columns": (2, fsdp_by_column),
    "zero 2": (2, plain),
    "plain": (1, plain),
}


def start(rank: int, world_size: int, dtype: torch.dtype, folder: str) -> tuple[Values, Values]:
    """Train, save, and train on; return the values at the save and at the end."""
    net, optimizer = make(fsdp, dtype, seed=1)
    train(net, optimizer, 0, NUM_STEPS)
    saved = values_of(net, optimizer)
    save_checkpoint(Path(folder, "fsdp 4"), model=net, optimizer=optimizer, extra={"a": 1})
    train(net, optimizer, NUM_STEPS, NUM_STEPS + 2)
    later = values_of(net, optimizer)
    optimizer.close()
    return saved, later


def spoil(net: Net, optimizer: OffloadAdamW) -> None:
    """Change all values."""
    train(net, optimizer, 0, 1)
    with torch.no_grad():
        for tensor in (net.embedding.weight, net.scale, net.first.offset):
            tensor.zero_()  # type: ignore[operator]


def pass_on(
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    folder: str,
    expected: Values,
    sources: list[str],
    targets: list[str],
) -> None:
    """Load each source under each layout of `targets`, and save under the layout's name."""
    for target in targets:
        _, shard = LAYOUTS[target]
        net, optimizer = make(shard, dtype, seed=2 + rank)
        for source in sources:
            spoil(net, optimizer)
            assert load_checkpoint(Path(folder, source), model=net, optimizer=optimizer) == {"a": 1}
            check(net, optimizer, expected)
        path = Path(folder, target)
        if not path.exists():
            save_checkpoint(path, model=net, optimizer=optimizer, extra={"a": 1})
        optimizer.close()


@pytest.mark.parametrize(
    ("dtype", "of_four", "of_two"),
    [
        # An fp32 weight is its own master weight.
        (torch.float32, ["tp"], ["columns"]),
        (torch.bfloat16, ["tp", "hsdp"], ["fsdp 2", "columns", "zero 2"]),
    ],
    ids=["fp32", "bf16"],
)
def test_from_layout_to_layout_to_the_bit(
    ranks: RankPool, dtype: torch.dtype, of_four: list[str], of_two: list[str], tmp_path: Path
) -> None:
    folder = str(tmp_path)
    expected, _ = ranks.run(start, 4, dtype, folder)[0]
    ranks.run(pass_on, 4, dtype, folder, expected, ["fsdp 4"], of_four)
    ranks.run(pass_on, 2, dtype, folder, expected, of_four, of_two)
    ranks.run(pass_on, 1, dtype, folder, expected, [*of_four, *of_two], ["plain"])
    ranks.run(pass_on, 4, dtype, folder, expected, [*of_two, "plain"], ["fsdp 4", *of_four])
    for name in ("fsdp 4", *of_four, *of_two, "plain"):
        manifest = verify_checkpoint(tmp_path / name)
        cut_columns = flat_pieces(manifest.tensors["model/second.weight"]) is None
        assert cut_columns == (name in ("tp", "columns"))
    check_exports(tmp_path, expected)


def check_exports(folder: Path, expected: Values) -> None:
    """Let torch alone load exports of a checkpoint whose pieces are columns."""
    export_torch(folder / "tp", folder / "tp.pt")
    content = torch.load(folder / "tp.pt", weights_only=True)
    assert_same(
        {f"net/{name}": value for name, value in content["model"].items()},
        {name: value for name, value in expected.items() if name.startswith("net/")},
    )
    export_dcp(folder / "tp", folder / "tp-dcp")
    names = [
        name for group in content["optimizer"]["param_groups"] for name in group["param_names"]
    ]
    for number, name in enumerate(names):
        for key, value in content["optimizer"]["state"].get(number, {}).items():
            assert torch.equal(value, expected[f"{name}/{key}"])
            if key != "step":
                state = {name: {key: torch.empty_like(value)}}
                dcp.load(
                    {"optimizer": {"state": state}}, checkpoint_id=folder / "tp-dcp", no_dist=True
                )
                assert torch.equal(state[name][key], value)


def go_on(rank: int, world_size: int, folder: str, expected: Values, later: Values) -> None:
    """Train on after a load under the same layout, with a background checkpoint meanwhile."""
    net, optimizer = make(fsdp, torch.float32, seed=2, overlaps=True)
    # An evaluation leaves the root gathered, from which FSDP2 would read old values.
    with torch.no_grad():
        before = net(torch.arange(10).view(2, 5))
    load_checkpoint(Path(folder, "fsdp 4"), model=net, optimizer=optimizer)
    with torch.no_grad():
        assert not torch.equal(net(torch.arange(10).view(2, 5)), before)
    path = Path(folder, "background")
    pending = begin_checkpoint(path, model=net, optimizer=optimizer, extra={"a": 1})
    train(net, optimizer, NUM_STEPS, NUM_STEPS + 2)
    pending.wait()
    assert_same(values_of(net, optimizer), later)
    load_checkpoint(path, model=net, optimizer=optimizer)
    check(net, optimizer, expected)
    optimizer.close()


def pass_state(rank: int, world_size: int, folder: str, expected: Values) -> None:
    """Save and load by the other functions, from and to tensor parallelism."""
    net, optimizer = make(tensor_parallel, torch.bfloat16, seed=1)
    load_checkpoint(Path(folder, "fsdp 4"), model=net, optimizer=optimizer)
    save_optimizer_state(Path(folder, "state"), model=net, optimizer=optimizer, label="a")
    dcp.save(
        {"net": net.state_dict(), "state": OptimizerState(net, optimizer)},
        checkpoint_id=Path(folder, "dcp"),
    )
    whole_net = {name: whole(value) for name, value in net.state_dict().items()}
    optimizer.consolidate_state_dict()
    boxed = [optimizer.state_dict() if rank == 0 else {}]
    dist.broadcast_object_list(boxed)
    optimizer.close()

    net, optimizer = make(hybrid, torch.bfloat16, seed=2)
    dcp.load(
        {"net": net.state_dict(), "state": OptimizerState(net, optimizer)},
        checkpoint_id=Path(folder, "dcp"),
    )
    check(net, optimizer, expected)
    optimizer.close()

    for shard in (fsdp, tensor_parallel):
        net, optimizer = make(shard, torch.bfloat16, seed=3)
        load_whole(net, whole_net)
        load_optimizer_state(Path(folder, "state"), model=net, optimizer=optimizer, label="a")
        check(net, optimizer, expected)
        optimizer.close()
        net, optimizer = make(shard, torch.bfloat16, seed=4)
        load_whole(net, whole_net)
        optimizer.load_state_dict(boxed[0])
        optimizer.num_steps = NUM_STEPS
        check(net, optimizer, expected)
        optimizer.close()


def load_whole(net: Net, values: Values) -> None:
    """Let torch load whole tensors."""
    with torch.no_grad():
        for name, target in net.state_dict().items():
            if isinstance(target, DTensor):
                mesh, placements = target.device_mesh, target.placements
                part = torch.distributed.tensor.distribute_tensor(
                    values[name], mesh, placements, src_data_rank=None
                )
                target.copy_(part)
            else:
                target.copy_(values[name])


def reject(rank: int, world_size: int, folder: str) -> None:
    """Try to save and load parameters that are different ones on other meshes."""
    net = nn.ModuleDict({"expert": nn.Linear(4, 4), "router": nn.Linear(4, 4)})
    groups: list[dict[str, Any]] = [
        {"params": list(net[name].parameters())} for name in ("router", "expert")
    ]
    optimizer = OffloadAdamW(groups, lr=0.1)
    save_checkpoint(Path(folder, "yes"), model=net, optimizer=optimizer)
    optimizer.close()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert", "shard"))
    for frozen in (False, True):
        net = nn.ModuleDict({"expert": nn.Linear(4, 4), "router": nn.Linear(4, 4)})
        fully_shard(net["expert"], mesh=mesh["shard"])
        fully_shard(net["router"])
        net["expert"].requires_grad_(not frozen)
        distinct = {"params": list(net["expert"].parameters()), "replicas": "distinct"}
        groups = [{"params": list(net["router"].parameters())}, distinct]
        optimizer = OffloadAdamW(groups, lr=0.1)
        words = "is in a group with replicas='distinct'"
        with pytest.raises(CheckpointError, match=rf"'expert\.(weight|bias)' {words}"):
            save_checkpoint(Path(folder, "no"), model=net, optimizer=optimizer)
        with pytest.raises(CheckpointError, match=rf"'expert\.(weight|bias)' {words}"):
            load_checkpoint(Path(folder, "yes"), model=net, optimizer=optimizer)
        if not frozen:
            for call in (OptimizerState(net, optimizer).state_dict, optimizer.full_state_dict):
                with pytest.raises(CheckpointError, match=words):
                    call()
        optimizer.close()


def snapshot_buffer(rank: int, world_size: int) -> int:
    net = Net()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "shard"))
    fully_shard(net, mesh=mesh["shard"])
    offload = OffloadPolicy(snapshot_buffer_nbytes=2**20)
    group = {"params": list(net.parameters()), "replicas": "copies"}
    optimizer = OffloadAdamW([group], lr=0.1, offload=offload)
    nbytes = optimizer.host_nbytes["snapshot buffer"]
    optimizer.close()
    return nbytes


def test_ranks_with_copies_have_no_snapshot_buffer(ranks: RankPool) -> None:
    found = ranks.run(snapshot_buffer, 4)
    assert [nbytes > 0 for nbytes in found] == [True, True, False, False]


def test_state_by_every_function(ranks: RankPool, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        expected, later = ranks.run(start, 4, dtype, str(folder))[0]
        if dtype == torch.float32:
            ranks.run(go_on, 4, str(folder), expected, later)
        else:
            ranks.run(pass_state, 4, str(folder), expected)
    ranks.run(reject, 4, str(tmp_path))
    assert not (tmp_path / "no").exists()
