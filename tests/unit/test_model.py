"""The models: the built-in GPT's shapes and causality, and the contract of the user's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_adam.config import ConfigError, RunConfig, load_config
from offload_adam.config.sections import ModelSizes
from offload_adam.train.data import Batch
from offload_adam.train.model import GPT, build_model, next_token_loss


def small_gpt(*, tied_head: bool = True) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelSizes(num_layers=2, width=32, num_heads=4, tied_head=tied_head), max_length=16)


@pytest.mark.parametrize("tied_head", [True, False])
def test_shapes_and_number_of_parameters(tied_head: bool) -> None:
    model = small_gpt(tied_head=tied_head)
    assert model(torch.zeros(3, 11, dtype=torch.int64)).shape == (3, 11, 256)
    width = 32
    block = 12 * width**2 + 4 * width + width + 4 * width  # matrices, biases, two norms
    embeddings = 256 * width + 16 * width
    head = 0 if tied_head else 256 * width
    expected = 2 * block + embeddings + head + 2 * width
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_no_logit_depends_on_a_later_byte() -> None:
    model = small_gpt()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9], after[:, 9])


def test_an_untrained_model_knows_nothing() -> None:
    tokens = torch.randint(256, (8, 16))
    loss = next_token_loss(small_gpt(), Batch(tokens, tokens.roll(-1, 1)))
    assert loss.item() == pytest.approx(5.545, abs=0.1)  # the logarithm of 256


def test_the_loss_is_the_mean_over_tokens_in_fp32() -> None:
    logits = torch.randn(2, 3, 300, dtype=torch.bfloat16)
    targets = torch.randint(256, (2, 3))
    loss = next_token_loss(Fixed(logits), Batch(targets, targets))
    exact = logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-exact.item(), rel=1e-6)


class Fixed(nn.Module):
    """A model that returns `answer` for any input."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (None, "NoneType"),
        ({"logits": torch.zeros(2, 3, 256)}, "dict"),
        (torch.zeros(2, 256), "shape (2, 256)"),
        (torch.zeros(2, 4, 256), "shape (2, 4, 256)"),
        (torch.zeros(2, 3, 255), "shape (2, 3, 255)"),
        (torch.zeros(2, 3, 256, dtype=torch.int64), "torch.int64"),
    ],
)
def test_anything_but_logits_is_an_error_with_both_shapes(answer: Any, got: str) -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match=rf"\(2, 3, 256 or more\), got .*{re.escape(got)}"):
        next_token_loss(Fixed(answer), Batch(tokens, tokens))


