"""The reference of all keys: `config --explain`, `config --schema`, and `--help`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from offload_adam.cli.app import app
from offload_adam.config import RunConfig, json_schema, load_config
from offload_adam.config.reference import all_keys
from offload_adam.config.validation import _known_keys
from offload_adam.config.yaml_text import read_yaml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_every_key_of_both_optimizers_has_a_description() -> None:
    found = {key.path: key for key in all_keys()}
    for tag in ("OffloadAdam", "Adam"):
        for section, name in _known_keys(tag):
            assert found[f"{section}.{name}".lstrip(".")].schema["description"], name


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (
            "optimizer.betas",
            "optimizer.betas, with optimizer.name: OffloadAdam\n"
            "  type:    list of two numbers\n"
            "  default: [0.9, 0.999]\n"
            "  allowed: each at least 0 and below 1\n"
            "  Decay rates of the averages of gradients and of their squares, such as "
            "[0.9, 0.95].\n",
        ),
        (
            "optimizer.max_grad_norm",
            "optimizer.max_grad_norm\n"
            "  type:    number or null\n"
            "  default: null\n"
            "  allowed: above 0\n"
            "  Clip the global 2-norm of the gradients to this value, inside the update. By "
            "default they are not\n"
            "  clipped.\n",
        ),
        (
            "--train.dtype=fp32",
            "train.dtype\n"
            "  type:    text\n"
            '  default: "fp32"\n'
            "  allowed: 'fp32', 'bf16'\n"
            "  Dtype of the parameters.\n",
        ),
        (
            "run.seed",
            "run.seed\n"
            "  type:    whole number\n"
            "  default: 0\n"
            "  allowed: at least 0\n"
            "  Seed of the weights, the order of the data, and dropout.\n",
        ),
    ],
)
def test_a_key_is_explained(key: str, text: str) -> None:
    assert command("config", "--explain", key) == (0, text)


def test_a_section_is_explained_with_all_of_its_keys() -> None:
    code, output = command("config", "--explain=memory")
    assert code == 0
    assert output.startswith("memory\n  Where the optimizer state is stored, and which host memory")
    named = [line for line in output.splitlines() if line and not line.startswith(" ")]
    assert named == ["memory", *(f"memory.{key}" for key in type(RunConfig().memory).model_fields)]
    assert all(len(line) <= 100 for line in output.splitlines())


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimizer.bets", "did you mean optimizer.betas?"),
        ("lr", "did you mean optimizer.lr?"),
        ("memori", "did you mean memory?"),
        ("no.such.key", "the sections are run, model, data, train, "),
    ],
)
def test_a_wrong_key_is_answered_with_the_nearest(key: str, hint: str) -> None:
    code, output = command("config", "--explain", key)
    assert code == 2
    assert f"{key}: unknown key; {hint}" in output


def test_a_long_key_is_cut_and_the_answer_is_whole() -> None:
    code, output = command("config", "--explain", 5_000 * "x" + "\x1b")
    assert code == 2
    _, line = output.splitlines()
    assert len(line) < 300
    assert "x ... x" in line
    assert re.search(r"x\\x1b: unknown key; the sections are run, .*, observe$", line)


@pytest.mark.parametrize("section", RunConfig.model_fields)
def test_no_bound_only_names_the_largest_integer(section: str) -> None:
    _, output = command("config", "--explain", section)
    assert "9,223,372" not in output


def test_the_ways_to_print_exclude_each_other() -> None:
    for arguments in (["--explain=run", "--schema"], ["--schema", "x.yaml"], ["x", "--explain=a"]):
        code, output = command("config", *arguments)
        assert code == 2
        assert "exclude each other" in output


def test_the_schema_has_every_key_and_names_its_dialect() -> None:
    code, output = command("config", "--schema")
    assert code == 0
    schema = json.loads(output)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(schema["properties"]) == list(RunConfig.model_fields)
    for tag in ("OffloadAdam", "Adam"):
        section = schema["$defs"][f"{tag}Section"]
        dumped = RunConfig.model_validate({"optimizer": {"name": tag}}).optimizer
        assert set(section["properties"]) == set(dumped.model_dump())
        assert section["properties"]["name"]["const"] == tag
        assert section["additionalProperties"] is False


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_editors_accept_every_file_in_configs(path: Path) -> None:
    validator = validator_of_schema()
    values, _ = read_yaml(path.read_text(encoding="utf-8"))
    validator.validate(values)
    validator.validate(load_config(path).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        ("{}", True),
        ("optimizer: {}", True),
        ("optimizer: {name: OffloadAdam, lr: 1}", True),
        ("optimizer: {name: Adam, learning_rate: [0.1, 0.2]}", True),
        ("optimizer: {name: Adam, learning_rate: {name: WarmUpLR, warmup_steps: 1}}", True),
        ("parallel: {tensor: 2}", True),
        ("parallel: null", True),
        ("optimizer: {name: SGD}", False),
        ("optimizer: {name: Adam, lr: 0.1}", False),
        ("optimizer: {betas: 0.9}", False),
        ("optimizer: {betas: [0.9, 1.0]}", False),
        ("optimizer: {lr: abc}", False),
        ("train: {num_steps: 1.5}", False),
        ("train: {num_stepz: 1}", False),
        ("model: {factory: no function}", False),
    ],
)
def test_editors_see_the_same_mistakes(text: str, is_valid: bool) -> None:
    assert validator_of_schema().is_valid(yaml.safe_load(text)) == is_valid


def validator_of_schema() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


@pytest.mark.parametrize("name", ["train", "profile", "config"])
def test_the_help_names_every_key_in_lines_of_100_columns(name: str) -> None:
    code, output = command(name, "--help")
    assert code == 0
    assert all(len(line) <= 100 for line in output.splitlines())
    _, _, listed = output.partition("Keys of CONFIG")
    words = listed.replace(",", " ").replace(":", " ").split()
    for key in all_keys():
        section, _, below = key.path.partition(".")
        assert section in words
        assert key.is_section or below in words
