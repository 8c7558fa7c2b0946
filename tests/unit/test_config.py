"""The configuration: valid and invalid values, and all mistakes reported at once."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml

from offload_adam.cli.app import app
from offload_adam.config import (
    ConfigError,
    RunConfig,
    dump_config,
    explain_config,
    load_config,
    yaml_text,
)
from offload_adam.config.mesh import mesh_sizes
from offload_adam.config.optimizer_sections import AdamSection, OffloadAdamSection
from offload_adam.config.sections import COMPLETE, TEXT_KEYS, ParallelSection
from offload_adam.config.validation import _SYNONYMS, _known_keys
from offload_adam.options import ExecutionOptions, FailurePolicy, OffloadPolicy, options_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "case.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def mistakes(tmp_path: Path, text: str, *overrides: str) -> dict[str, str]:
    """Return path -> problem of everything that is wrong."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert str(caught.value).count("\n") >= len(caught.value.mistakes)
    return {mistake.path: mistake.problem for mistake in caught.value.mistakes}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_in_configs_loads(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load(tmp_path, dump_config(config)) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_with_comments_reads_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    text = explain_config(config)
    assert load(tmp_path, text) == config
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_comments_are_those_of_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    app(["config"], standalone_mode=False)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for policy in (ExecutionOptions, OffloadPolicy, FailurePolicy):
        for option in options_of(policy):
            if option.key:
                name = option.key.rpartition(".")[2]
                place = next(n for n, line in enumerate(lines) if line.startswith(f"{name}:"))
                comment = lines[place - 1].removeprefix("# ")
                assert option.name == "gradient_reduction" or option.text.endswith(comment)


def test_an_empty_mapping_is_a_run_named_after_its_file(tmp_path: Path) -> None:
    config = load(tmp_path, "{}")
    assert config.run.name == "case"
    assert config.data.source == "python-stdlib"
    assert config.model.sizes is not None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("-3", -3),
        ("1_000", "1_000"),
        ("1:30:00", "1:30:00"),
        ("0b11", "0b11"),
        ("no", "no"),
        ("off", "off"),
        ("Yes", "Yes"),
        ("TRUE", True),
        ("~", None),
        ("", None),
        ("=", "="),
        ("2024-01-01", "2024-01-01"),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("-.INF", float("-inf")),
        ("!!int 017", 17),
        ("!!str 17", "17"),
    ],
)
def test_scalars_have_the_types_of_the_core_schema_of_yaml_1_2(
    tmp_path: Path, text: str, value: object
) -> None:
    for config in (
        load(tmp_path, f"model: {{factory: 'm:f', arguments: {{x: {text}}}}}"),
        load(tmp_path, "model: {factory: 'm:f'}", f"--model.arguments.x={text}"),
    ):
        found = config.model.arguments["x"]
        assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("written", ["007", "1e-3", "0x1F", "1.50", "true", "1_000", "no", "'12'"])
def test_a_key_for_text_gets_the_text_as_it_is_written(tmp_path: Path, written: str) -> None:
    keys = ("run.name", "run.dir", "data.path")
    for config in (
        load(tmp_path, f"run: {{name: {written}, dir: {written}}}\ndata: {{path: {written}}}"),
        load(tmp_path, "{}", *(f"--{key}={written}" for key in keys)),
        load(
            tmp_path, "{}", f"--run={{name: {written}, dir: {written}}}", f"--{keys[2]}={written}"
        ),
    ):
        text = written.strip("'")
        assert (config.run.name, config.run.dir, config.data.path) == (text, text, text)
        assert load(tmp_path, dump_config(config)) == config


def test_an_alias_of_a_number_is_text_only_where_a_key_expects_text(tmp_path: Path) -> None:
    text = "run: {name: &a 007, seed: *a}\ntrain: {num_steps: &b 08}\nobserve: {wandb_project: *b}"
    config = load(tmp_path, text)
    assert (config.run.name, config.run.seed) == ("007", 7)
    assert (config.train.num_steps, config.observe.wandb_project) == (8, "08")


def test_null_is_not_text(tmp_path: Path) -> None:
    assert load(tmp_path, "observe: {wandb_project: null}").observe.wandb_project is None
    assert mistakes(tmp_path, "run: {name: ~}") == {"run.name": "must be text, got null"}


@pytest.mark.parametrize(
    "value", ["1e-3", "0o17", "no", "017", "1_000", "<<", "=", "~", "1:30", "", "2024-01-01"]
)
def test_text_that_looks_like_another_type_survives_writing(tmp_path: Path, value: str) -> None:
    config = RunConfig.model_validate({"model": {"factory": "m:f", "arguments": {value: value}}})
    assert load(tmp_path, dump_config(config)).model.arguments == {value: value}
    # Also for other programs that read config.yaml by the rules of YAML 1.1.
    assert yaml.safe_load(dump_config(config))["model"]["arguments"] == {value: value}


