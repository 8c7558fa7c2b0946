"""`python -m tests.bench.predict`: the times of `bench train` on a machine with given speeds.

The predictions follow the model of `offload-adam plan`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from offload_adam.bench.__main__ import whole_numbers
from offload_adam.bench.report import write_json
from offload_adam.bench.training.contenders import MODEL_ALONE, OVERLAPPED, PLAIN, SEQUENTIAL
from offload_adam.bench.training.model import Decoder, Sizes, add_size_options, read_sizes
from offload_adam.bench.training.results import GIB
from offload_adam.layout.flat import ParameterSpec
from offload_adam.plan.inputs import Machine, Training, total_numel
from offload_adam.plan.prediction import predict
from offload_adam.plan.timing import GB, predict_overlap, predict_time, update_nbytes

PLAIN_PASSES = 10
"""Elements that plain AdamW moves on the device for each parameter. The norm reads the gradient,
clipping reads and writes it, and the update reads four tensors and writes three."""


def predict_train(
    sizes: Sizes,
    batches: Sequence[int],
    *,
    host_gb_per_s: Sequence[float],
    bus_gb_per_s: float,
    device_gb_per_s: float,
    tera_flops: float,
) -> dict[str, Any]:
    """Return predicted times of this package, plain AdamW and the model alone, a JSON object.

    Args:
        batches: numbers of sequences.
        host_gb_per_s: bandwidths of host memory, each predicted for each batch.
        bus_gb_per_s: bandwidth of copies in one direction.
        device_gb_per_s: bandwidth of GPU memory.
        tera_flops: speed of forward and backward, 1e12 operations a second.
    """
    specs = _specs(sizes)
    held = predict(specs, Training())
    machines = [
        Machine(host_gb_per_s=host, bus_gb_per_s=bus_gb_per_s, tera_flops=tera_flops)
        for host in host_gb_per_s
    ]
    plain_s = PLAIN_PASSES * specs[0].itemsize * total_numel(specs) / GB / device_gb_per_s
    return {
        "benchmark": "predict",
        "model": {**asdict(sizes), "num_parameters": total_numel(specs)},
        "bus_gb_per_s": bus_gb_per_s,
        "device_gb_per_s": device_gb_per_s,
        "tera_flops": tera_flops,
        "host_gib": held.host_nbytes / GIB,
        "num_buckets": held.num_buckets,
        "points": [
            _point(specs, machine, batch, batch * sizes.sequence_length, plain_s)
            for batch in batches
            for machine in machines
        ],
    }


def _specs(sizes: Sizes) -> list[ParameterSpec]:
    """Return the model's parameters in their order, without allocating them."""
    with torch.device("meta"):
        model = Decoder(sizes)
    itemsize = sizes.torch_dtype.itemsize
    return [
        ParameterSpec(index, parameter.numel(), itemsize, sizes.dtype)
        for index, parameter in enumerate(model.parameters())
    ]


def _point(
    specs: Sequence[ParameterSpec], machine: Machine, batch: int, num_tokens: int, plain_s: float
) -> dict[str, Any]:
    """Return the times of one batch on one machine, in milliseconds.

    `plan` assumes a backward of twice the forward's length. This model recomputes its blocks in
    backward, which adds one more forward. The exposed time stays the same, since only the next
    forward hides updates.
    """
    training = Training(num_tokens=num_tokens)
    timeline = predict_overlap(specs, training, machine)
    timing = predict_time(specs, training, machine)
    assert timeline is not None
    assert timing is not None
    assert machine.host_gb_per_s is not None
    forward_s = timeline.model_s / 3
    alone_s = 4 * forward_s
    sequential_s = timing.total_s - timing.seconds["compute"]
    exposed_s = {
        MODEL_ALONE: 0.0,
        OVERLAPPED: timeline.exposed_s,
        SEQUENTIAL: sequential_s,
        PLAIN: plain_s,
    }
    return {
        "num_sequences": batch,
        "host_gb_per_s": machine.host_gb_per_s,
        "forward_ms": _ms(forward_s),
        "forward_backward_ms": _ms(alone_s),
        "update_ms": _ms(update_nbytes(specs, training) / GB / machine.host_gb_per_s),
        "contenders": {
            name: {"step_ms": _ms(alone_s + seconds), "exposed_ms": _ms(seconds)}
            for name, seconds in exposed_s.items()
        },
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the predictions for a model and a machine."""
    parser = argparse.ArgumentParser(description="Predict the times of `bench train`.")
    add = parser.add_argument
    add_size_options(parser)
    add("--batches", required=True, type=whole_numbers, help="numbers of sequences: 48,144")
    add("--host-bandwidths", required=True, metavar="GB/S", help="of host memory: 60,100,150")
    add("--bus-bandwidth", required=True, type=float, metavar="GB/S", help="in one direction")
    add("--device-bandwidth", required=True, type=float, metavar="GB/S", help="of GPU memory")
    add("--tflops", required=True, type=float, help="speed of forward and backward, in TFLOP/s")
    add("--json", required=True, type=Path, help="write the predictions here")
    options = parser.parse_args(arguments)
    try:
        host_gb_per_s = [float(word) for word in options.host_bandwidths.split(",")]
        sizes = read_sizes(options)
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    found = predict_train(
        sizes,
        options.batches,
        host_gb_per_s=host_gb_per_s,
        bus_gb_per_s=options.bus_bandwidth,
        device_gb_per_s=options.device_bandwidth,
        tera_flops=options.tflops,
    )
    write_json(found, options.json)


if __name__ == "__main__":
    main()
