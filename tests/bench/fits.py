"""`python -m tests.bench.fits [--write]`: the tables of docs/does-it-fit.md and README's plan.

Both are made by `offload-adam plan`. With --write, they replace those in the files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from offload_adam.layout.flat import ParameterSpec
from offload_adam.options import StateFormat
from offload_adam.plan.advice import fits
from offload_adam.plan.alternatives import compare
from offload_adam.plan.cards import CARDS
from offload_adam.plan.inputs import Machine, Training, typical_specs
from offload_adam.plan.setup import Fsdp2, Setup
from offload_adam.plan.shape import ModelShape
from offload_adam.units import format_count

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "does-it-fit.md"
README = ROOT / "README.md"
GIB = 2**30
SEQUENCE_LENGTH = 4096
HOST_NBYTES = 512 * GIB

MODELS = {
    "Llama 3.2 1B": ModelShape.transformer(
        num_layers=16, width=2048, mlp_width=8192, kv_width=512, vocabulary=128256, tied=True
    ),
    "Llama 3.2 3B": ModelShape.transformer(
        num_layers=28, width=3072, mlp_width=8192, kv_width=1024, vocabulary=128256, tied=True
    ),
    "Mistral 7B v0.3": ModelShape.transformer(
        num_layers=32, width=4096, mlp_width=14336, kv_width=1024, vocabulary=32768
    ),
    "Llama 3.1 8B": ModelShape.transformer(
        num_layers=32, width=4096, mlp_width=14336, kv_width=1024, vocabulary=128256
    ),
    "Qwen2.5 14B": ModelShape.transformer(
        num_layers=48, width=5120, mlp_width=13824, kv_width=1024, vocabulary=152064
    ),
    "Qwen2.5 32B": ModelShape.transformer(
        num_layers=64, width=5120, mlp_width=27648, kv_width=1024, vocabulary=152064
    ),
    "Llama 3.1 70B": ModelShape.transformer(
        num_layers=80, width=8192, mlp_width=28672, kv_width=1024, vocabulary=128256
    ),
}
SHOWN_CARDS = ("RTX-4090", "L40S", "A100-80GB", "H100", "H200", "B200")


def setup_of(
    specs: Sequence[ParameterSpec],
    shape: ModelShape,
    state_format: StateFormat,
    *,
    on_host: bool = False,
) -> Setup:
    """Return the setup of a bf16 model on one GPU, with activation checkpointing."""
    training = Training(
        shape=shape,
        sequence_length=SEQUENCE_LENGTH,
        checkpointing=True,
        state_format=state_format,
        saves=True,
    )
    return Setup(specs, training, Fsdp2(offload_weights=True) if on_host else None)


def setup_of_model(name: str, state_format: StateFormat, *, on_host: bool = False) -> Setup:
    """Return the setup of a model, whose parameters are one for each embedding and layer."""
    shape = MODELS[name]
    tables = 1 if shape.root_numel < 2 * shape.vocabulary * shape.width else 2
    sizes = [shape.vocabulary * shape.width] * tables + [shape.layer_numel] * shape.num_layers
    sizes.append(shape.numel - sum(sizes))
    specs = [
        ParameterSpec(i, size, 2, "bf16", is_bfloat16=True, follows_state_format=True)
        for i, size in enumerate(sizes)
    ]
    return setup_of(specs, shape, state_format, on_host=on_host)


def setup_of_size(numel: int, state_format: StateFormat, *, on_host: bool = False) -> Setup:
    """Return the setup of a typical transformer."""
    specs = typical_specs(numel, 2)
    return setup_of(specs, ModelShape.typical(numel), state_format, on_host=on_host)


def model_table() -> str:
    """Return the memory that each model needs on one GPU, as Markdown."""
    rows = [
        "| model | parameters | AdamW | 8-bit AdamW | offload_adam | weights in host memory | "
        "host: fp32 | bf16 | mixed | int8 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, shape in MODELS.items():
        setup = setup_of_model(name, "fp32")
        others = {row.name: row.device_nbytes for row in compare(setup, Machine())}
        on_host = setup_of_model(name, "fp32", on_host=True).predict().device_nbytes
        formats: tuple[StateFormat, ...] = ("fp32", "bf16", "mixed", "int8")
        cells = [
            format_count(shape.numel),
            *map(_gib, (others["AdamW"], others["8-bit AdamW"], others["offload_adam"], on_host)),
            *(_gib(setup_of_model(name, one).predict().host_nbytes) for one in formats),
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def card_table() -> str:
    """Return the largest model that each card trains, as Markdown."""
    rows = [
        "| card | usable GiB | AdamW | 8-bit AdamW | offload_adam | weights in host memory | "
        "weights in host memory, int8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for card in SHOWN_CARDS:
        machine = Machine(host_nbytes=HOST_NBYTES, device_nbytes=CARDS[card])

        def other(numel: int, name: str, machine: Machine = machine) -> bool:
            setup = setup_of_size(numel, "fp32")
            return any(row.name == name and row.fits for row in compare(setup, machine))

        def own(
            numel: int, state_format: StateFormat, on_host: bool, machine: Machine = machine
        ) -> bool:
            return fits(setup_of_size(numel, state_format, on_host=on_host), machine)

        cells = [
            _largest(lambda n: other(n, "AdamW")),
            _largest(lambda n: other(n, "8-bit AdamW")),
            _largest(lambda n: own(n, "fp32", False)),
            _largest(lambda n: own(n, "fp32", True)),
            _largest(lambda n: own(n, "int8", True)),
        ]
        rows.append(f"| {card} | {_gib(CARDS[card])} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plan_answer() -> str:
    """Return README's command and its answer, without the tables, as Markdown."""
    command = ["plan", "--params", "7B", "--gpu", "H100", "--host-memory", "512GB"]
    done = subprocess.run(
        [sys.executable, "-m", "offload_adam", *command],
        env={**os.environ, "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    answer = done.stdout.partition("Memory, in")[0]
    return f"```sh\noffload-adam {' '.join(command)}\n```\n\n```text\n{answer}```\n"


def _largest(fits: Callable[[int], bool]) -> str:
    """Return the largest number of parameters that fits, to a hundredth."""
    low, high = 0, 10**8
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(high // 200, 10**6):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return format_count(low)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:,.1f}"


def fit_section() -> str:
    """Return the generated part of docs/does-it-fit.md."""
    return (
        "A bf16 model on one GPU, all of it trained, with activation checkpointing and one "
        f"sequence of {SEQUENCE_LENGTH:,} tokens. In GiB: first the memory "
        f"of the GPU, then that of the host for each state format:\n\n{model_table()}\n\n"
        "The largest model for a card, with 512 GiB of host memory and the same settings:\n\n"
        f"{card_table()}\n\n"
        '"AdamW" keeps weights, gradients and moments in fp32 on the GPU. "8-bit AdamW" keeps '
        'weights in bf16 alone. "Weights in host memory" is [FSDP2 with its '
        "CPUOffloadPolicy](guides/larger-than-the-gpu.md) and this optimizer. Activations are an "
        "estimate. `python -m tests.bench.fits` makes these tables.\n"
    )


def replaced(text: str, marker: str, content: str) -> str:
    """Return a page with other content between two comments."""
    before, start, rest = text.partition(f"<!-- {marker} -->\n")
    _, end, after = rest.partition(f"<!-- /{marker} -->\n")
    if not start or not end:
        raise ValueError(f"the page has no <!-- {marker} -->")
    return f"{before}{start}{content}{end}{after}"


def main() -> None:
    """Print the tables, or write them into the documentation."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fits", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace those in the documentation")
    section = fit_section()
    if not parser.parse_args().write:
        print(section)
        return
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replaced(page, "fit table", section), encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    README.write_text(replaced(readme, "plan", plan_answer()), encoding="utf-8")


if __name__ == "__main__":
    main()
