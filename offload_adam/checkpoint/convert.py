"""Checkpoints from and to torch's own forms: a pickled file, a `torch.distributed.checkpoint`.

An exported file is written as `torch.save` writes it, tensor after tensor: none of them has to be
in memory.

    archive/data.pkl     the object, in which each tensor names a storage
    archive/data/<key>   one storage's bytes, at a multiple of 64 bytes, so that it can be mapped
    archive/version, ... what torch looks at before it reads the rest

`torch.save` itself takes tensors that are there; what it has for those that are not, fake tensors
and records that are filled in later, is private or marked as a prototype, and leaves checksums out.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from zipfile import ZipFile, ZipInfo

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from offload_adam.checkpoint.dcp import plain_text
from offload_adam.checkpoint.files import (
    RankFile,
    as_bytes,
    commit_files,
    discard,
    partial_name,
    publish,
    rank_file_name,
    remove_abandoned,
)
from offload_adam.checkpoint.format import (
    DTYPES,
    FORMAT_VERSION,
    GroupEntry,
    Manifest,
    OptimizerEntry,
    decoded_optimizer,
    encode,
    read_manifest,
)
from offload_adam.checkpoint.load import CheckpointReader
from offload_adam.checkpoint.save import manifest_of, whole_part
from offload_adam.errors import CheckpointError
from offload_adam.state.state_dict import pack_full
from offload_adam.state.state_shard import (
    Box,
    BoxSource,
    BoxTensor,
    inverse_order,
    logical_box,
    range_of_box,
)
from offload_adam.torch_private import rebuild_tensor

_MODEL, _OPTIMIZER = "model/", "optimizer/"
_PLANES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_NO_OPTIONS = ("params", "param_names", "foreach", "capturable", "differentiable", "fused")
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)

_FOLDER = "archive"
_ALIGNMENT_NBYTES = 64
_PADDING_ID = 0x4246  # what torch's own padding is called
_FIELD = struct.Struct("<HH")
_LARGE_NBYTES = 2**30
"""A record from here on has lengths of 64 bits; zipfile would take them from twice as many on."""
_PICKLE_PROTOCOL = 2  # torch's
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float64: torch.DoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


def export_torch(path: Path, out: Path) -> str:
    """Write a checkpoint as one file that `torch.load(out, weights_only=True)` reads.

    It is a dict: "model" and "optimizer" are plain state dicts, of the model and of
    `torch.optim.AdamW` over the same groups; "step" and "extra" are as they were saved, but for
    values that torch does not read with `weights_only`, NumPy arrays for example. Tensors are read,
    verified and written block by block, and lie in memory as they did when they were saved.

    Returns:
        Which torch optimizer loads the file, how that optimizer differs, and what is left out.

    Raises:
        CheckpointError: the checkpoint is damaged, or `out` exists.
        OSError: `out` cannot be written.
    """
    _reject_existing(out)
    manifest = read_manifest(path)
    with closing(CheckpointReader(path, manifest)) as reader:
        names = _model_names(manifest)
        left_out: list[str] = []
        model = {name: _streamed(reader, saved) for name, saved in names.items()}
        content = {
            "model": model | _readable("model", _model_values(manifest), left_out),
            "optimizer": _torch_state(reader, manifest, left_out),
            "step": manifest.step,
            "extra": _readable("extra", manifest.decoded_extra(), left_out),
        }
        with _unfinished(out) as unfinished:
            write_torch_file(unfinished, content)
            publish(unfinished, out)
    words = _taken_by(manifest.optimizer)
    if left_out:
        listed = ", ".join(left_out)
        words += f", without {listed}, which torch.load(weights_only=True) does not read"
    return words


def export_dcp(path: Path, out: Path) -> str:
    """Write a checkpoint as a folder that `torch.distributed.checkpoint.load` reads.

    The keys are those of `{"model": model.state_dict(), "optimizer": OptimizerState(model,
    optimizer)}`, for any world. Boxes are read, verified and written one after the other.

    Returns:
        What loads it.

    Raises:
        CheckpointError: the checkpoint is damaged, or `out` exists.
    """
    _reject_existing(out)
    manifest = read_manifest(path)
    with closing(CheckpointReader(path, manifest)) as reader:
        plain = plain_text(manifest.step, manifest.format_version, manifest.optimizer.model_dump())
        state = {
            name: {key: _lazy(reader, saved) for key, saved in planes.items()}
            for name, planes in _state_names(manifest).items()
        }
        names = _model_names(manifest)
        content = {
            "model": {name: _lazy(reader, saved) for name, saved in names.items()}
            | _model_values(manifest),
            "optimizer": {"state": state, "plain": plain},
        }
        with _unfinished(out) as unfinished:
            _dcp_save(content, unfinished)
            publish(unfinished, out)
    return 'dcp.load({"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)})'


def _taken_by(optimizer: OptimizerEntry) -> str:
    """Say which of torch's optimizers goes on with a state, and what none of them has."""
    every = [group.options for group in optimizer.groups]
    decoupled = {bool(options.get("decoupled_weight_decay")) for options in every}
    words = "torch.optim.AdamW" if decoupled == {True} else "torch.optim.Adam"
    if any(options.get("nesterov") for options in every):
        words += ", which has no nesterov"
    return words


