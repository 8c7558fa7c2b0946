"""Frozen parameters and buffers of every dtype and form keep every bit in a checkpoint."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from typer.testing import CliRunner

from offload_adam import (
    CheckpointError,
    OffloadAdam,
    begin_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from offload_adam.checkpoint.format import read_manifest
from offload_adam.checkpoint.load import verify_checkpoint
from offload_adam.cli.app import app

QUANTIZED = {torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4}
DTYPES = [d for d in vars(torch).values() if isinstance(d, torch.dtype) and d not in QUANTIZED]
DTYPES = sorted(set(DTYPES), key=str)  # some have several names
TOO_NARROW = {d for d in DTYPES if str(d).split("int")[-1] in set("1234567")}
"""uint1 to uint7 and int1 to int7, for which torch has no copy and no file."""
DEPRECATED = {d for d in DTYPES if str(d).startswith("torch.bits")}
"""Dtypes that torch.save writes and DCP does not."""


def tensor_of(seed: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return random bytes as a contiguous tensor, NaN and all."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    content = bytearray(random.Random(seed).randbytes(nbytes))
    if dtype is torch.bool:
        content = bytearray(byte & 1 for byte in content)
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(shape)


def content_of(tensor: torch.Tensor) -> list[Any]:
    """Return the bytes of each element in logical order, by the elements' addresses."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    size = tensor.element_size()
    start = int(tensor.storage_offset())
    whole = bytes(tensor.untyped_storage().tolist())

    def at(offset: int, dim: int) -> list[Any] | bytes:
        if dim == tensor.dim():
            return whole[offset * size : (offset + 1) * size]
        return [at(offset + i * tensor.stride(dim), dim + 1) for i in range(tensor.shape[dim])]

    return [at(start, 0)]