def test_an_error_in_yaml_has_the_name_of_the_file_and_the_line(tmp_path: Path) -> None:
    problem = mistakes(tmp_path, "run: {}\ntrain: [")[""]
    assert f'"{tmp_path / "case.yaml"}", line 2, column 9' in problem


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("binary", "aGk="),
        ("set", "{a: null}"),
        ("timestamp", "2024-01-01"),
        ("omap", "[a: 1]"),
        ("pairs", "[a: 1]"),
    ],
)
def test_types_outside_of_the_core_schema_are_rejected(
    tmp_path: Path, tag: str, value: str
) -> None:
    text = f"model: {{factory: 'm:f', arguments: {{x: !!{tag} {value}}}}}"
    problem = f"the tag !!{tag} in line 1 is not supported: remove it"
    assert mistakes(tmp_path, text) == {"model.arguments.x": problem}


def test_a_tag_does_not_hide_other_mistakes(tmp_path: Path) -> None:
    text = "optimizer: {name: !!python/object:os.system x, epz: 1}\ndata: !mine {}\ndata: {}"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, "--run.name=!!set {a}")
    for problem in (
        "optimizer.name: the tag !!python/object:os.system in line 1 is not supported: remove it",
        "optimizer.epz: unknown key; did you mean optimizer.eps?",
        "data: the tag !mine in line 2 is not supported: remove it",
        "data: duplicate key, in lines 2 and 3",
        "run.name: the tag !!set in line 1 is not supported: remove it",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "path"),
    [("3: 4", "3"), ("run: {1: 2}", "run.1"), ("model: {arguments: {3: 4}}", "model.arguments.3")],
)
def test_a_key_that_is_not_text_is_rejected(tmp_path: Path, text: str, path: str) -> None:
    assert mistakes(tmp_path, text)[path] == "this key is not text: put it in quotes"


def test_a_merge_key_is_rejected_with_its_line(tmp_path: Path) -> None:
    text = "train: &a {num_steps: 3}\nmodel:\n  factory: m:f\n  arguments: {<<: *a, '<': 1}"
    found = mistakes(tmp_path, text)
    assert set(found) == {"model.arguments.<<"}
    assert "merge key in line 4" in found["model.arguments.<<"]


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "1.0e-04", "0.0001", "+1e-4"])
def test_floats_are_read_in_every_notation(tmp_path: Path, text: str) -> None:
    for config in (
        load(tmp_path, f"optimizer: {{lr: {text}}}"),
        load(tmp_path, "{}", f"--optimizer.lr={text}"),
    ):
        assert isinstance(config.optimizer, OffloadAdamSection)
        assert config.optimizer.lr == 1e-4


def test_overrides_are_laid_over_the_file_and_the_last_one_holds(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "train: {num_steps: 3, batch_size: 2}",
        "--train.num_steps=5",
        "--train.num_steps=7",
        "--optimizer.betas=[0, 0.5]",
        "--optimizer.max_grad_norm=null",
        "--run.name=2024-01-01",
    )
    assert (config.train.num_steps, config.train.batch_size) == (7, 2)
    assert isinstance(config.optimizer, OffloadAdamSection)
    assert config.optimizer.betas == (0.0, 0.5)
    assert config.optimizer.max_grad_norm is None
    assert config.run.name == "2024-01-01"


def test_an_override_replaces_the_alternative_in_the_file(tmp_path: Path) -> None:
    text = "model: {sizes: {width: 64}}\ndata: {source: python-stdlib}"
    config = load(tmp_path, text, "--data.path=**/*.txt", "--model.factory=my.package:make")
    assert (config.data.source, config.data.path) == (None, "**/*.txt")
    assert (config.model.sizes, config.model.factory) == (None, "my.package:make")


def test_arguments_of_a_factory_are_passed_as_they_are(tmp_path: Path) -> None:
    text = "model: {factory: 'm:f', arguments: {depth: 3, rate: 1e-2}}"
    arguments = load(tmp_path, text, "--model.arguments.name=x").model.arguments
    assert arguments == {"depth": 3, "rate": 0.01, "name": "x"}