def _readable(where: str, values: Mapping[Any, Any], left_out: list[str]) -> dict[Any, Any]:
    """Return the values that `torch.load(weights_only=True)` reads; list others in `left_out`."""
    found = {}
    for key, value in values.items():
        with TemporaryDirectory() as folder:
            file = Path(folder, "value.pt")
            try:
                write_torch_file(file, value)
                torch.load(file, weights_only=True)
                found[key] = value
            except Exception:  # torch does not document which errors it raises
                left_out.append(f"{where}[{key!r}]")
    return found


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """Yield where to write what the body then publishes as `out`; remove it after an error."""
    remove_abandoned(out)
    unfinished = out.with_name(partial_name(out.name))
    try:
        yield unfinished
    except BaseException:
        discard(unfinished)
        raise


def _dcp_save(content: dict[str, Any], folder: Path) -> None:
    """Let torch write a folder, and find the error of ours in what it raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ", category=UserWarning)
        try:
            dcp.save(content, checkpoint_id=folder, no_dist=True)
        except CheckpointException as error:
            failure, _ = next(iter(error.failures.values()))
            raise failure from None


def _reject_existing(out: Path) -> None:
    if out.exists():
        raise CheckpointError(f"{out} exists, and is not written over: choose another name")


def _model_names(manifest: Manifest) -> dict[str, str]:
    """Return the tensors of the model's state dict by their names, tied ones under each."""
    own = {name: name for name in manifest.tensors if name.startswith(_MODEL)}
    return {name.removeprefix(_MODEL): saved for name, saved in (own | manifest.tied).items()}


def _model_values(manifest: Manifest) -> dict[str, Any]:
    """Return what of the model's state dict is no tensor, by its names there."""
    values = manifest.decoded_values()
    return {name.removeprefix(_MODEL): value for name, value in values.items()}


def _state_names(manifest: Manifest) -> dict[str, dict[str, str]]:
    """Return the saved planes of each parameter, by parameter and key."""
    found: dict[str, dict[str, str]] = {name: {} for name in manifest.optimizer.steps}
    for saved in manifest.tensors:
        name, _, key = saved.removeprefix(_OPTIMIZER).rpartition("/")
        if saved.startswith(_OPTIMIZER) and name in found:
            found[name][key] = saved
    return found


def _torch_state(
    reader: CheckpointReader, manifest: Manifest, left_out: list[str]
) -> dict[str, Any]:
    """Return a torch state dict, with master weights under a key that torch ignores."""
    planes = _state_names(manifest)
    plain = decoded_optimizer(manifest.optimizer.model_dump(), manifest.format_version)
    names: list[str] = []
    groups = []
    for number, group in enumerate(plain["groups"]):
        packed = list(range(len(names), len(names) + len(group["parameters"])))
        names += group["parameters"]
        options = _readable(f"param_groups[{number}]", group["options"], left_out)
        groups.append({**options, "params": packed, "param_names": group["parameters"]})
    whole = {
        packed: {
            "step": _step(name, manifest.optimizer.steps[name]),
            **{key: _streamed(reader, saved) for key, saved in planes[name].items()},
        }
        for packed, name in enumerate(names)
        if name in planes
    }
    packed_ids = {packed: packed for packed in whole}
    further = _readable("optimizer", plain["further"], left_out)
    return pack_full(groups, packed_ids, whole, further)


