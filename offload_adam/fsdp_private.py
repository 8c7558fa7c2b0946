"""Every private name of DTensor and FSDP2 (`fully_shard`) that this package uses.

FSDP2 has no public way to find the memory that it gathers from, or to wait before it gathers. The
names were tested with torch 2.11 and 2.13.

    FSDPParamGroup     the parameters that one `fully_shard` call gathers together
    FSDPParam          one of them: its DTensor, and `_sharded_param_data`, the memory that is
                       gathered. It is the local tensor with FSDP2's padding.

Importing DTensor takes half a second, so this file looks for it among the imported modules: without
an import there are no DTensors.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

# Without these names of a record, the parameters of FSDP2 are rejected.
_OF_MEMORY = (
    "_sharded_param_data",
    "sharded_param",
    "padded_sharded_param_size",
    "fsdp_placement",
    "pin_memory",
)
# Without these names of a group, nothing can wait before a gather: `step()` itself waits.
_OF_WAITS = ("unshard", "_training_state", "_all_gather_result", "is_unsharded")


def _imported(module: str, name: str) -> Any:
    """Return an object of a module of torch, None if nothing has imported the module."""
    return getattr(sys.modules.get(module), name, None)


def is_dtensor(tensor: object) -> bool:
    """Return whether a tensor is a DTensor, which FSDP2 or tensor parallelism has sharded."""
    dtensor = dtensor_type()
    return dtensor is not None and isinstance(tensor, dtensor)


def dtensor_type() -> type | None:
    """Return the class DTensor, None if nothing has imported it."""
    found: type | None = _imported("torch.distributed.tensor", "DTensor")
    return found


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor without a copy; a plain tensor is returned as it is.

    Unlike `to_local()`, it returns the tensor itself, with its own version counter, and no view.
    """
    if not is_dtensor(tensor):
        return tensor
    held: Any = tensor
    local: torch.Tensor = held._local_tensor
    return local


def placement_of(tensor: torch.Tensor) -> str:
    """Return how a DTensor is placed and the sizes of its mesh as text, "whole" if it is none."""
    if not is_dtensor(tensor):
        return "whole"
    held: Any = tensor
    return f"{held.placements} on {list(held.device_mesh.shape)} ranks"


def num_sharing(tensor: torch.Tensor) -> int:
    """Return the number of ranks of a DTensor's mesh, 0 for a plain tensor."""
    held: Any = tensor
    return int(held.device_mesh.size()) if is_dtensor(tensor) else 0


def replace_local(parameter: torch.Tensor, local: torch.Tensor) -> None:
    """Let a DTensor that FSDP2 does not manage have another local tensor."""
    held: Any = parameter
    held._local_tensor = local