@pytest.mark.parametrize(
    ("text", "path", "nearest"),
    [
        ("trian: {num_steps: 3}", "trian", "train"),
        ("train: {num_stepz: 3}", "train.num_stepz", "train.num_steps"),
        ("train: {lr: 3}", "train.lr", "optimizer.lr"),
        ("model: {sizes: {layers: 3}}", "model.sizes.layers", "model.sizes.num_layers"),
        ("optimizer: {learning_rate: 3}", "optimizer.learning_rate", "optimizer.lr"),
        ("optimizer: {beta1: 0.9}", "optimizer.beta1", "optimizer.betas"),
        (
            "optimizer: {name: Adam, betas: [0, 0]}",
            "optimizer.betas",
            "optimizer.beta1 and optimizer.beta2",
        ),
        ("train: {batch: 3}", "train.batch", "train.batch_size"),
        ("train: {max_iters: 3}", "train.max_iters", "train.num_steps"),
        ("train: {epochs: 3}", "train.epochs", "train.num_steps"),
        ("train: {grad_accum: 3}", "train.grad_accum", "train.gradient_accumulation_steps"),
        ("optimizer: {steps: 3}", "optimizer.steps", "train.num_steps"),
        ("optimizer: {grad_clip: 3}", "optimizer.grad_clip", "optimizer.max_grad_norm"),
        ("seq_len: 3", "seq_len", "train.sequence_length"),
        ("num_step: 3", "num_step", "train.num_steps"),
        ("optimizer: {LR: 3}", "optimizer.LR", "optimizer.lr"),
        ("observe: {port: 3}", "observe.port", "observe.http_port"),
        ("checkpoint: {save_every: 3}", "checkpoint.save_every", "checkpoint.every"),
        ("data: {file: a}", "data.file", "data.path"),  # not "profile", spelled almost alike
        ("data: {src: a}", "data.src", "data.source"),
    ],
)
def test_an_unknown_key_is_reported_with_the_nearest(
    tmp_path: Path, text: str, path: str, nearest: str
) -> None:
    assert mistakes(tmp_path, text)[path] == f"unknown key; did you mean {nearest}?"


def test_the_keys_beside_an_unknown_key_with_a_dot_are_listed(tmp_path: Path) -> None:
    found = mistakes(tmp_path, "run: {'0.95)': 3}")
    assert found == {"run.0.95)": "unknown key; here you can set name, dir, seed"}


def test_a_key_spelled_a_little_like_one_of_another_section_is_not_reported_with_it(
    tmp_path: Path,
) -> None:
    problem = mistakes(tmp_path, "train: {shuffle: true}")["train.shuffle"]
    assert problem.startswith("unknown key; here you can set ")


def test_every_synonym_stands_for_a_key() -> None:
    known = {name for tag in ("OffloadAdam", "Adam") for _, name in _known_keys(tag)}
    assert all(names & known for names in _SYNONYMS)
    assert len(set.union(*_SYNONYMS)) == sum(map(len, _SYNONYMS))


@pytest.mark.parametrize("value", ["0.9", "[0.9]", "[0.9, 0.99, 0.999]", "{a: 1}"])
def test_anything_but_two_betas_says_what_is_expected(tmp_path: Path, value: str) -> None:
    problem = mistakes(tmp_path, "{}", f"--optimizer.betas={value}")["optimizer.betas"]
    assert problem.startswith("must be a list of two numbers such as [0.9, 0.95], got ")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optimizer.betas=0.9", "must be a list of two numbers such as [0.9, 0.95], got 0.9"),
        ("optimizer.betas=[0.9, x]", 'must be a number, got "x"'),
        ("optimizer.betas=[0.9, 1.0]", "must be below 1, got 1.0"),
        ("optimizer.lr=abc", 'must be a number, got "abc"'),
        ("optimizer.lr='1e-3'", 'must be a number without quotes, got "1e-3"'),
        ("optimizer.lr=-1", "must be above 0, got -1"),
        ("optimizer.lr=.inf", "must be a finite number, got Infinity"),
        ("optimizer.weight_decay=-1", "must be at least 0, got -1"),
        ("optimizer.amsgrad=yes", 'must be true or false, got "yes"'),
        ("optimizer.amsgrad='true'", 'must be true or false without quotes, got "true"'),
        ("train.num_steps=1.5", "must be a whole number, got 1.5"),
        ("train.num_steps='15'", 'must be a whole number without quotes, got "15"'),
        (
            "train.num_steps=1e3",
            "must be a whole number such as 1000, without a point or an exponent, got 1000.0",
        ),
        ("train.num_steps=10000000000", "must be at most 16777216, got 10000000000"),
        ("train.dtype=fp8", "must be 'fp32' or 'bf16', got \"fp8\""),
        ("run.dir=[a]", 'must be text, got ["a"]'),
        ("model.arguments=3", "must be a mapping of keys to values, got 3"),
        ("model.sizes=3", "must be a mapping of keys to values, got 3"),
    ],
)
def test_a_value_of_each_wrong_type_gets_a_plain_answer(
    tmp_path: Path, override: str, problem: str
) -> None:
    assert list(mistakes(tmp_path, "{}", f"--{override}").values()) == [problem]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run.name", "a/b"),
        ("run.name", ".."),
        ("run.seed", "-1"),
        ("run.seed", "1.5"),
        ("model.sizes.num_layers", "0"),
        ("model.factory", "package.module"),
        ("model.factory", "package module:f"),
        ("data.source", "wikipedia"),
        ("data.validation_fraction", "1"),
        ("train.num_steps", "0"),
        ("train.num_steps", "true"),
        ("train.num_steps", "many"),
        ("train.batch_size", "2.0"),
        ("train.dtype", "fp8"),
        ("train.eval_every", "-1"),
        ("optimizer.name", "sgd"),
        ("optimizer.lr", "0"),
        ("optimizer.lr", ".nan"),
        ("optimizer.lr", "'1e-3'"),
        ("optimizer.betas", "[0.9]"),
        ("optimizer.betas", "[0.9, 0.99, 0.999]"),
        ("optimizer.betas", "0.9"),
        ("optimizer.weight_decay", "-0.1"),
        ("optimizer.max_grad_norm", "0"),
        ("optimizer.amsgrad", "1"),
        ("optimizer.bucket_nbytes", "0"),
        ("schedule.warmup_steps", "-1"),
        ("schedule.min_lr_ratio", "1.5"),
        ("memory.pin", "maybe"),
        ("memory.pin", "true"),
        ("memory.offload_fraction", "1.5"),
        ("parallel", "true"),
        ("parallel.shard", "0"),
        ("parallel.tensor", "null"),
        ("parallel.param_dtype", "fp16"),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_rejected(
    tmp_path: Path, path: str, value: str
) -> None:
    found = mistakes(tmp_path, "{}", f"--{path}={value}")
    assert [key for key in found if key.startswith(path)] == list(found)