def _streamed(reader: CheckpointReader, saved: str) -> Streamed:
    """Return a saved tensor for torch's file, its dimensions as they lay in memory."""
    entry = reader.manifest.tensors[saved]
    strides, step = [0] * len(entry.shape), 1
    for dim in reversed(entry.order):
        strides[dim] = step
        step *= entry.shape[dim]
    dtype, shape = DTYPES[entry.dtype], tuple(entry.shape)
    return Streamed(saved, dtype, shape, tuple(strides), partial(reader.blocks, saved))


def _step(name: str, count: float) -> Streamed:
    """Return a step count as torch keeps it."""
    value = torch.tensor([count], dtype=torch.float32, device="cpu")
    return Streamed(f"step of {name}", value.dtype, (), (), lambda: [as_bytes(value)])


def _lazy(reader: CheckpointReader, saved: str) -> BoxTensor:
    """Return a saved tensor whose boxes are read when they are asked for."""
    entry = reader.manifest.tensors[saved]
    boxes = [piece.box for piece in entry.pieces]
    if not boxes:  # it has no elements
        boxes = [Box((0,) * len(entry.shape), tuple(entry.memory_shape))]
    sources = [
        BoxSource(logical_box(box, entry.order), partial(_read_box, reader, saved, box))
        for box in boxes
    ]
    return BoxTensor(entry.shape, DTYPES[entry.dtype], sources)


def _read_box(reader: CheckpointReader, saved: str, box: Box) -> torch.Tensor:
    entry = reader.manifest.tensors[saved]
    start, end = range_of_box(entry.memory_shape, box)
    flat = torch.empty(end - start, dtype=DTYPES[entry.dtype], device="cpu")
    reader.fill(saved, flat, start)
    return flat.view(box.sizes).permute(inverse_order(entry.order))


@dataclass(frozen=True, eq=False)
class Streamed:
    """A dense tensor on the host whose bytes come when they are written.

    key: two that have the same are one tensor, and share its memory again when they are loaded.
    strides: in elements, of a tensor whose elements lie together.
    blocks: yields views that together are all elements as they lie, each valid until the next.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    blocks: Callable[[], Iterable[memoryview]]

    @property
    def numel(self) -> int:
        """Its elements."""
        return prod(self.shape)


class _Storage(NamedTuple):
    number: int
    tensor: Streamed


class _Pickler(pickle.Pickler):
    """Pickles streamed tensors as torch pickles its own: a storage by name, and a view of it."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=_PICKLE_PROTOCOL)
        self.storages: dict[str, _Storage] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            obj = _in_memory(obj)
        if not isinstance(obj, Streamed):
            return NotImplemented
        storage = self.storages.setdefault(obj.key, _Storage(len(self.storages), obj))
        hooks: OrderedDict[int, Any] = OrderedDict()
        view = (storage, 0, obj.shape, obj.strides, False, hooks)
        return rebuild_tensor, view

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        tensor = obj.tensor
        return "storage", _STORAGES[tensor.dtype], str(obj.number), "cpu", tensor.numel


def _in_memory(tensor: torch.Tensor) -> Streamed:
    """Return a host tensor for the file; the pickler keeps it, so that its id stays its own."""
    whole = tensor.contiguous()
    data = whole.view(-1).view(torch.uint8).numpy().data if whole.numel() else b""
    return Streamed(
        f"in memory at {id(tensor)}",
        tensor.dtype,
        tuple(tensor.shape),
        whole.stride(),
        lambda: [memoryview(data)],
    )