OWN_MODULE = """
import torch

def scaled(width=4, scale=1.0):
    return torch.nn.Sequential(torch.nn.Embedding(256, width), torch.nn.Linear(width, 256))

class Nested:
    make = staticmethod(scaled)

def fails():
    raise KeyError("no weights")

def frozen():
    return scaled().requires_grad_(False)

def nothing():
    return 3

def leaves():
    import sys
    sys.exit(3)

def on_meta():
    with torch.device("meta"):
        return torch.nn.Sequential(*[scaled() for _ in range(2)], torch.nn.BatchNorm1d(3))

def lazy():
    return torch.nn.Sequential(torch.nn.Embedding(256, 4), torch.nn.LazyLinear(256))

def complex_weight():
    model = scaled()
    model.phase = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    model.register_buffer("rotation", torch.ones(3, dtype=torch.complex64))
    return model

number = 4
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(OWN_MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def config_for(factory: str, **arguments: Any) -> RunConfig:
    model = {"factory": factory, "arguments": arguments}
    return RunConfig.model_validate({"model": model, "train": {"dtype": "bf16"}})


def test_the_users_own_model_is_made_with_its_arguments(own_module: str) -> None:
    for function in ("scaled", "Nested.make"):
        model = build_model(config_for(f"{own_module}:{function}", width=7))
        shapes = [tuple(parameter.shape) for parameter in model.parameters()]
        assert shapes == [(256, 7), (256, 7), (256,)]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_seed_makes_the_same_model_again(own_module: str) -> None:
    config = config_for(f"{own_module}:scaled")
    first, second = build_model(config).state_dict(), build_model(config).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("missing", "has no function missing"),
        ("number", "is not a function"),
        ("nothing", "must return a torch.nn.Module, got int"),
        ("frozen", "no parameter that requires a gradient"),
        ("fails", "KeyError: 'no weights' .*line 11"),
        ("leaves", r"leaves\(\) failed: SystemExit: 3 .*line 21"),
        ("on_meta", "0.0.weight, 0.1.weight, 0.1.bias and 8 more: no values, .*to_empty"),
        ("lazy", "1.weight, 1.bias: no shape yet, .*call the model once"),
        ("complex_weight", "phase, rotation: complex numbers, .*view_as_real"),
    ],
)
def test_a_factory_that_does_not_keep_the_contract(
    own_module: str, function: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model\.factory: .*{problem}"):
        build_model(config_for(f"{own_module}:{function}"))


def test_arguments_that_the_factory_does_not_take(own_module: str) -> None:
    with pytest.raises(ConfigError, match=r"scaled\(depth=3\) failed: TypeError"):
        build_model(config_for(f"{own_module}:scaled", depth=3))


def test_a_module_that_leaves_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaving_module.py").write_text("raise SystemExit('usage: ...')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="cannot import leaving_module: SystemExit: usage"):
        build_model(config_for("leaving_module:make"))


def test_a_plan_wants_no_values(own_module: str) -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in build_model(config_for(f"{own_module}:on_meta")).parameters())


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("no_such_package.models", "no_such_package"),
        ("json.no_such_part", "json.no_such_part"),
        ("no_such_module", "no_such_module"),
    ],
)
def test_a_module_that_is_missing_is_an_error_that_says_where_to_put_it(
    module: str, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(config_for(f"{module}:make"))
    assert str(caught.value) == (
        "configuration: 1 mistake\n"
        f"  model.factory: there is no module {missing}: put it into the working directory, "
        f"{Path.cwd()}, or add its folder to PYTHONPATH"
    )
    assert caplog.text == ""


def test_a_function_that_is_missing_is_an_error_with_the_nearest(own_module: str) -> None:
    problem = rf"{own_module} \(.*/{own_module}\.py\) has no function scald; did you mean scaled\?$"
    with pytest.raises(ConfigError, match=problem):
        build_model(config_for(f"{own_module}:scald"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("\nimport no_such_library\n", ["line 2, in <module>", "import no_such_library"]),
        ("def make(:\n    pass\n", ["line 1", "def make(:", "SyntaxError"]),
        (
            "def make():\n    return load()\n\ndef load():\n    return {}['weights']\n",
            ["line 2, in make", "line 5, in load", "KeyError: 'weights'"],
        ),
    ],
    ids=["import", "syntax", "call"],
)
def test_an_error_in_the_users_code_keeps_its_own_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    source: str,
    words: list[str],
    request: pytest.FixtureRequest,
) -> None:
    name = f"own_code_{request.node.callspec.id}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    ending = r"The error is in your own code: see the traceback above$"
    with pytest.raises(ConfigError, match=ending):
        build_model(config_for(f"{name}:make"))
    for word in words:
        assert word in caplog.text
    assert f"{name}.py" in caplog.text
    assert "train/model.py" not in caplog.text
    assert "importlib" not in caplog.text


def test_a_call_with_wrong_arguments_has_no_traceback(
    own_module: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'depth'"):
        build_model(config_for(f"{own_module}:scaled", depth=3))
    assert caplog.text == ""


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_numbers_in_the_comments_of_a_file_in_configs_are_those_of_its_run(path: Path) -> None:
    comments = " ".join(re.findall(r"^# ?(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    config = load_config(path)
    with torch.device("meta"):
        numel = sum(parameter.numel() for parameter in build_model(config).parameters())
    for number in re.findall(r"([\d.,-]+)[ -]million", comments):
        assert number == f"{numel / 1e6:.0f}"
    train = config.train
    tokens = train.batch_size * train.gradient_accumulation_steps * train.sequence_length
    for found in re.findall(r"([\d,]+) steps of ([\d,]+) tokens", comments):
        assert found == (f"{train.num_steps:,}", f"{tokens:,}")


def test_the_files_in_configs_of_many_ranks_say_how_large_their_model_is() -> None:
    named = {path.stem for path in CONFIGS if "million parameters" in path.read_text("utf-8")}
    assert named == {"bf16_accumulation", "fsdp2", "weights_on_host"}