def test_the_path_of_a_beta_out_of_range_has_its_index(tmp_path: Path) -> None:
    assert set(mistakes(tmp_path, "optimizer: {betas: [0.9, 1.0]}")) == {"optimizer.betas.1"}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("model: {sizes: {width: 100, num_heads: 3}}", "model.sizes.width"),
        ("model: {sizes: {}, factory: 'm:f'}", "model.factory"),
        ("model: {sizes: null}", "model.factory"),
        ("model: {arguments: {x: 1}}", "model.arguments"),
        ("data: {source: python-stdlib, path: '*.txt'}", "data.path"),
        ("optimizer: {accumulate: host, streaming: false}", "optimizer.accumulate"),
        ("optimizer: {accumulate: host, gradient_reduction: external}", "optimizer.accumulate"),
        ("optimizer: {overlap: true, streaming: false}", "optimizer.overlap"),
        ("optimizer: {name: Adam, learning_rate: 0.1, overlap: true}", "optimizer.overlap"),
        ("parallel: {}\noptimizer: {name: Adam}", "parallel"),
        ("parallel: {}\noptimizer: {reduce_dtype: fp32}", "optimizer.reduce_dtype"),
        ("optimizer: {state_format: bf16, amsgrad: true}", "optimizer.state_format"),
        ("optimizer: {name: Adam, state_format: bf16}", "optimizer.state_format"),
        ("optimizer: {state_format: int8, amsgrad: true}", "optimizer.state_format"),
        ("optimizer: {name: Adam, state_format: mixed}", "optimizer.state_format"),
        (
            "optimizer: {state_format: bf16}\nmemory: {offload_fraction: 0.5}",
            "optimizer.state_format",
        ),
        ("memory: {keep_path: /dev/shm/run}", "memory.keep_path"),
        ("memory: {keep: shared, offload_fraction: 0.5}", "memory.keep"),
        ("memory: {keep: shared}\noptimizer: {name: Adam}", "memory.keep"),
        ("parallel: {tensor: 3}", "parallel.tensor"),
        ("parallel: {tensor: 2}\nmodel: {factory: 'm:f'}", "parallel.tensor"),
        ("parallel: {tensor: 2}\noptimizer: {name: Adam, use_offload: true}", "parallel.tensor"),
    ],
)
def test_keys_that_contradict_each_other_are_rejected(tmp_path: Path, text: str, path: str) -> None:
    assert set(mistakes(tmp_path, text)) == {path}


@pytest.mark.parametrize(
    ("state_format", "lazy", "is_rejected"),
    [
        ("bf16", "true", False),
        ("mixed", "true", True),
        ("int8", "true", True),
        ("int8", "false", False),
    ],
)
def test_codes_exclude_lazy_updates(
    tmp_path: Path, state_format: str, lazy: str, is_rejected: bool
) -> None:
    section = f"optimizer: {{name: Adam, use_lazy: {lazy}, state_format: {state_format}}}"
    with pytest.raises(ConfigError) as caught:  # with any of them, use_offload is missing
        load(tmp_path, section)
    problem = (
        "needs optimizer.use_lazy: false, since it updates single rows, and 8-bit codes share an "
        "exponent in blocks"
    )
    assert (problem in [one.problem for one in caught.value.mistakes]) == is_rejected