def forms(seed: str, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    yield "dense", tensor_of(seed, (3, 5), dtype)
    yield "scalar", tensor_of(seed, (), dtype)
    yield "empty", tensor_of(seed, (0, 3), dtype)
    yield "transposed", tensor_of(seed, (3, 5), dtype).t()
    yield "with_gaps", tensor_of(seed, (4, 5), dtype)[1:, ::2]
    yield "strided", tensor_of(seed, (7,), dtype)[1::2]
    yield "expanded", tensor_of(seed, (3, 1, 2), dtype).expand(3, 4, 2)
    yield "expanded_scalar", tensor_of(seed, (), dtype).expand(5)
    if dtype.is_complex:
        yield "conjugated", tensor_of(seed, (3, 5), dtype).conj()
        yield "conjugated_expanded", tensor_of(seed, (1, 5), dtype).conj().expand(3, 5)
        yield "negated", tensor_of(seed, (3, 5), dtype).conj().imag


def make(seed: int, dtypes: list[torch.dtype] = DTYPES) -> tuple[nn.Module, OffloadAdam]:
    """Return a model with one frozen parameter and several buffers of each dtype."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.layer = nn.Linear(4, 4)
    with warnings.catch_warnings(action="ignore"):  # "ComplexHalf support is experimental"
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            for form, tensor in forms(f"{seed} {name}", dtype):
                if form == "dense":
                    parameter = nn.Parameter(tensor, requires_grad=False)
                    model.register_parameter(f"{name}_{form}", parameter)
                else:
                    model.register_buffer(f"{name}_{form}", tensor)
    return model, OffloadAdam(model.parameters(), gradient_reduction="optimizer")


def contents(model: nn.Module) -> dict[str, list[Any]]:
    return {name: content_of(value) for name, value in model.state_dict().items()}


def save_at_once(path: Path, model: nn.Module, optimizer: OffloadAdam) -> None:
    save_checkpoint(path, model=model, optimizer=optimizer)


def save_in_background(path: Path, model: nn.Module, optimizer: OffloadAdam) -> None:
    begin_checkpoint(path, model=model, optimizer=optimizer).wait()


@pytest.mark.parametrize("save", [save_at_once, save_in_background])
def test_every_dtype_in_every_form(save: Callable[..., None], tmp_path: Path) -> None:
    model, optimizer = make(1)
    expected = contents(model)
    save(tmp_path / "c", model, optimizer)
    other, loaded = make(2)
    places = {name: value.data_ptr() for name, value in other.state_dict().items()}
    load_checkpoint(tmp_path / "c", model=other, optimizer=loaded)
    assert contents(other) == expected == contents(model)
    # Loaded in place: an expanded buffer is still expanded, for example.
    assert places == {name: value.data_ptr() for name, value in other.state_dict().items()}


def test_dtypes_without_a_name_in_safetensors_are_held_as_bytes(tmp_path: Path) -> None:
    """So other programs can read the files."""
    model, optimizer = make(1)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    state = model.state_dict()
    (file,) = (tmp_path / "c").glob("*.safetensors")
    exact = 0
    with safetensors.safe_open(file, "pt") as opened:
        for key in opened.keys():  # noqa: SIM118  # it is not a dict
            name, _, _ = key.removeprefix("model/").partition("@")
            if name.endswith(("_dense", "_scalar")):
                found, expected = opened.get_tensor(key), state[name]
                assert found.shape[: expected.dim()] == expected.shape
                assert bytes(found.untyped_storage().tolist()) == flat_bytes(expected), name
                exact += found.dtype == expected.dtype and found.shape == expected.shape
    assert exact == 19 * 3  # "expanded_scalar" too


def flat_bytes(tensor: torch.Tensor) -> bytes:
    def join(value: Any) -> bytes:
        return value if isinstance(value, bytes) else b"".join(map(join, value))

    return join(content_of(tensor))


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_inspect_and_verify(tmp_path: Path) -> None:
    model, optimizer = make(1)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    code, output = command("inspect", tmp_path / "c")
    assert code == 0
    for words in ("F8_E4M3", "complex128", "U16", "int4", "float4_e2m1fn_x2"):
        assert f"│ {words} " in output
    entry = read_manifest(tmp_path / "c").tensors["model/complex128_dense"]
    assert (entry.dtype, entry.shape) == ("complex128", [3, 5])
    verify_checkpoint(tmp_path / "c")


def test_torch_loads_an_export_and_its_files_are_imported(tmp_path: Path) -> None:
    dtypes = [dtype for dtype in DTYPES if dtype not in TOO_NARROW]
    model, optimizer = make(1, dtypes)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert command("export", "--format", "torch", tmp_path / "c", tmp_path / "t.pt")[0] == 0
    for mmap in (False, True):
        found = torch.load(tmp_path / "t.pt", weights_only=True, mmap=mmap)["model"]
        assert {name: content_of(value) for name, value in found.items()} == contents(model)
    # Frozen parameters may be in torch's optimizer, too.
    trained = torch.optim.AdamW(model.named_parameters())
    state = {"model": model.state_dict(), "optimizer": trained.state_dict()}
    torch.save(state, tmp_path / "own.pt")
    how = ("import", "--format", "torch-pickle", tmp_path / "own.pt", tmp_path / "d")
    assert command(*how)[0] == 0
    other, loaded = make(2, dtypes)
    loaded.param_groups[0]["decoupled_weight_decay"] = True
    load_checkpoint(tmp_path / "d", model=other, optimizer=loaded)
    assert contents(other) == contents(model)


def test_dcp_loads_an_export(tmp_path: Path) -> None:
    dtypes = [dtype for dtype in DTYPES if dtype not in TOO_NARROW | DEPRECATED]
    model, optimizer = make(1, dtypes)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert command("export", "--format", "dcp", tmp_path / "c", tmp_path / "d")[0] == 0
    # torch itself does not load into expanded tensors.
    names = [name for name in model.state_dict() if "expanded" not in name]
    state = make(2, dtypes)[0].state_dict()
    target = {"model": {name: state[name] for name in names}}
    dcp.load(target, checkpoint_id=tmp_path / "d", no_dist=True)
    found = {name: content_of(value) for name, value in target["model"].items()}
    assert found == {name: contents(model)[name] for name in names}


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_what_torch_cannot_write_is_not_exported(tmp_path: Path, form: str) -> None:
    for dtype in TOO_NARROW | (DEPRECATED if form == "dcp" else set()):
        model = nn.Linear(2, 2)
        model.register_buffer("table", tensor_of("", (3, 5), dtype))
        path = tmp_path / str(dtype)
        save_checkpoint(path, model=model, optimizer=OffloadAdam(model.parameters()))
        code, output = command("export", "--format", form, path, tmp_path / "t")
        assert (code, f"'model/table' has dtype {dtype}, which" in output) == (1, True), output
        assert not [*tmp_path.glob("t"), *tmp_path.glob("t.*")]


class Wrapper(torch.Tensor):
    """A quantized weight in two tensors, which has no memory of its own."""

    data_8: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, data_8: torch.Tensor, scale: torch.Tensor) -> Wrapper:
        found = torch.Tensor._make_wrapper_subclass(cls, data_8.shape, dtype=scale.dtype)
        found.data_8, found.scale = data_8, scale
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has mangled names
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data_8, args[0].scale)
        if func is torch.ops.aten.copy_.default and args[0] is args[1]:
            return args[0]
        raise NotImplementedError(func)


class Flat(Wrapper):
    """Names its two tensors to torch, as the weights of torchao do."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_8", "scale"], None