def as_dtensor(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a DTensor with the mesh, placements and shape of `like`, whose local part is `local`.

    Args:
        local: on any device. `DTensor.from_local` would move it to the device of the mesh. It may
            have more dimensions than `like` at its end, or fewer; the result then has its last
            dimensions instead of those of `like`.
    """
    given: Any = like
    spec_type = type(given._spec)
    shared = min(local.dim(), like.dim())
    shape = (*like.shape[:shared], *local.shape[shared:])
    # The strides of the shared dimensions count the elements of the others.
    old_size, new_size = math.prod(like.shape[shared:]), math.prod(shape[shared:])
    strides = [stride // old_size * new_size for stride in like.stride()[:shared]]
    meta = given._spec.tensor_meta._replace(
        dtype=local.dtype,
        shape=torch.Size(shape),
        stride=(*strides, *local.stride()[shared:]),
    )
    spec = spec_type(given.device_mesh, given.placements, tensor_meta=meta)
    made: torch.Tensor = type(given)(local, spec, requires_grad=False)
    return made


def local_gradient(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a gradient, as the parameter is placed.

    Collective if the gradient is placed otherwise: that of a parameter with a copy on each rank may
    be a sum whose terms are on the ranks.
    """
    if not is_dtensor(gradient):
        return gradient
    given, owner = _as_any(gradient), _as_any(parameter)
    if given.placements != owner.placements:
        given = given.redistribute(owner.device_mesh, owner.placements)
    local: torch.Tensor = given.to_local()
    return local


def part_of_whole(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor that every rank has whole. Not collective.

    Args:
        whole: of the shape of the DTensor `parameter`.
    """
    part = whole
    for dim in range(whole.dim()):
        indices = indices_of_part(parameter, dim)
        if indices is not None:
            part = part.index_select(dim, indices.to(whole.device))
    return part


def largest_part(parameter: torch.Tensor) -> int:
    """Return the number of elements of the largest part of a DTensor that any rank has."""
    owner = _as_any(parameter)
    sizes = list(owner.shape)
    for placed, num_ranks in zip(owner.placements, owner.device_mesh.shape, strict=True):
        if not placed.is_replicate():
            sizes[placed.dim] = -(-sizes[placed.dim] // num_ranks)
    return math.prod(sizes)


def indices_of_part(parameter: torch.Tensor, dim: int) -> torch.Tensor | None:
    """Return which indices along a dimension this rank's part of a DTensor has. Not collective.

    Returns:
        (n,) int64 on the host, in the order of the local tensor; None if the part has all.
    """
    owner = _as_any(parameter)
    if not any(placed.is_shard(dim) or _is_strided(placed, dim) for placed in owner.placements):
        return None
    # By distributing the indices themselves.
    distribute = _imported("torch.distributed.tensor", "distribute_tensor")
    placements = [_along_one_dim(placed, dim) for placed in owner.placements]
    size, device = parameter.shape[dim], owner.device_mesh.device_type
    indices = torch.arange(size, dtype=torch.int64, device=device)
    own = distribute(indices, owner.device_mesh, placements, src_data_rank=None)
    local: torch.Tensor = own.to_local().cpu()
    return local


def _is_strided(placed: Any, dim: int) -> bool:
    return type(placed).__name__ == "_StridedShard" and placed.dim == dim


def _along_one_dim(placed: Any, dim: int) -> Any:
    """Return a placement of a tensor as that of a 1-d tensor of the indices along `dim`."""
    replicate = _imported("torch.distributed.tensor", "Replicate")
    if _is_strided(placed, dim):
        return type(placed)(0, split_factor=placed.split_factor)
    shard = _imported("torch.distributed.tensor", "Shard")
    return shard(0) if placed.is_shard(dim) else replicate()


def _as_any(value: Any) -> Any:
    return value


class FsdpParameter:
    """FSDP2's record of one parameter: where the memory is that it gathers."""

    def __init__(self, record: Any) -> None:
        self._record = weakref.ref(record)  # the record refers to the model

    @property
    def sharded(self) -> torch.Tensor | None:
        """The DTensor that the model has for the parameter now; None if the model is gone."""
        record = self._record()
        found: torch.Tensor | None = None if record is None else record.sharded_param
        return found

    @property
    def number(self) -> int | None:
        """Number that the plain parameter has as well, None before torch 2.12."""
        return getattr(self._record(), "_orig_param_uid", None)

    @property
    def is_offloaded(self) -> bool:
        """Whether `CPUOffloadPolicy` keeps the parameter in host memory."""
        record = self._record()
        return record is not None and bool(record.offload_to_cpu)

    @property
    def padded_numel(self) -> int:
        """Elements that FSDP2 gathers from this rank, with its padding."""
        record = self._record()
        assert record is not None
        return int(torch.Size(record.padded_sharded_param_size).numel())

    @property
    def is_gathered_from_local(self) -> bool:
        """Whether FSDP2 gathers the parameter from the memory of its local tensor."""
        record = self._record()
        if record is None:
            return True
        gathered, local = record._sharded_param_data, record.sharded_param._local_tensor
        # Of the storages: an empty part has no address of its own.
        return bool(gathered.untyped_storage().data_ptr() == local.untyped_storage().data_ptr())

    def move_to(self, memory: torch.Tensor, *, copies: bool = True) -> None:
        """Let FSDP2 gather from `memory`.

        Args:
            memory: (padded_numel,) with a storage of its own.
            copies: copy the present values to it first.
        """
        record = self._record()
        assert record is not None
        parameter = record.sharded_param
        local = parameter._local_tensor
        dim = record.fsdp_placement.dim
        length = local.size(dim) if local.numel() > 0 else 0
        view = memory.view(record.padded_sharded_param_size).narrow(dim, 0, length)
        if copies:
            view.copy_(local)
        # `memory` is not page-locked. FSDP2 would put a page-locked copy in the place of the local
        # tensor. In torch 2.11 it also calls hooks before the gradient's D2H copy is complete.
        record.pin_memory = False
        record._sharded_param_data = memory
        parameter._local_tensor = view


class FsdpGroup:
    """The parameters that one `fully_shard` call gathers together."""

    def __init__(self, group: Any, state: Any) -> None:
        self._group = weakref.ref(group)  # the group refers to the model
        self._state = weakref.ref(state)
        self.parameters = [FsdpParameter(record) for record in group.fsdp_params]

    def __eq__(self, other: object) -> bool:
        """Compare the groups of FSDP2."""
        return isinstance(other, FsdpGroup) and self._group == other._group

    def __hash__(self) -> int:
        """Hash by the group of FSDP2."""
        return hash(self._group)

    @property
    def lacks(self) -> str | None:
        """A name that this package needs and this version of FSDP2 lacks, None if none."""
        group = self._group()
        assert group is not None
        missing = [n for n in _OF_MEMORY for r in group.fsdp_params[:1] if not hasattr(r, n)]
        return missing[0] if missing else None

    @property
    def can_wait(self) -> bool:
        """Whether `call_before_unshard` works with this version of FSDP2."""
        group = self._group()
        return group is None or all(hasattr(group, name) for name in _OF_WAITS)

    @property
    def computes_on_device(self) -> bool:
        """Whether layers compute on a device, also if `CPUOffloadPolicy` keeps them on the host."""
        group = self._group()
        return group is not None and bool(group.device.type != "cpu")

    @property
    def streams_and_tree(self) -> tuple[int, int]:
        """Identities of the streams on which the group is gathered, and of its tree of modules.

        Before the first forward, each module is a tree with streams of its own.
        """
        state = self._state()
        return id(getattr(state, "_comm_ctx", state)), id(getattr(state, "_state_ctx", state))

    @property
    def replicates(self) -> bool:
        """Whether this is torch's `replicate()`, which shards nothing."""
        group = self._group()
        return group is not None and not hasattr(group.mesh_info, "shard_mesh_size")

    @property
    def replicas(self) -> tuple[int, ...]:
        """The ranks of the default group that have the same parts as this one; empty if none."""
        group = self._group()
        if group is None or not hasattr(group.mesh_info, "replicate_process_group"):
            return ()
        return tuple(dist.get_process_group_ranks(group.mesh_info.replicate_process_group))

    @property
    def reshards_to_other_mesh(self) -> bool:
        """Whether `reshard_after_forward` is a number of ranks other than that of the mesh."""
        group = self._group()
        return group is not None and bool(group._use_post_forward_mesh)

    def gathered_parameters(self) -> list[torch.Tensor]:
        """Return the plain parameters that the model has while this group is gathered."""
        group = self._group()
        if group is None or not getattr(group, "is_unsharded", False):
            return []
        return [record._unsharded_param for record in group.fsdp_params]

    def reshard(self) -> None:
        """Drop what was gathered, so that the next use gathers the updated parameters.

        An evaluation between backward and step, or `set_reshard_after_backward(False)`, leaves a
        group gathered. An explicit `unshard(async_op=True)` may be pending.
        """
        group = self._group()
        if group is None:
            return
        if getattr(group, "_all_gather_result", None) is not None:
            group.wait_for_unshard()
        if not getattr(group, "is_sharded", False):
            group.reshard()

    def call_before_unshard(self, action: Callable[[], None]) -> Callable[[], None]:
        """Call `action` before each gather of this group; return a function that ends this.

        Every gather goes through the group's `unshard`: the forward, the backward, prefetches and
        calls by the user.

        Args:
            action: called while the streams that will read are current on their devices. Not called
                if the group is gathered already, so that nothing will be read.
        """
        group = self._group()
        assert group is not None
        owner = self._group
        wrapper = vars(group).get("unshard")
        if not isinstance(wrapper, _Unshard):  # it is that of another optimizer otherwise
            wrapper = group.unshard = _Unshard(group, wrapper)
        wrapper.actions.append(action)

        def end() -> None:
            wrapper.actions.remove(action)
            current = owner()
            if not wrapper.actions and current is not None and wrapper is current.unshard:
                del current.unshard
                if wrapper.before is not None:
                    current.unshard = wrapper.before

        return end


class _Unshard:
    """Takes the place of a group's `unshard`: first calls the actions of all optimizers.

    Args:
        before: what another library has put in that place; None if nothing.
    """

    def __init__(self, group: Any, before: Callable[[bool], None] | None) -> None:
        self._group = weakref.ref(group)  # a bound method would keep the model alive
        self.before = before
        self.actions: list[Callable[[], None]] = []

    def __call__(self, async_op: bool = False) -> None:
        group = self._group()
        assert group is not None
        reads = not (group.is_unsharded or group._all_gather_result is not None)
        for stream in _reading_streams(group, async_op) if reads else ():
            with stream:
                for action in self.actions:
                    action()
        if self.before is None:
            type(group).unshard(group, async_op)
        else:
            self.before(async_op)


def _reading_streams(group: Any, async_op: bool) -> Iterator[AbstractContextManager[Any]]:
    """Yield, as contexts in which they are current, the streams on which a gather reads."""
    if group.device.type == "cpu":
        yield nullcontext()
        return
    mesh_info = group.mesh_info
    if mesh_info.shard_mesh_size == 1:  # `wait_for_unshard` copies on the current stream
        yield nullcontext()
        return
    context = group.comm_ctx
    copy_in, _ = context.get_all_gather_streams(async_op, group._training_state)
    yield group.device_handle.stream(copy_in)


def sharded_since(parameters: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return the DTensors into which `fully_shard` has turned plain parameters, by their ids.

    Before torch 2.12, FSDP2 does not remember which parameter was which, and the result is empty.
    """
    numbers = {
        parameter._fsdp_orig_uid: id(parameter)
        for parameter in parameters
        if hasattr(parameter, "_fsdp_orig_uid") and not is_dtensor(parameter)
    }
    found = {}
    for group in fsdp_groups() if numbers else ():
        for record in group.parameters:
            sharded, number = record.sharded, record.number
            if sharded is not None and number in numbers:
                found[numbers[number]] = sharded
    return found


def fsdp_groups() -> list[FsdpGroup]:
    """Return the groups of all models of this process that `fully_shard` has sharded."""
    states = _imported("torch.distributed._composable_state", "_module_state_mapping") or {}
    found: dict[int, FsdpGroup] = {}
    for reference in list(states.values()):
        state = reference() if isinstance(reference, weakref.ref) else reference
        groups: Sequence[Any] = getattr(state, "_fsdp_param_groups", None) or [
            getattr(state, "_fsdp_param_group", None)  # before torch 2.12
        ]
        for group in groups:
            if group is not None and hasattr(group, "fsdp_params") and id(group) not in found:
                found[id(group)] = FsdpGroup(group, state)
    return list(found.values())