def test_an_absent_section_is_commented_out_and_differs_from_an_empty_one(tmp_path: Path) -> None:
    absent, empty = load(tmp_path, "{}"), load(tmp_path, "parallel: {}")
    assert absent.parallel is None
    assert empty.parallel == ParallelSection()
    comment = (
        "  # Ranks over which each copy of the parameters is sharded. By default all that remain.\n"
    )
    assert f"\n# parallel:\n# {comment}#   shard: null\n" in explain_config(absent)
    assert f"\nparallel:\n{comment}  shard: null\n" in explain_config(empty)
    assert load(tmp_path, "{}", "--parallel.tensor=2").parallel == ParallelSection(tensor=2)
    assert load(tmp_path, "parallel: {}", "--parallel=null").parallel is None


@pytest.mark.parametrize(
    ("world_size", "given", "sizes"),
    [
        (1, {}, (1, 1, 1)),
        (8, {}, (1, 8, 1)),
        (8, {"replicate": 2, "tensor": 2}, (2, 2, 2)),
        (8, {"shard": 4, "replicate": 2}, (2, 4, 1)),
        (2, {"tensor": 2}, (1, 1, 2)),
    ],
)
def test_the_ranks_that_remain_share_the_shards(
    world_size: int, given: dict[str, int], sizes: tuple[int, ...]
) -> None:
    assert mesh_sizes(ParallelSection.model_validate(given), world_size) == sizes


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"shard": 4},
            "replicate 1 * shard 4 * tensor 1 is 4, but this run has 6 rank(s): set parallel.shard "
            "to 6, or start 4 rank(s) with torchrun",
        ),
        (
            {"shard": 2, "tensor": 4},
            "replicate 1 * shard 2 * tensor 4 is 8, but this run has 6 rank(s): change one of "
            "them, or start 8 rank(s) with torchrun",
        ),
        (
            {"replicate": 2, "tensor": 2},
            "replicate 2 * tensor 2 is 4, which does not divide the 6 rank(s) of this run: change "
            "one of them, or start a multiple of 4 ranks",
        ),
    ],
)
def test_sizes_that_do_not_multiply_to_the_ranks_are_rejected(
    given: dict[str, int], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        mesh_sizes(ParallelSection.model_validate(given), 6)
    assert caught.value.mistakes == (("parallel", problem),)


ADAM = "optimizer: {name: Adam, use_offload: true, learning_rate: 1e-2}"


def test_either_optimizer_is_configured_with_its_own_arguments(tmp_path: Path) -> None:
    adam = load(tmp_path, ADAM, "--optimizer.beta1=0.8", "--optimizer.use_nesterov=true").optimizer
    assert isinstance(adam, AdamSection)
    assert (adam.learning_rate, adam.beta1, adam.use_nesterov) == (0.01, 0.8, True)
    section = load(tmp_path, "optimizer: {name: OffloadAdam, lr: 0.5}").optimizer
    assert isinstance(section, OffloadAdamSection)
    assert (section.name, section.lr) == ("OffloadAdam", 0.5)


@pytest.mark.parametrize(
    "rate",
    [0.5, [0.1, 0.2], {"name": "WarmUpLR", "learning_rate": 0.1, "warmup_steps": 3}],
)
def test_a_learning_rate_has_three_forms_that_survive_writing(tmp_path: Path, rate: object) -> None:
    config = load(tmp_path, f"optimizer: {{name: Adam, learning_rate: {rate}}}")
    assert isinstance(config.optimizer, AdamSection)
    assert config.optimizer.learning_rate == rate
    assert load(tmp_path, dump_config(config)) == config


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("optimizer.learning_rate=-1", "optimizer.learning_rate"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate"),
        ("optimizer.learning_rate=[0.1, -1]", "optimizer.learning_rate"),
        ("optimizer.learning_rate=[]", "optimizer.learning_rate"),
        (f"optimizer.learning_rate=1{'0' * 400}", "optimizer.learning_rate"),
        ("optimizer.learning_rate={name: NoSuchLR}", "optimizer.learning_rate"),
        ("optimizer.learning_rate={name: WarmUpLR, steps: 1}", "optimizer.learning_rate"),
        ("optimizer.beta1=1.0", "optimizer.beta1"),
        ("optimizer.beta2=0.0", "optimizer.beta2"),
        ("optimizer.loss_scale=0", "optimizer.loss_scale"),
        ("optimizer.lr=0.1", "optimizer.lr"),
        ("optimizer.streaming=true", "optimizer.streaming"),
        ("optimizer.use_lazy=true", "optimizer.use_lazy"),
        ("optimizer.use_amsgrad=true", "optimizer.use_amsgrad"),
        ("optimizer.state_format=int4", "optimizer.state_format"),
    ],
)
def test_mistakes_in_the_arguments_of_adam_have_their_path(
    tmp_path: Path, override: str, path: str
) -> None:
    assert set(mistakes(tmp_path, ADAM, f"--{override}")) == {path}


