"""torch's private names: each exists and behaves, and two files alone use them."""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

import offload_adam
from offload_adam import OffloadAdam, torch_private
from offload_adam.state.state_shard import BoxTensor

PACKAGE = Path(offload_adam.__file__).parent
HOMES = ("torch_private.py", "fsdp_private.py")

# Private names of others than torch.
NOT_OF_TORCH = {
    "_exit",  # os
    "_asdict",  # NamedTuple, documented
    "_replace",  # NamedTuple, documented
    "_getframe",  # sys, documented
    "_cache",  # numba's dispatcher
}
# What torch looks for in our files, and documents nowhere; see the table in the file.
ALLOWED = {
    ("step/forward_waits.py", "_version"),
    (
        "state/state_shard.py",
        "_sources",
    ),  # of BoxTensor; torch has a module of that name
}
# Undocumented without an underscore.
UNDERSCORELESS = {
    "distributed_c10d",
    "is_lazy",
    "cudart",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_gather_into_tensor",
    "all_gather_single",
    "ds_id",
    "bound_device_id",
    "ProcessGroupNCCL",
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name.strip("_").isidentifier()


def own_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def torch_names() -> set[str]:
    """Return the private attributes of torch's modules and of the objects that users hand over."""
    module, scaler = nn.Linear(1, 1), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(module.parameters())
    owners = (torch, torch._C, torch._utils, torch.Tensor, module, scaler, optimizer)
    groups = (dist.distributed_c10d, dist.ProcessGroup, dist.PrefixStore)
    return {name for owner in (*owners, *groups) for name in dir(owner) if is_private(name)}


def used_names(tree: ast.Module, own: set[str], of_torch: set[str]) -> Iterator[str]:
    """Yield the names in a file that are private to someone else, or undocumented."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            by_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            foreign = node.attr not in own or (not by_self and node.attr in of_torch)
            if (is_private(node.attr) and foreign) or node.attr in UNDERSCORELESS:
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (name for name in names if is_private(name) or name in UNDERSCORELESS)
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
            yield from (name for name in names if is_private(name) or name in UNDERSCORELESS)
        elif isinstance(node, ast.Constant) and node.value in UNDERSCORELESS | of_torch:
            yield str(node.value)


def strangers(tree: ast.Module, own: set[str], of_torch: set[str]) -> set[str]:
    return set(used_names(tree, own, of_torch)) - NOT_OF_TORCH


def test_no_other_file_uses_a_private_name_of_torch() -> None:
    of_torch = torch_names()
    files = dict(sources())
    own = {name for tree in files.values() for name in own_names(tree)}
    found = {
        (path, name)
        for path, tree in files.items()
        if path not in HOMES
        for name in strangers(tree, own, of_torch)
    }
    assert found == ALLOWED, "move these names into torch_private.py or fsdp_private.py"


@pytest.mark.parametrize(
    "text",
    [
        "import torch._dynamo",
        "from torch.optim.optimizer import _global_optimizer_post_hooks",
        "from torch.distributed.distributed_c10d import anything",
        "import torch.distributed.distributed_c10d as c10d",
        "torch._C.anything()",
        "torch._foreach_add_([], [])",
        "tensor._version",
        "module._parameters",
        "self._optimizer_step_pre_hooks",
        "getattr(module, '_compiled_call_impl', None)",
        "torch.cuda.cudart()",
    ],
)
def test_a_private_name_is_found(text: str) -> None:
    assert strangers(ast.parse(text), {"_parameters", "_version"}, torch_names())


def test_this_torch_has_every_name() -> None:
    torch_private.check()


def test_a_missing_name_is_reported_when_an_optimizer_is_constructed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_private, "_missing", [])
    stub = torch_private._find("torch", "_C._renamed")
    module = nn.Linear(2, 2)
    message = rf"torch {torch.__version__.split('+')[0]}.* lacks torch\._C\._renamed"
    with pytest.raises(RuntimeError, match=message):
        OffloadAdam(module.parameters(), module=module)
    with pytest.raises(RuntimeError, match=message):
        stub()


def test_a_queued_callback_runs_once_at_the_end_of_its_backward() -> None:
    events: list[str] = []
    first, last = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)

    def ended() -> None:
        assert torch_private.current_autograd_node() is None
        assert first.grad is not None
        events.append("end")

    def queue(_: torch.Tensor) -> None:
        assert torch_private.current_graph_task() != torch_private.NO_GRAPH_TASK
        assert torch_private.current_autograd_node() is not None
        torch_private.queue_backward_callback(ended)
        events.append("hook")

    last.register_post_accumulate_grad_hook(queue)
    (first * 2 * last).sum().backward()
    assert events == ["hook", "end"]
    assert torch_private.current_graph_task() == torch_private.NO_GRAPH_TASK
    with pytest.raises(RuntimeError):
        torch_private.queue_backward_callback(ended)


def test_two_backwards_have_two_numbers() -> None:
    tasks: list[int] = []
    weight = torch.ones(1, requires_grad=True)
    weight.register_hook(lambda _: tasks.append(torch_private.current_graph_task()))
    for _ in range(2):
        (weight * 2).sum().backward()
    assert len(set(tasks)) == 2


def test_the_parameter_whose_gradient_is_added_is_known() -> None:
    found: list[torch.Tensor | None] = []
    weight = torch.ones(1, requires_grad=True)
    weight.register_post_accumulate_grad_hook(
        lambda _: found.append(torch_private.accumulating_parameter())
    )
    weight.register_hook(lambda _: found.append(torch_private.accumulating_parameter()))
    product = weight * 2
    product.register_hook(lambda _: found.append(torch_private.accumulating_parameter()))
    product.sum().backward()
    assert [parameter is weight for parameter in found] == [False, True, True]
    assert found[0] is None
    assert torch_private.accumulating_parameter() is None


def test_gradient_hooks_run_for_a_parameter_that_was_swapped() -> None:
    found: list[str] = []
    weight, other = (nn.Parameter(torch.full((1,), value)) for value in (1.0, 3.0))
    torch_private.add_gradient_hook(weight, lambda _: found.append("first"))
    (weight * 2).sum().backward()
    assert found == ["first"]
    weight.grad = None
    torch.utils.swap_tensors(weight, other)
    (weight * weight).sum().backward()
    assert found == ["first"], "torch runs these hooks itself: remove our own way"
    handle = torch_private.add_gradient_hook(weight, lambda _: found.append("second"))
    (weight * weight).sum().backward()
    assert found == ["first", "first", "second"]
    assert weight.grad is not None
    assert weight.grad.item() == 12.0
    handle.remove()
    (weight * weight).sum().backward()
    assert found[3:] == ["first"]


def test_versions_and_bases() -> None:
    tensor = torch.zeros(4)
    before = torch_private.version_of(tensor)
    tensor.add_(1)
    assert torch_private.version_of(tensor) == before + 1
    assert torch_private.base_of(tensor[1:]) is tensor
    assert torch_private.base_of(tensor) is None


def test_entries_of_a_sparse_tensor_that_is_not_coalesced() -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.tensor([2.0, 3.0]), (4,), check_invariants=True
    )
    assert torch_private.coo_indices(sparse).tolist() == [[1, 1]]
    assert torch_private.coo_values(sparse).tolist() == [2.0, 3.0]


def test_operators() -> None:
    target = [torch.zeros(2), torch.zeros(3)]
    torch_private.foreach_copy(target, [torch.ones(2), torch.ones(3)])
    assert all(bool(tensor.eq(1).all()) for tensor in target)
    torch_private.foreach_add(target, [torch.ones(2), torch.ones(3)], alpha=3.0)
    assert all(bool(tensor.eq(4).all()) for tensor in target)
    large = torch.full((4,), 1e30, dtype=torch.bfloat16)
    (norm,) = torch_private.foreach_norm([large], 2, torch.float64)
    assert norm.dtype == torch.float64
    assert norm.item() == 2 * large[0].item()
    assert torch.zeros(2).__reduce_ex__(2)[0] is torch_private.rebuild_tensor
    untyped = torch.zeros(2, dtype=torch.uint16)
    assert untyped.__reduce_ex__(2)[0] is torch_private.rebuild_untyped_tensor


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_fused_step_is_that_of_adamw(amsgrad: bool) -> None:
    filled = [torch.full((20,), value) for value in (3.0, 0.5, 0.0, 0.0, 1.0)]
    weight, gradient, exp_avg, exp_avg_sq, largest = filled
    before = gradient.clone()
    torch_private.fused_adamw(
        [weight],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [largest] if amsgrad else [],
        [torch.full((), 2.0**62)],  # no bias correction
        lr=0.1,
        beta1=0.5,
        beta2=0.75,
        weight_decay=0.5,
        eps=0.25,
        amsgrad=amsgrad,
        maximize=False,
    )
    assert torch.equal(gradient, before)
    assert exp_avg.tolist() == [0.25] * 20
    assert exp_avg_sq.tolist() == [0.0625] * 20
    denominator = (1.0 if amsgrad else 0.25) + 0.25
    torch.testing.assert_close(weight, torch.full((20,), 3 * 0.95 - 0.1 * 0.25 / denominator))


def test_compiled_modules_are_told_apart() -> None:
    module = nn.Linear(1, 1)
    assert not torch_private.is_compiled(module)
    torch_private.set_compiled_call(module, lambda *_: "compiled")
    assert torch_private.is_compiled(module)
    assert module(torch.ones(1)) == "compiled"
    torch_private.set_compiled_call(module, None)
    assert torch_private.compiled_call(module) is None
    assert torch_private.is_compiled(torch.compile(module))  # type: ignore[arg-type]
    assert torch_private.registered_parameters(module)["weight"] is module.weight


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_norm_layers_have_one_base(layer: type[nn.Module]) -> None:
    assert issubclass(layer, torch_private.norm_base)


def test_hooks_of_optimizers() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)])
    assert not torch_private.has_step_post_hooks(optimizer)
    handle = optimizer.register_step_post_hook(lambda *_: None)
    assert torch_private.has_step_post_hooks(optimizer)
    handle.remove()
    handle = register_optimizer_step_post_hook(lambda *_: None)
    assert torch_private.has_step_post_hooks(optimizer)
    handle.remove()
    optimizer.register_load_state_dict_pre_hook(lambda *_: None)
    optimizer.register_load_state_dict_post_hook(lambda *_: None)
    assert len([*torch_private.load_state_dict_pre_hooks(optimizer)]) == 1
    assert len([*torch_private.load_state_dict_post_hooks(optimizer)]) == 1


@pytest.mark.parametrize("all_threads", [False, True])
def test_a_profiler_is_noticed_on_every_thread(all_threads: bool) -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(torch_private.profiler_is_on()))
    config = _ExperimentalConfig(profile_all_threads=all_threads)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config):
        found.append(torch_private.profiler_is_on())
        thread.start()
        thread.join()
    assert found == [True, True]
    assert not torch_private.profiler_is_on()


def test_found_inf_flags_are_those_that_a_scaler_updates_by() -> None:
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    for flag in torch_private.found_inf_flags(scaler, optimizer):
        flag.fill_(1.0)
    scaler.update()
    assert scaler.get_scale() == 4.0


def test_process_groups_and_stores(tmp_path: Path) -> None:
    timeout = timedelta(seconds=7)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timeout)
    try:
        assert dist.group.WORLD is not None
        assert torch_private.timeout_of(dist.group.WORLD) == timeout
        group = torch_private.open_group("a name", [0], 0, "gloo", timeout)
        assert dist.get_process_group_ranks(group) == [0]
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=group)
        torch_private.abort_collectives(group, "cpu")
        torch_private.connect_to_default_store(timeout).set("key", "value")
        assert torch_private.default_store().get("key") == b"value"
        beneath = torch_private.store_without_prefixes(dist.PrefixStore("prefix", store))
        assert not isinstance(beneath, dist.PrefixStore)
    finally:
        dist.destroy_process_group()


def test_torch_saves_by_the_methods_of_box_tensors() -> None:
    from torch.distributed._checkpointable import _Checkpointable

    wanted = {name for name in vars(_Checkpointable) if name.endswith("__")} & {
        "__create_write_items__",
        "__create_chunk_list__",
        "__get_tensor_shard__",
    }
    assert len(wanted) == 3
    assert isinstance(BoxTensor((1,), torch.float32, []), _Checkpointable)
