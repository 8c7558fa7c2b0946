"""What other optimizers need for the same model, to compare with a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from offload_adam.plan.inputs import Machine, total_numel
from offload_adam.plan.setup import Fsdp2, Setup


@dataclass(frozen=True, slots=True)
class Alternative:
    """An optimizer, and the bytes that a run with it needs.

    weights, moments: precision of the weights that it updates, and of their moments.
    fits: None if a memory that decides it is not known.
    """

    name: str
    weights: str
    moments: str
    device_nbytes: int
    host_nbytes_of_node: int
    fits: bool | None


# Bytes a trained parameter: on the GPU, on the host.
_OTHERS = (
    # The weight, its gradient and two moments in fp32; the model computes under autocast.
    ("AdamW", "fp32", "fp32", 16, 0),
    ("AdamW, bf16", "bf16", "bf16", 8, 0),
    # The weight and its gradient in bf16, and two moments in 8 bits.
    ("8-bit AdamW", "bf16", "8 bits", 6, 0),
    # All four in fp32. Only gathered layers are on the GPU, in bf16.
    ("FSDP2's CPUOffloadPolicy", "fp32", "fp32", 0, 16),
)
_PRECISIONS = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("fp32", "bf16"),
    "mixed": ("24 bits", "bf16, 8 bits"),
    "int8": ("24 bits", "8 bits"),
}


def compare(setup: Setup, machine: Machine) -> list[Alternative]:
    """Return what other optimizers need, and last what this setup does; none without a GPU.

    With more than one rank, FSDP2 shards the model and the state of the others. Activations, frozen
    parameters and CUDA's memory are those of this setup.
    """
    training = setup.training
    if not training.on_device or training.sharded:
        return []
    num_ranks, local = training.world_size, training.local_world_size
    numel, itemsize = total_numel(setup.specs), max(spec.itemsize for spec in setup.specs)
    shape = training.shape
    gathered = 0 if shape is None else itemsize * (shape.root_numel + 4 * shape.layer_numel)
    run = training.activation_nbytes + training.context_nbytes
    rows = []
    for name, weights, moments, on_device, on_host in _OTHERS:
        frozen = -(-training.frozen_nbytes // num_ranks)
        device = -(-numel * on_device // num_ranks) + run
        host = -(-numel * on_host // num_ranks)
        if on_host:
            host += frozen
        else:
            device += frozen
        if on_host or num_ranks > 1:
            device += gathered
        if num_ranks > 1 and not on_host:
            name = f"{name}, FSDP2"
        rows.append(_row((name, weights, moments), device, host * local, machine))
    own = [setup]
    if num_ranks > 1 and setup.fsdp2 is None:
        own.append(replace(setup, fsdp2=Fsdp2()))
    for one in own:
        plan = one.predict()
        name = "offload_adam" if one.fsdp2 is None else "offload_adam, FSDP2"
        weights, moments = _PRECISIONS[training.state_format]
        if not any(spec.is_bfloat16 for spec in setup.specs):
            weights = "fp32"  # of other parameters, master weights have all bits
        words = (name, weights, moments)
        rows.append(_row(words, plan.device_nbytes, plan.host_nbytes * local, machine))
    return rows


def _row(words: tuple[str, str, str], device: int, host: int, machine: Machine) -> Alternative:
    limits = ((device, machine.device_nbytes), (host, machine.host_nbytes))
    if any(limit is not None and need > limit for need, limit in limits):
        fits: bool | None = False
    elif any(limit is None and need > 0 for need, limit in limits):
        fits = None
    else:
        fits = True
    return Alternative(*words, device, host, fits)