def test_keys_of_the_other_optimizer_are_not_suggested(tmp_path: Path) -> None:
    assert "optimizer.lr" not in mistakes(tmp_path, ADAM, "--optimizer.lr=1")["optimizer.lr"]
    problem = mistakes(tmp_path, ADAM, "--optimizer.lerning_rate=1")["optimizer.lerning_rate"]
    assert "did you mean optimizer.learning_rate?" in problem


def test_a_learning_rate_that_is_a_schedule_excludes_the_section_schedule(tmp_path: Path) -> None:
    text = "optimizer: {name: Adam, learning_rate: [0.1, 0.2]}\nschedule: {warmup_steps: 1}"
    assert set(mistakes(tmp_path, text)) == {"schedule"}


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    text = """
run: {seed: -1}
run: {nme: x}
model: {sizes: {width: 100, num_heads: 3, depth: 2}}
train: {num_steps: 0, batch_size: x}
optimizer: {betas: [2, 0.9]}
memory:
"""
    found = mistakes(tmp_path, text, "--optimizer.lrr=1", "--train.num_steps.x=1", "--eps=1", "-x")
    assert set(found) == {
        "run",
        "run.nme",
        "model.sizes.depth",
        "model.sizes.width",
        "train.num_steps",
        "train.num_steps.x",
        "train.batch_size",
        "optimizer.betas.0",
        "optimizer.lrr",
        "memory",
        "eps",
        "",
    }


def test_a_conflict_with_a_value_that_is_itself_wrong_is_left_out(tmp_path: Path) -> None:
    text = "model: {factory: 'no factory', arguments: {x: 1}}"
    assert set(mistakes(tmp_path, text)) == {"model.factory"}


def test_a_duplicate_key_is_reported_with_its_lines(tmp_path: Path) -> None:
    found = mistakes(tmp_path, "train:\n  num_steps: 3\n  batch_size: 1\n  num_steps: 4\n")
    assert "lines 2 and 4" in found["train.num_steps"]


def test_a_duplicate_key_in_a_value_with_aliases_is_reported_once(tmp_path: Path) -> None:
    text = "model: {factory: 'm:f', arguments: {a: &a {x: 1, x: 2}, b: *a, c: [*a, *a]}}"
    assert set(mistakes(tmp_path, text)) == {"model.arguments.a.x"}


@pytest.mark.parametrize(
    "override",
    ["train.num_steps=3", "--train.num_steps", "--train.=3", "--=3", "-s.k=3"],
)
def test_a_malformed_override_is_shown_with_the_right_form(tmp_path: Path, override: str) -> None:
    problem = mistakes(tmp_path, "{}", override)[""]
    assert override in problem
    assert "--section.key=value" in problem


@pytest.mark.parametrize(
    ("override", "path", "problem"),
    [
        (
            "--num_steps=3",
            "num_steps",
            "unknown key; an override has the form --section.key=value: did you mean "
            "--train.num_steps=3?",
        ),
        (
            "--lr=1e-3",
            "lr",
            "unknown key; an override has the form --section.key=value: did you mean "
            "--optimizer.lr=1e-3?",
        ),
        (
            "--foo=1",
            "foo",
            "unknown key; an override has the form --section.key=value, and the sections are run, "
            "model, data, train, parallel, optimizer, schedule, memory, coordinator, checkpoint, "
            "profile, observe",
        ),
        ("--train=1", "train", "must be a mapping of keys to values, got 1"),
        ("--model.arguments=1", "model.arguments", "must be a mapping of keys to values, got 1"),
    ],
)
def test_an_override_of_a_section_or_without_one_gets_a_plain_answer(
    tmp_path: Path, override: str, path: str, problem: str
) -> None:
    assert mistakes(tmp_path, "{}", override) == {path: problem}


@pytest.mark.parametrize(
    "content", [b"", b"- a\n- b\n", b"3", b"a: [", b"\xff\xfe\x00", b"a: b: c"]
)
def test_a_file_without_a_mapping_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "case.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"case\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "is empty"), ("# to be done\n", "is empty"), ("---\n", "is empty"), ("[3]", "got list")],
)
def test_overrides_are_checked_although_the_file_has_no_mapping(
    tmp_path: Path, text: str, problem: str
) -> None:
    found = mistakes(
        tmp_path, text, "--train.num_steps=abc", "--foo.bar=1", "--model.arguments.x=1"
    )
    assert set(found) == {"", "train.num_steps", "foo", "model.arguments"}
    assert problem in found[""]