def flat_model(seed: str) -> tuple[Any, OffloadAdam]:
    """Return a model with two names of a frozen weight in which one of the tensors is a `Flat`."""
    model: Any = nn.Linear(2, 2)
    scale = Flat(tensor_of(seed, (2, 1), torch.int8), tensor_of(seed, (1,), torch.bfloat16))
    weight = Flat(tensor_of(seed, (2, 6), torch.int8)[:, ::2], scale)
    model.frozen = nn.Parameter(weight, requires_grad=False)
    model.again = model.frozen
    return model, OffloadAdam(model.parameters())


def flat_contents(model: Any) -> list[Any]:
    scale = model.frozen.scale
    return [content_of(tensor) for tensor in (model.frozen.data_8, scale.data_8, scale.scale)]


@pytest.mark.parametrize("save", [save_at_once, save_in_background])
def test_a_subclass_of_several_tensors(save: Callable[..., None], tmp_path: Path) -> None:
    model, optimizer = flat_model("1")
    expected = flat_contents(model)
    save(tmp_path / "c", model, optimizer)
    saved = read_manifest(tmp_path / "c").tensors
    names = ["data_8", "scale/data_8", "scale/scale"]
    assert [n for n in saved if "frozen" in n] == [f"model/frozen/{name}" for name in names]
    other, loaded = flat_model("2")
    assert flat_contents(other) != expected
    load_checkpoint(tmp_path / "c", model=other, optimizer=loaded)
    assert flat_contents(other) == expected == flat_contents(model)
    assert type(other.frozen) is type(model.frozen)
    other.frozen.scale.scale = torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="'model/frozen/scale/scale' has shape"):
        load_checkpoint(tmp_path / "c", model=other, optimizer=loaded)


def quantized() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):
        return torch.quantize_per_tensor(torch.ones(2), 0.5, 3, torch.qint8)


def nested() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


REJECTED = {
    "quantized": (quantized, r"has dtype torch\.qint8, .*Register its int_repr\(\)"),
    "meta": (lambda: torch.ones(2, device="meta"), r"is on the meta device.*to_empty\(\)"),
    "sparse": (lambda: torch.eye(2).to_sparse(), r"has layout torch\.sparse_coo.*to_dense\(\)"),
    "nested": (nested, r"has layout torch\.nested, but checkpoints hold only dense"),
    "wrapper": (
        lambda: Wrapper(torch.ones(2, 2, dtype=torch.int8), torch.ones(1)),
        r"is a .*\.Wrapper of dtype torch\.float32, whose elements.*Register the tensors",
    ),
}