def write_torch_file(path: Path, content: object) -> None:
    """Write what `torch.load(path, weights_only=True)` reads, with `mmap=True` as well.

    Args:
        content: plain values, mappings, sequences and tensors, with `Streamed` for large ones.

    Raises:
        OSError: it cannot be written.

    Source: PyTorch's notes on serialization; PKWARE, APPNOTE.TXT.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    with path.open("xb") as file:
        with ZipFile(file, "w") as archive:
            for name, text in (
                ("data.pkl", pickled.getvalue()),
                (".format_version", b"1"),
                (".storage_alignment", str(_ALIGNMENT_NBYTES).encode()),
                ("byteorder", sys.byteorder.encode()),
            ):
                _write_record(archive, file.tell(), name, len(text), [memoryview(text)])
            for number, tensor in pickler.storages.values():
                nbytes = tensor.numel * tensor.dtype.itemsize
                _write_record(archive, file.tell(), f"data/{number}", nbytes, tensor.blocks())
            _write_record(archive, file.tell(), "version", 2, [memoryview(b"3\n")])
        file.flush()
        os.fsync(file.fileno())


def _write_record(
    archive: ZipFile, start: int, name: str, nbytes: int, blocks: Iterable[memoryview]
) -> None:
    """Write one record at byte `start`, its content at a multiple of 64 bytes."""
    is_large = nbytes >= _LARGE_NBYTES
    record = ZipInfo(f"{_FOLDER}/{name}")
    record.CRC = 0  # until it is known; without one there is no header
    header_nbytes = len(record.FileHeader(is_large)) + _FIELD.size
    padding = -(start + header_nbytes) % _ALIGNMENT_NBYTES
    record.extra = _FIELD.pack(_PADDING_ID, padding) + bytes(padding)
    with archive.open(record, "w", force_zip64=is_large) as out:
        for block in blocks:
            out.write(block)


def import_torch_pickle(
    source: Path,
    target: Path,
    *,
    model_key: str = "model",
    optimizer_key: str = "optimizer",
    names: Sequence[str] | None = None,
) -> int:
    """Make a checkpoint of a file of `torch.save({"model": ..., "optimizer": ...})`.

    torch unpickles it with `weights_only=True`: tensors and plain values, no code of the file's.
    The state becomes float32, as it is here: fp32 is kept, bf16 and fp16 are widened, which is
    exact, and 16-bit weights become their own master weights.

    Args:
        names: of the optimizer's parameters in its order; None to take them from the file, where
            the optimizer was made of named parameters, or the model has no other tensors.

    Returns:
        The bytes of the tensors.

    Raises:
        CheckpointError: it is something else, or needs more than plain values to be unpickled;
            `target` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists: a checkpoint is never written over")
    model, optimizer = _read_torch_pickle(source, model_key, optimizer_key)
    model_tensors = {name: v for name, v in model.items() if isinstance(v, torch.Tensor)}
    tied = _tied(model_tensors)
    own = {name: value for name, value in model_tensors.items() if name not in tied}
    entry, state = _optimizer_state(optimizer, own, names)
    tensors = {f"model/{name}": value for name, value in own.items()} | state
    parts = [whole_part(name, value) for name, value in tensors.items()]
    plain = Manifest(
        format_version=FORMAT_VERSION,
        step=int(max(entry.steps.values(), default=0)),
        world_size=1,
        tensors={},
        files={},
        optimizer=entry,
        tied={f"model/{name}": f"model/{first}" for name, first in tied.items()},
        values={
            f"model/{name}": encode(value, name)
            for name, value in model.items()
            if name not in model_tensors
        },
        extra={},
    )
    with _unfinished(target) as unfinished:
        unfinished.mkdir(parents=True)
        file = RankFile(unfinished, rank_file_name(0, 1), parts)
        file.write(parts)
        commit_files(unfinished, target, manifest_of([file.finish()], plain))
    return sum(part.data.nbytes for part in parts)