def test_a_missing_file_and_bad_overrides_come_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "missing.yaml", ["--x"])
    assert len(caught.value.mistakes) == 2
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "value", ["!!int a", "!!int ''", "!!float ''", "!!bool a", "1" * 5000, "0x" + "1" * 5000]
)
def test_a_scalar_that_cannot_be_read_is_rejected(tmp_path: Path, value: str) -> None:
    assert "a value cannot be read" in mistakes(tmp_path, f"train: {{num_steps: {value}}}")[""]


@pytest.mark.parametrize(
    "text",
    [
        "train: &a {num_steps: *a}",
        "model: {factory: 'm:f', arguments: &a {x: [1, *a]}}",
        "run: &a\n  ? *a\n  : 3",
        "&a [*a]",
    ],
)
def test_a_value_that_contains_itself_is_rejected_with_its_line(tmp_path: Path, text: str) -> None:
    assert "the value of the anchor in line 1 contains itself" in mistakes(tmp_path, text)[""]


def nested(levels: int) -> str:
    """Return a YAML file of that many mappings, each in the one before."""
    below = levels - 2  # the whole file and `model` are two of them
    return f"model: {{factory: 'm:f', arguments: {'{a: ' * below}1{'}' * below}}}"


def test_a_configuration_of_100_levels_is_read_and_written(tmp_path: Path) -> None:
    config = load(tmp_path, nested(100))
    assert load(tmp_path, dump_config(config)) == config
    override = f"--model.arguments.{'a.' * 97}a=1"
    assert load(tmp_path, "model: {factory: 'm:f'}", override) == config


@pytest.mark.parametrize(
    ("text", "override"),
    [
        (nested(101), "--run.seed=1"),
        (nested(10_000), "--run.seed=1"),
        ("model: {factory: 'm:f'}", f"--model.arguments.{'a.' * 98}a=1"),
        ("{}", f"--{'a.' * 2000}a=1"),
        (nested(60), f"--model.arguments.{'a.' * 50}a={'[' * 50}{']' * 50}"),
    ],
    ids=["file", "very deep file", "override", "very long override", "both"],
)
def test_a_configuration_of_more_levels_is_rejected(
    tmp_path: Path, text: str, override: str
) -> None:
    problem = mistakes(tmp_path, text, override)[""]
    assert "nested more than 100 levels deep" in problem or "nested too deeply" in problem


def test_of_a_long_value_the_beginning_is_shown(tmp_path: Path) -> None:
    problem = mistakes(tmp_path, "{}", f"--train.num_steps={'x' * 500}")["train.num_steps"]
    shown = problem.partition(", got ")[2]
    assert shown.startswith('"xxxx')
    assert shown.endswith("xxxx...")
    assert len(shown) == 60


def test_an_alias_beside_its_anchor_is_a_copy(tmp_path: Path) -> None:
    text = "model: {factory: 'm:f', arguments: {a: &a [1, [2]], b: *a, c: {d: *a}}}"
    assert load(tmp_path, text).model.arguments["c"] == {"d": [1, [2]]}


def test_yaml_that_would_build_objects_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"apply:os\.getcwd in line 1 is not supported"):
        load(tmp_path, "run: !!python/object/apply:os.getcwd []")