@pytest.mark.parametrize("save", [save_at_once, save_in_background])
@pytest.mark.parametrize("kind", list(REJECTED))
def test_other_tensors_are_rejected_by_name(
    save: Callable[..., None], kind: str, tmp_path: Path
) -> None:
    """Before anything is written, and before anything is loaded."""
    tensor, words = REJECTED[kind]
    model = nn.Linear(2, 2)
    optimizer = OffloadAdam(model.parameters())
    save(tmp_path / "c", model, optimizer)
    model.register_buffer("table", tensor())
    with pytest.raises(CheckpointError, match=f"^model/table {words}"):
        save(tmp_path / "new" / "d", model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(CheckpointError, match=f"^model/table {words}"):
        load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_quantized_tensor_in_extra_is_rejected_by_name(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = OffloadAdam(model.parameters())
    extra = {"a": [quantized()]}
    with pytest.raises(CheckpointError, match=r"^extra\['a'\]\[0\] is a tensor of torch\.qint8"):
        save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, extra=extra)
    assert list(tmp_path.iterdir()) == []


class Packed(nn.Parameter):
    """Has plain memory, and functions that return other values, as bitsandbytes' Params4bit."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.view, torch.Tensor.reshape):
            raise NotImplementedError
        base: Any = super()
        return base.__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_with_plain_memory(tmp_path: Path) -> None:
    def make_packed(seed: str) -> tuple[nn.Module, OffloadAdam]:
        model = nn.Linear(2, 2)
        for name, value in (
            ("packed", tensor_of(seed, (7, 1), torch.uint8)),
            ("with_gaps", tensor_of(seed, (7, 4), torch.uint8)[:, ::2]),
        ):
            model.register_parameter(name, Packed(value, requires_grad=False))
        return model, OffloadAdam(model.parameters())

    model, optimizer = make_packed("1")
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    other, loaded = make_packed("2")
    load_checkpoint(tmp_path / "c", model=other, optimizer=loaded)
    assert contents(other) == contents(model)
    assert type(other.packed) is Packed


def test_expanded_elements_that_were_saved_with_different_values(tmp_path: Path) -> None:
    for value in (torch.full((1, 3), torch.nan).expand(2, 3), torch.arange(6.0).view(2, 3)):
        model = nn.Linear(2, 2)
        model.register_buffer("table", value)
        optimizer = OffloadAdam(model.parameters())
        path = tmp_path / str(value.stride())
        save_checkpoint(path, model=model, optimizer=optimizer)
        model.table = torch.zeros(1, 3).expand(2, 3)
        if value.stride(0) == 0:
            load_checkpoint(path, model=model, optimizer=optimizer)
            assert bool(model.table.isnan().all())
            continue
        with pytest.raises(CheckpointError, match="Elements of 'model/table' share memory here"):
            load_checkpoint(path, model=model, optimizer=optimizer)


def test_a_hook_that_conjugates_a_buffer(tmp_path: Path) -> None:
    """The view has the memory of the buffer, and other values."""

    def make_conjugating(value: complex) -> tuple[Any, OffloadAdam]:
        model: Any = nn.Linear(2, 2)
        model.register_buffer("table", torch.tensor([value]))
        model.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({prefix + "table": module.table.conj()})
        )
        model.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: state.update(
                {prefix + "table": state[prefix + "table"].conj()}
            )
        )
        return model, OffloadAdam(model.parameters())

    model, optimizer = make_conjugating(1 + 2j)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer)
    code, _ = command("export", "--format", "torch", tmp_path / "c", tmp_path / "t.pt")
    assert code == 0
    found = torch.load(tmp_path / "t.pt", weights_only=True)["model"]["table"]
    assert found.tolist() == [1 - 2j]
    other, loaded = make_conjugating(0j)
    load_checkpoint(tmp_path / "c", model=other, optimizer=loaded)
    assert other.table.tolist() == [1 + 2j]
