"""`tests.bench.table` and `.predict`: what is made of the results of `bench train`."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from offload_adam.bench.training.contenders import (
    FSDP2,
    MODEL_ALONE,
    OVERLAPPED,
    PLAIN,
    SEQUENTIAL,
    TORCHAO,
)
from offload_adam.bench.training.model import Sizes
from tests.bench import predict, table
from tests.bench.conditions import Condition, evaluate, reached
from tests.bench.picture import BAR_WIDTH, EXPOSED_COLOR, MODEL_COLOR, svg
from tests.bench.predict import predict_train

RECORDED = Path(__file__).with_name("recorded_bench_train.json")
PREDICTIONS = Path(__file__).parents[1] / "gpu" / "predictions.json"

REPORT: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))


def prediction(host_gb_per_s: float, step_ms: float) -> dict[str, Any]:
    return {
        "benchmark": "predict",
        "model": REPORT["model"],
        "bus_gb_per_s": 50.0,
        "tera_flops": 450.0,
        "points": [
            {
                "num_sequences": 48,
                "host_gb_per_s": host_gb_per_s,
                "contenders": {OVERLAPPED: {"step_ms": step_ms, "exposed_ms": 200.0}},
            }
        ],
    }


def test_one_command_makes_the_table_and_the_picture(tmp_path: Path) -> None:
    expected: list[str] = []
    for host, step_ms in ((60.0, 1100.4), (150.0, 725.0)):
        file = tmp_path / f"predicted-{host:.0f}.json"
        file.write_text(json.dumps(prediction(host, step_ms)))
        expected += ["--predictions", str(file)]
    markdown, picture = tmp_path / "table.md", tmp_path / "steps.svg"
    table.main([str(RECORDED), *expected, f"--markdown={markdown}", f"--picture={picture}"])
    text = re.sub(" +", " ", markdown.read_text())  # columns are aligned
    assert "### A GPU: 1.34 B parameters in bfloat16, 48 x 512 tokens" in text
    cells = "28,912 | 850 | 725 to 1,100 | 250 | 200 | 12.5 | 19.2"
    assert f"| offload_adam, overlapped | {cells} |" in text
    assert "| forward and backward alone | 40,960 | 600 | - | 0 | - | 11 | - |" in text
    reason = r"not importable: No module \| named <torchao>"
    assert f"| torchao CPUOffloadOptimizer | {reason} | - | - |" in text
    # The second batch has no prediction.
    assert "| offload_adam, overlapped | 40,960 | 1,800 | - | 0 | - | 20 | 19.2 |" in text
    assert "commit 0123456789ab" in text
    assert "Forward F: 150 ms. Update U: 375 ms. F/U: 0.4. One bucket b: 4.3 ms." in text
    assert "Predicted for host memory of 60 GB/s, a bus of 50 GB/s, and 450 TFLOP/s." in text
    # F < U at 48 sequences, and plain AdamW was not measured at 144.
    assert "- step <= 1.1 * plain AdamW's where F >= U: not known\n" in text
    assert "- exposed <= 1.15 * (max(0, U - F) + b): yes\n" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") - line.count("\\|") for line in rows} == {9}
    assert picture.read_text() == svg([REPORT])


def test_bars_are_as_long_as_their_times() -> None:
    root = ElementTree.fromstring(svg([REPORT]))
    bars: list[tuple[Any, Any]] = [
        (rect.get("fill"), float(rect.get("width", "0")))
        for rect in root.iter("{http://www.w3.org/2000/svg}rect")
        if rect.get("height") == "18"
    ]
    # The longest step of each batch, 850 and 1800.5 ms, has the full width.
    exact = [
        *((600 / 850, 0.0), (600 / 850, 250 / 850), (600 / 850, 6 / 850)),
        *((1.0, 0.0), (1800 / 1800.5, 0.0)),
    ]
    expected = [width * BAR_WIDTH for pair in exact for width in pair]
    assert [width for _, width in bars] == pytest.approx(expected, abs=0.1)
    assert [color for color, _ in bars] == [MODEL_COLOR, EXPOSED_COLOR] * 5
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "850 ms, 28,912 tokens/s" in texts
    assert "not importable: No module | named <torchao>" in texts


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmark": "kernel"}'])
def test_another_file_is_rejected(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    for arguments in ([str(file)], [str(RECORDED), f"--predictions={file}"]):
        with pytest.raises(SystemExit, match="2"):
            table.main(arguments)
        assert str(file) in capsys.readouterr().err


def test_predictions_follow_from_the_speeds(tmp_path: Path) -> None:
    file = tmp_path / "predicted.json"
    model = ["--num-layers=2", "--width=256", "--num-heads=4", "--batches=4,64"]
    speeds = ["--host-bandwidths=50,100", "--bus-bandwidth=40", "--device-bandwidth=2000"]
    predict.main([*model, *speeds, "--tflops=1", f"--json={file}"])
    found = json.loads(file.read_text())
    numel = found["model"]["num_parameters"]
    points = {(p["num_sequences"], p["host_gb_per_s"]): p for p in found["points"]}
    assert set(points) == {(4, 50.0), (4, 100.0), (64, 50.0), (64, 100.0)}
    for (batch, host), point in points.items():
        forward_ms = 2 * numel * batch * 512 / 1e12 * 1e3
        assert point["forward_ms"] == pytest.approx(forward_ms, abs=0.06)
        assert point["forward_backward_ms"] == pytest.approx(4 * forward_ms, abs=0.06)
        assert point["update_ms"] == pytest.approx(28 * numel / host / 1e6, abs=0.06)
        steps = {name: row["step_ms"] for name, row in point["contenders"].items()}
        order = [MODEL_ALONE, PLAIN, OVERLAPPED, SEQUENTIAL]
        assert sorted(steps, key=lambda name: steps[name]) == order
    # With a short forward, a part of the update is exposed, and less with faster host memory.
    exposed = [points[4, host]["contenders"][OVERLAPPED]["exposed_ms"] for host in (50.0, 100.0)]
    assert exposed[0] > exposed[1]
    with pytest.raises(SystemExit, match="2"):
        predict.main([*model, *speeds, "--tflops=1", "--host-bandwidths=x", f"--json={file}"])


def test_the_predictions_for_the_gpu_tests_are_up_to_date() -> None:
    kept = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    sizes = copy.copy(kept["model"])
    numel = sizes.pop("num_parameters")
    found = predict_train(
        Sizes(**sizes),
        sorted({point["num_sequences"] for point in kept["points"]}),
        host_gb_per_s=sorted({point["host_gb_per_s"] for point in kept["points"]}),
        bus_gb_per_s=kept["bus_gb_per_s"],
        device_gb_per_s=kept["device_gb_per_s"],
        tera_flops=kept["tera_flops"],
    )
    assert found["model"]["num_parameters"] == numel
    for before, now in zip(kept["points"], found["points"], strict=True):
        for name, row in now["contenders"].items():
            assert before["contenders"][name] == pytest.approx(row, rel=0.05, abs=2.0), name
    assert FSDP2 not in kept["points"][0]["contenders"]


def row(step_ms: float, exposed_ms: float, update_ms: float, gib: float) -> dict[str, float]:
    return {
        "step_ms": step_ms,
        "exposed_ms": exposed_ms,
        "update_ms": update_ms,
        "peak_gpu_gib": gib,
    }


POINT: dict[str, Any] = {
    "forward_ms": 100.0,
    "forward_backward_ms": 299.0,
    "update_ms": 80.0,
    "bucket_ms": 10.0,
    "contenders": {
        OVERLAPPED: row(310.0, 11.0, 85.0, 1000.0),
        PLAIN: row(305.0, 6.0, 6.0, 3000.0),
        TORCHAO: row(400.0, 101.0, 110.0, 1000.0),
        FSDP2: row(350.0, 51.0, 140.0, 900.0),
    },
}
NAMES = (
    "exposed <= 1.15 * (max(0, U - F) + b)",
    "step <= 1.1 * plain AdamW's where F >= U",
    "exposed <= 0.25 * that of torchao_cpu_offload where F >= 0.75 * its update",
    "exposed <= that of torchao_cpu_offload",
    "exposed <= 0.25 * that of fsdp2_cpu_offload where F >= 0.75 * its update",
    "exposed <= that of fsdp2_cpu_offload",
    "peak GPU memory <= that of torchao_cpu_offload",
)


def judged(point: dict[str, Any]) -> dict[str, Condition]:
    found = evaluate(point)
    assert [condition.name for condition in found] == list(NAMES)
    return {condition.name: condition for condition in found}


def with_ours(**changes: Any) -> dict[str, Any]:
    rows = POINT["contenders"]
    return {**POINT, "contenders": {**rows, OVERLAPPED: {**rows[OVERLAPPED], **changes}}}


def test_every_condition_by_hand() -> None:
    found = judged(POINT)
    # 1.15 * (0 + 10); 1.1 * 305; 101 / 4; FSDP2's update takes 140, of which 105 is more than F.
    bounds = [11.5, 335.5, 25.25, 101.0, None, 51.0, 1000]
    assert [found[name].bound for name in NAMES] == pytest.approx(bounds)
    assert [found[name].holds for name in NAMES] == [True, True, True, True, None, True, True]
    slower = judged({**POINT, "update_ms": 130.0})
    assert slower[NAMES[0]].bound == pytest.approx(1.15 * (30.0 + 10.0))
    assert slower[NAMES[1]].holds is None
    assert slower[NAMES[1]].reason == "F < U"


@pytest.mark.parametrize(
    ("point", "failing"),
    [
        (with_ours(exposed_ms=11.6), [NAMES[0]]),
        (with_ours(step_ms=336.0), [NAMES[1]]),
        (with_ours(exposed_ms=25.3), [NAMES[0], NAMES[2]]),
        (with_ours(exposed_ms=51.1), [NAMES[0], NAMES[2], NAMES[5]]),
        (with_ours(exposed_ms=101.1), [NAMES[0], NAMES[2], NAMES[3], NAMES[5]]),
        (with_ours(peak_gpu_gib=1001.0), [NAMES[6]]),
    ],
)
def test_a_condition_fails_just_past_its_bound(point: dict[str, Any], failing: list[str]) -> None:
    assert [name for name, one in judged(point).items() if one.holds is False] == failing


def test_a_condition_without_results_is_not_known() -> None:
    alone = {**POINT, "contenders": {OVERLAPPED: POINT["contenders"][OVERLAPPED]}}
    found = judged(alone)
    assert [found[name].holds for name in NAMES] == [True, *[None] * 6]
    assert found[NAMES[3]].reason == f"{TORCHAO} was not measured"
    nobody = judged({**POINT, "contenders": {TORCHAO: {"reason": "not importable"}}})
    assert {one.holds for one in nobody.values()} == {None}


def test_a_condition_is_reached_if_it_holds_at_every_point_where_it_is_known() -> None:
    good, bad = evaluate(POINT), evaluate(with_ours(exposed_ms=12.0))
    assert reached([good, good])[NAMES[0]] is True
    assert reached([bad, good])[NAMES[0]] is False
    assert reached([good, bad])[NAMES[0]] is False
    assert reached([good])[NAMES[4]] is None
    # Points where it does not apply change nothing.
    slower = evaluate({**POINT, "update_ms": 130.0})
    too_long = evaluate(with_ours(step_ms=336.0))
    assert reached([good, slower])[NAMES[1]] is reached([slower, good])[NAMES[1]] is True
    assert reached([too_long, slower])[NAMES[1]] is reached([slower, too_long])[NAMES[1]] is False