def _read_torch_pickle(
    source: Path, model_key: str, optimizer_key: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Load a file and return the state dicts of the model and of the optimizer in it.

    Raises:
        CheckpointError: as `import_torch_pickle`.
    """
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be opened: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{source} is no file of tensors and plain values: {first}. What would run code of the "
            "file's is not loaded: save the two state dicts alone, where you trust the file"
        ) from error
    for key in (model_key, optimizer_key):
        if not isinstance(content, dict) or not isinstance(content.get(key), Mapping):
            has = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise CheckpointError(
                f"{source} has no state dict under {key!r}, but {has}: say which with --model-key "
                "and --optimizer-key"
            )
    model, optimizer = content[model_key], content[optimizer_key]
    if not {"state", "param_groups"} <= set(optimizer):
        raise CheckpointError(f"{optimizer_key!r} of {source} is no optimizer's state dict")
    return model, optimizer


def _tied(model: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return each further name of a tensor that stands under several, with the first one."""
    seen: dict[Any, str] = {}
    tied = {}
    for name, value in model.items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in seen:
            tied[name] = seen[place]
        seen.setdefault(place, name)
    return tied


def _optimizer_state(
    optimizer: Mapping[str, Any], model: Mapping[str, torch.Tensor], given: Sequence[str] | None
) -> tuple[OptimizerEntry, dict[str, torch.Tensor]]:
    """Return what of the optimizer is no tensor, and its tensors by their names here."""
    try:
        groups = list(optimizer["param_groups"])
        ids = [packed for group in groups for packed in group["params"]]
        names = dict(zip(ids, given or _names(groups, len(ids), model), strict=True))
        tensors: dict[str, torch.Tensor] = {}
        steps: dict[str, float] = {}
        entries = []
        for group in groups:
            _require_options(group)
            options = {key: value for key, value in group.items() if key not in _NO_OPTIONS}
            own = [names[packed] for packed in group["params"]]
            entries.append(GroupEntry(parameters=own, options=encode(options, "optimizer")))
            for packed, name in zip(group["params"], own, strict=True):
                saved = optimizer["state"].get(packed, {})
                steps[name] = float(saved.get("step", 0.0))
                tensors |= _planes(name, model[name], saved, amsgrad=bool(group["amsgrad"]))
        return OptimizerEntry(groups=entries, steps=steps, further={}), tensors
    except CheckpointError:
        raise
    except _MALFORMED as error:
        raise CheckpointError(f"not a state of torch's Adam or AdamW: {error!r}") from error


def _names(
    groups: Sequence[Mapping[str, Any]], count: int, model: Mapping[str, torch.Tensor]
) -> list[str]:
    """Return the names of the optimizer's parameters in its order."""
    if all("param_names" in group for group in groups):
        return [name for group in groups for name in group["param_names"]]
    if len(model) == count and len(groups) == 1:
        return list(model)
    raise CheckpointError(
        f"the optimizer has {count} parameters in {len(groups)} group(s) without names, and the "
        f"model {len(model)} tensors: give --names, a file with the name of one parameter a line, "
        "in the optimizer's order"
    )


def _require_options(group: Mapping[str, Any]) -> None:
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        if key not in group:
            raise CheckpointError(
                f"a group has no {key!r}: it was not saved by torch's Adam or AdamW"
            )


def _planes(
    name: str, weight: torch.Tensor, saved: Mapping[str, torch.Tensor], *, amsgrad: bool
) -> dict[str, torch.Tensor]:
    """Return one parameter's state, float32; what torch has not made yet is zero."""
    planes = {}
    for key in _PLANES if amsgrad else _PLANES[:2]:
        value = saved.get(key)
        if value is None:
            value = torch.zeros_like(weight, dtype=torch.float32)
        if value.shape != weight.shape or value.dtype not in _WIDENED:
            raise CheckpointError(
                f"{key} of {name!r} is {value.dtype} of shape {list(value.shape)}, and the weight "
                f"has shape {list(weight.shape)}: the state must be floats of that shape"
            )
        planes[key] = value
    if weight.dtype != torch.float32:
        planes["master_weight"] = weight
    return {f"optimizer/{name}/{key}": value.float() for key, value in planes.items()}