def test_the_configuration_is_read_without_torch() -> None:
    script = "import sys, offload_adam.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def nested_aliases(levels: int) -> str:
    """Return a few lines in which the last list stands for 9**levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} [{aliases}]")
    return "\n".join([*lines, f"train: {{num_steps: *a{levels - 1}}}"])


TEXTS = "t: &t " + "x" * 20_000 + "\ntrain: {num_steps: [" + "*t, " * 20_000 + "]}"
LONG_KEY = "? " + "k" * 100_000 + "\n: [" + "!a x, " * 50_000 + "]"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (TEXTS, "more than 200,000 values, counting those that aliases"),
        (nested_aliases(9), "more than 200,000 values, counting those that aliases"),
        (nested_aliases(300), "more than 200,000 values, counting those that aliases"),
        ("a: [" + "1, " * 200_001 + "]", "more than 200,000 values"),
        ("a: " + "x" * 2**22, "is larger than 4,194,304 bytes"),
    ],
    ids=["texts", "aliases", "many aliases", "list", "file"],
)
def test_a_file_that_stands_for_too_much_is_rejected_at_once(
    tmp_path: Path, text: str, problem: str
) -> None:
    began = time.monotonic()
    found = mistakes(tmp_path, text)
    assert time.monotonic() - began < 20
    assert problem in found[""]


def test_a_list_as_a_key_is_not_written_out() -> None:
    """Its nodes as text, with all that aliases repeat, would take 100 MB."""
    text = nested_aliases(6).replace("train: {num_steps: *a5}", "? *a5\n: 1")
    assert "\n? *a5\n" in text
    tracemalloc.start()
    try:
        with pytest.raises(yaml.YAMLError):
            yaml_text.read_yaml(text)
        _, peak_nbytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_nbytes < 20 * 2**20


def test_a_long_key_is_not_repeated_in_each_mistake(tmp_path: Path) -> None:
    path = tmp_path / "case.yaml"
    path.write_text(LONG_KEY)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(caught.value.mistakes) > 50_000
    assert sum(len(mistake.path) for mistake in caught.value.mistakes[:50_000]) < 30_000_000


def test_a_list_of_learning_rates_is_written_and_read_back(tmp_path: Path) -> None:
    rates = [1e-4 + step * 1.2345678e-9 for step in range(45_000)]
    text = yaml.safe_dump({"optimizer": {"name": "Adam", "learning_rate": rates}})
    config = load(tmp_path, text)
    assert isinstance(config.optimizer, AdamSection)
    assert config.optimizer.learning_rate == rates
    assert load(tmp_path, dump_config(config)) == config


def test_a_key_with_a_line_break_looks_like_no_other_mistake(tmp_path: Path) -> None:
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump({"a\n  train.num_steps: forged": 1}))
    with pytest.raises(ConfigError) as caught:
        load_config("x" * 1000 + str(path))
    assert len(str(caught.value)) < 600
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(str(caught.value).split("\n")) == 2


def test_reading_stops_at_the_first_value_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """So what follows, here a syntax error, is not even looked at."""
    monkeypatch.setattr(yaml_text, "MAX_VALUES", 10)
    assert yaml_text.read_yaml("[1, 2, 3, 4, 5, 6, 7, 8, 9]")[0] == list(range(1, 10))
    with pytest.raises(yaml.YAMLError, match="more than 200,000 values"):
        yaml_text.read_yaml("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, }")


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match="is larger than 4,194,304 bytes"):
        load_config("/dev/zero")


def test_aliases_that_do_not_multiply_are_read(tmp_path: Path) -> None:
    config = load(tmp_path, "train: &t {num_steps: 3}\nmodel: {factory: 'a:b', arguments: {x: *t}}")
    assert config.train.num_steps == 3
    assert config.model.arguments == {"x": {"num_steps": 3}}


def test_thousands_of_mistakes_are_found_at_once_and_the_first_are_shown(tmp_path: Path) -> None:
    keys = [f"k{number}: 1" for number in range(20_000)]
    overrides = [f"--train.k{number}=1" for number in range(20_000)]
    path = tmp_path / "case.yaml"
    path.write_text("\n".join(keys))
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert time.monotonic() - began < 30
    assert len(caught.value.mistakes) == 40_000
    assert len(str(caught.value)) < 10_000
    assert str(caught.value).endswith("... and 39950 more")


@pytest.mark.parametrize(
    "path", [f"{name}.{key}" for name, section in COMPLETE for key in type(section).model_fields]
)
def test_no_key_accepts_a_number_beyond_its_use(tmp_path: Path, path: str) -> None:
    """Neither torch, nor files, nor a process can count that far."""
    messages = []
    for number in ("4" + "0" * 30, "1" + "0" * 400, "1" + "0" * 4000, "1e400", ".inf", ".nan"):
        try:
            value: Any = load(tmp_path, "{}", f"--{path}={number}")
        except ConfigError as error:
            messages.append(str(error))
            continue
        for key in path.split("."):
            value = getattr(value, key)
        # A name may be any text, and a learning rate or a limit any finite float.
        assert isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))
    assert all(len(message) < 1500 for message in messages)


@pytest.mark.parametrize(
    "path", sorted(key for key in TEXT_KEYS if key not in ("run.name", "model.factory"))
)
def test_text_has_no_control_characters_and_an_end(tmp_path: Path, path: str) -> None:
    section, key = path.split(".")
    for text in ("a\0b", "a\x1b[2Jb", "a\nb"):
        found = mistakes(tmp_path, yaml.safe_dump({section: {key: text}}))
        assert found[path].startswith("must not contain control characters, got "), found
    assert (
        "at most 4096 characters" in mistakes(tmp_path, f"{section}: {{{key}: {'x' * 4097}}}")[path]
    )


def test_names_in_a_message_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump({"\x1b[2J": 1, "run": {"na\x9bme": 1}}))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).split("\n")
    assert all(line.isprintable() for line in lines)
    assert any(line.startswith("  \\x1b[2J: unknown key") for line in lines)
