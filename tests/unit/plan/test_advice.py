"""What a plan advises makes it fit, and needs no more than it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload_adam import OffloadPolicy
from offload_adam.plan.advice import DEVICE, HOST, Need, advise, fits, needs_of
from offload_adam.plan.alternatives import compare
from offload_adam.plan.cards import CARDS, find_card
from offload_adam.plan.inputs import Machine, Training, synthetic_specs
from offload_adam.plan.setup import Fsdp2, Setup
from offload_adam.plan.shape import CONTEXT_NBYTES, ModelShape
from offload_adam.units import format_count

GIB = 2**30


def setup_of(numel: int, *, itemsize: int = 2, **fields: object) -> Setup:
    training = Training(
        shape=ModelShape.typical(numel),
        sequence_length=2048,
        **fields,  # type: ignore[arg-type]
    )
    return Setup(synthetic_specs(numel, itemsize), training)


def changed(setup: Setup, changes: tuple[str, ...]) -> Setup:
    """Return the setup with advised changes, which are read from their text."""
    for change in changes:
        name, _, value = change.partition("=")
        if name == "state_format":
            setup = setup.with_training(state_format=value.strip('"'))
        elif change == "activation checkpointing":
            setup = setup.with_training(checkpointing=True)
        elif change.startswith("microbatches of "):
            setup = setup.with_training(batch_size=int(change.split()[-1]))
        elif change == "FSDP2 (fully_shard)":
            setup = setup.with_training(reduce_fp32=False, accumulates=False)
            setup = replace(setup, fsdp2=Fsdp2())
        elif change == "FSDP2's CPUOffloadPolicy":
            setup = replace(setup, fsdp2=Fsdp2(offload_weights=True))
        elif name in ("bucket_nbytes", "snapshot_buffer_nbytes"):
            setup = replace(setup, training=setup.training.with_offload(**{name: int(value)}))
        elif name == "offload_fraction":
            setup = replace(setup, training=setup.training.with_offload(offload_fraction=1.0))
        elif change == "a bf16 model":
            halves = [replace(spec, itemsize=2, is_bfloat16=True) for spec in setup.specs]
            assert setup.training.shape is not None
            smaller = replace(setup.training.shape, itemsize=2)
            setup = replace(setup, specs=halves).with_training(shape=smaller)
        elif change.endswith("ranks)"):
            setup = setup.with_training(world_size=int(change.split("(")[1].split()[0]))
        elif name == "amsgrad":
            setup = setup.with_training(amsgrad=False)
        elif change == "module=model (streaming)":
            setup = setup.with_training(streams=True)
        elif name == "accumulate":
            setup = setup.with_training(accumulates=False)
        elif name == "reduce_dtype":
            setup = setup.with_training(reduce_fp32=False)
        elif name == "keep":
            setup = replace(setup, training=setup.training.with_offload(keep="none"))
        else:
            raise AssertionError(change)
    return setup


CASES = {
    "host": (setup_of(8 * 10**9), Machine(host_nbytes=64 * GIB, device_nbytes=80 * GIB)),
    "GPU": (setup_of(8 * 10**9), Machine(host_nbytes=512 * GIB, device_nbytes=22 * GIB)),
    "both": (setup_of(8 * 10**9), Machine(host_nbytes=60 * GIB, device_nbytes=22 * GIB)),
    "batch": (
        setup_of(8 * 10**9, batch_size=16),
        Machine(host_nbytes=512 * GIB, device_nbytes=80 * GIB),
    ),
    "ranks": (
        setup_of(70 * 10**9, world_size=8, local_world_size=8),
        Machine(host_nbytes=2048 * GIB, device_nbytes=80 * GIB),
    ),
    "nodes": (
        setup_of(70 * 10**9, world_size=8, local_world_size=8),
        Machine(host_nbytes=256 * GIB, device_nbytes=80 * GIB),
    ),
    "share": (
        setup_of(8 * 10**9, offload=OffloadPolicy(offload_fraction=0.5)),
        Machine(host_nbytes=512 * GIB, device_nbytes=60 * GIB),
    ),
    "snapshot": (
        setup_of(10**9, offload=OffloadPolicy(snapshot_buffer_nbytes=4 * GIB)),
        Machine(host_nbytes=15 * GIB, device_nbytes=60 * GIB),
    ),
    "kept": (
        setup_of(10**9, on_device=False, offload=OffloadPolicy(keep="shared"), checkpointing=True),
        Machine(host_nbytes=int(16.35 * GIB)),
    ),
    "amsgrad": (
        setup_of(10**9, amsgrad=True, checkpointing=True),
        Machine(host_nbytes=15 * GIB, device_nbytes=60 * GIB),
    ),
    "gradients": (
        setup_of(10**9, world_size=2, accumulates=True, reduce_fp32=True, streams=False),
        Machine(host_nbytes=200 * GIB, device_nbytes=12 * GIB),
    ),
    "fp32": (
        setup_of(10**9, itemsize=4, on_device=False, checkpointing=True),
        Machine(host_nbytes=14 * GIB),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_advised_changes_make_it_fit_and_none_can_be_left_out(name: str) -> None:
    setup, machine = CASES[name]
    assert not fits(setup, machine)
    advice = advise(setup, machine)
    assert advice
    for one in advice:
        assert len(one.changes) == len(one.costs)
        then = changed(setup, one.changes)
        assert fits(then, machine)
        plan = then.predict()
        assert one.device_nbytes == plan.device_nbytes
        assert one.host_nbytes_of_node == plan.host_nbytes * then.training.local_world_size
        # What is advised for a GPU leaves a twentieth of it.
        if machine.device_nbytes is not None:
            assert plan.device_nbytes <= 0.95 * machine.device_nbytes
    if len(advice[0].changes) > 1:
        strict = machine
        if machine.device_nbytes is not None:
            strict = replace(machine, device_nbytes=int(0.95 * machine.device_nbytes))
        for left_out in advice[0].changes:
            rest = tuple(change for change in advice[0].changes if change != left_out)
            assert not fits(changed(setup, rest), strict), left_out


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("host", ('state_format="mixed"',)),  # 64 GB; bf16 needs 80 GB, and 64 GiB are 69 GB
        ("GPU", ("activation checkpointing",)),
        ("batch", ("microbatches of 4",)),
        ("share", ("offload_fraction=1",)),
        ("snapshot", ("snapshot_buffer_nbytes=0",)),
    ],
)
def test_the_cheapest_change_comes_first(name: str, first: tuple[str, ...]) -> None:
    setup, machine = CASES[name]
    assert advise(setup, machine)[0].changes == first


FORMATS = ("fp32", "bf16", "mixed", "int8")


@pytest.mark.parametrize("host_gib", [50, 60, 80, 100, 104, 105, 106, 120])
def test_advice_is_found_wherever_some_change_fits(host_gib: int) -> None:
    """Also if moving weights to the host takes as much of it as the GPU lacks."""
    setup = setup_of(8 * 10**9)
    for device_gib in range(8, 50, 2):
        machine = Machine(host_nbytes=host_gib * GIB, device_nbytes=device_gib * GIB)
        if fits(setup, machine):
            continue
        strict = replace(machine, device_nbytes=int(0.95 * device_gib * GIB))
        combined = [
            replace(
                setup.with_training(state_format=state_format, checkpointing=checkpointing),
                fsdp2=Fsdp2(offload_weights=True) if on_host else None,
            )
            for state_format in FORMATS
            for checkpointing in (False, True)
            for on_host in (False, True)
        ]
        if any(fits(one, strict) for one in combined):
            advice = advise(setup, machine)
            assert advice, (host_gib, device_gib)
            assert all(fits(changed(setup, one.changes), strict) for one in advice)


def test_weights_on_the_host_leave_a_share_of_state_on_the_gpu_without_meaning() -> None:
    """State in low precision needs `offload_fraction=1` first."""
    setup = setup_of(7 * 10**9, offload=OffloadPolicy(offload_fraction=0.5))
    setup = replace(setup, fsdp2=Fsdp2(offload_weights=True))
    machine = Machine(host_nbytes=70 * GIB, device_nbytes=80 * GIB)
    together, nodes = advise(setup, machine)
    assert together.changes == ("offload_fraction=1", 'state_format="bf16"')
    assert nodes.changes == ("2 nodes (2 ranks)",)


def test_what_fits_needs_no_advice_and_what_cannot_fit_gets_none() -> None:
    setup = setup_of(10**9)
    assert advise(setup, Machine(host_nbytes=100 * GIB, device_nbytes=80 * GIB)) == []
    assert advise(setup, Machine(host_nbytes=10**6, device_nbytes=10**6)) == []


def test_needs_say_how_much_is_missing() -> None:
    setup = setup_of(10**9)
    gpu, host = needs_of(setup, Machine(host_nbytes=10 * GIB))
    assert gpu == Need(DEVICE, setup.predict().device_nbytes, None)
    assert gpu.is_met
    assert gpu.missing_nbytes == 0
    assert host.memory == HOST
    assert not host.is_met
    assert host.missing_nbytes == setup.predict().host_nbytes - 10 * GIB


def test_fsdp2_divides_parameters_and_state_of_a_rank() -> None:
    whole = setup_of(10 * 10**9, world_size=8, local_world_size=8)
    sharded = replace(whole, fsdp2=Fsdp2())
    copies = replace(whole, fsdp2=Fsdp2(replicate=2))
    on_host = replace(whole, fsdp2=Fsdp2(offload_weights=True))
    for setup, device, host in (
        (whole, 2 * 10**10, 14 * 10**10 / 8),
        (sharded, 2 * 10**10 / 8, 14 * 10**10 / 8),
        (copies, 2 * 10**10 / 4, 14 * 10**10 / 8),
        (on_host, 0, (2 + 12 + 2) * 10**10 / 8),
    ):
        plan = setup.predict()
        assert plan.device.get("parameters", 0) == pytest.approx(device, rel=0.01)
        state = sum(plan.host[key] for key in ("master_weight", "exp_avg", "exp_avg_sq"))
        kept = plan.host.get("parameters", 0) + plan.host.get("gradient shards", 0)
        kept += plan.host.get("gradients", 0)
        assert state + kept == pytest.approx(host, rel=0.03)
        shape = setup.training.shape
        assert shape is not None
        gathered = 0 if setup is whole else 2 * (shape.root_numel + 4 * shape.layer_numel)
        assert plan.device.get("gathered by FSDP2", 0) == gathered
    # Tokens and CUDA need the same, wherever the weights are.
    for key in ("activations", "CUDA context"):
        assert len({setup.predict().device[key] for setup in (whole, sharded, on_host)}) == 1


def test_frozen_parameters_take_their_own_bytes_alone() -> None:
    setup = setup_of(10**8, frozen_nbytes=14 * 10**9, world_size=2, local_world_size=2)
    alone = setup_of(10**8, world_size=2, local_world_size=2)
    assert setup.predict().device_nbytes - alone.predict().device_nbytes == 14 * 10**9
    assert setup.predict().host == alone.predict().host
    sharded = replace(setup, fsdp2=Fsdp2(offload_weights=True))
    assert sharded.predict().host["frozen parameters"] == 7 * 10**9


def test_other_optimizers_need_their_bytes_a_parameter() -> None:
    """On one GPU: what torch allocates for weights, gradients and two moments."""
    setup = setup_of(10**10, frozen_nbytes=10**9)
    training = setup.training
    run = training.activation_nbytes + CONTEXT_NBYTES
    machine = Machine(host_nbytes=200 * 10**9, device_nbytes=100 * 10**9)
    rows = {row.name: row for row in compare(setup, machine)}
    assert rows["AdamW"].device_nbytes == 16 * 10**10 + run + 10**9
    assert rows["AdamW, bf16"].device_nbytes == 8 * 10**10 + run + 10**9
    assert rows["8-bit AdamW"].device_nbytes == 6 * 10**10 + run + 10**9
    assert [rows[name].fits for name in ("AdamW", "AdamW, bf16", "8-bit AdamW")] == [
        False,
        run + 10**9 <= 20 * 10**9,
        True,
    ]
    shape = training.shape
    assert shape is not None
    fsdp2 = rows["FSDP2's CPUOffloadPolicy"]
    assert fsdp2.host_nbytes_of_node == 16 * 10**10 + 10**9
    assert fsdp2.device_nbytes == run + 2 * (shape.root_numel + 4 * shape.layer_numel)
    own = rows["offload_adam"]
    plan = setup.predict()
    assert (own.device_nbytes, own.host_nbytes_of_node) == (plan.device_nbytes, plan.host_nbytes)
    ranks = compare(setup_of(10**10, world_size=4, local_world_size=2), machine)
    assert ranks[0].name == "AdamW, FSDP2"
    many = setup_of(10**10, world_size=4, local_world_size=2).training
    others = ranks[0].device_nbytes - many.activation_nbytes - many.context_nbytes
    gathered = 2 * (shape.root_numel + 4 * shape.layer_numel)
    assert others == 16 * 10**10 // 4 + gathered
    assert compare(setup_of(10**8, on_device=False), machine) == []


@pytest.mark.parametrize("numel", [10**8, 7 * 10**9, 7 * 10**10, 10**12])
def test_a_typical_transformer_has_about_the_number_of_parameters(numel: int) -> None:
    shape = ModelShape.typical(numel)
    assert shape.numel == pytest.approx(numel, rel=0.2)
    assert shape.is_typical


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100", "H100"),
        ("h100", "H100"),
        ("NVIDIA H100 80GB", "H100"),
        ("RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("rtx 6000", "RTX-6000-Ada"),
        ("a100 80gb", "A100-80GB"),
    ],
)
def test_cards_are_found_by_name(text: str, name: str) -> None:
    assert find_card(text) == (name, CARDS[name])


def test_a_card_offers_less_than_its_name_says() -> None:
    assert CARDS["H100"] == pytest.approx(79.1 * GIB)
    for name, nbytes in CARDS.items():
        digits = name.rpartition("-")[2].removesuffix("GB")
        if name.endswith("GB"):
            assert 0.9 * int(digits) * GIB < nbytes < int(digits) * GIB


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1 K"),
        (85_228_032, "85.2 M"),
        (124_439_808, "124 M"),
        (999_999_999, "1 B"),
        (11_800_000_000, "11.8 B"),
        (2.5e12, "2.5 T"),
    ],
)
def test_numbers_are_shown_as_people_say_them(count: float, text: str) -> None:
    assert format_count(count) == text
