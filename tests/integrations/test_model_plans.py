"""`offload-adam plan --model`: a plan from a Hugging Face configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

from offload_adam.cli.app import app
from offload_adam.integrations.model_config import build_on_meta, sizes_of
from offload_adam.train.plan import shape_of

MACHINE = ("--gpu=H100", "--host-memory=512GiB")

LLAMA_3_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def plan(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments])
    return result.exit_code, " ".join(result.output.split())


def planned(tmp_path: Path, config: dict[str, Any], *arguments: str) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "plan.json"
    code, output = plan(f"--model={tmp_path}", *MACHINE, *arguments, f"--json={path}")
    assert code in (0, 3), output
    values: dict[str, Any] = json.loads(path.read_text())
    return values


@pytest.mark.parametrize(
    ("config", "numel"),
    [
        (LLAMA_3_8B, 8_030_261_248),
        ({"model_type": "gpt2"}, 124_439_808),
        # The published number of parameters, of which a token passes through 12.9 billion.
        (
            {
                "model_type": "mixtral",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
            },
            46_702_792_704,
        ),
    ],
)
def test_the_parameters_are_those_of_the_published_model(
    config: dict[str, Any], numel: int, tmp_path: Path
) -> None:
    values = planned(tmp_path, config)
    assert values["num_parameters"] == numel
    assert values["bytes_per_rank"]["device"]["parameters"] == pytest.approx(2 * numel, rel=0.001)
    assert values["bytes_per_rank"]["host"]["exp_avg"] == pytest.approx(4 * numel, rel=0.001)


def test_a_model_has_its_own_sizes(tmp_path: Path) -> None:
    shape = planned(tmp_path, LLAMA_3_8B)["training"]["shape"]
    assert shape["num_layers"] == 32
    assert shape["width"] == 4096
    assert shape["vocabulary"] == 128256
    assert shape["layer_numel"] == 218_112_000
    assert shape["root_numel"] == 2 * 128256 * 4096 + 4096
    # 2 B for each token: q, k, v, o, gate, up and down, in and out; and the norms.
    matrices = 8192 + 2 * (4096 + 1024) + 8192 + 2 * (4096 + 14336) + 14336 + 4096
    assert shape["largest_saved_numel"] == matrices + 4 * 4096
    assert shape["saved_numel"] == 32 * shape["largest_saved_numel"]


def test_a_share_of_the_parameters_is_trained(tmp_path: Path) -> None:
    values = planned(tmp_path, LLAMA_3_8B, "--trainable=1%")
    assert values["num_parameters"] == pytest.approx(80_302_612, rel=0.001)
    device, host = values["bytes_per_rank"]["device"], values["bytes_per_rank"]["host"]
    frozen = device["frozen parameters"] + 2 * values["num_parameters"]
    assert frozen == 2 * 8_030_261_248
    assert host["exp_avg"] == pytest.approx(4 * values["num_parameters"], rel=0.01)


TINY = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 1000}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "intermediate_size": 896, "num_key_value_heads": 2, **TINY},
        {"model_type": "qwen2", "intermediate_size": 1376, "num_key_value_heads": 2, **TINY},
        {
            "model_type": "mixtral",
            "intermediate_size": 512,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            **TINY,
        },
    ],
    ids=lambda config: config["model_type"],
)
def test_activations_are_near_those_that_torch_saves(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """The tensors that autograd saves in one forward, each storage counted once."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    on_meta = build_on_meta(tmp_path, torch.bfloat16)
    shape = shape_of(on_meta, sizes_of(on_meta))
    sizes = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model = transformers.AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16)
    tokens = torch.zeros((2, 256), dtype=torch.int64, device="cpu")
    saved = saved_nbytes(model, tokens)
    estimate = shape.activation_nbytes(tokens.numel(), checkpointing=False)
    assert estimate == pytest.approx(saved, rel=0.15)


def saved_nbytes(model: nn.Module, tokens: torch.Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens, labels=tokens)
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object with a model_type"),
        ("{}", "model_type None is not known"),
        ('{"model_type": "no such model"}', "Update transformers, or give --params"),
        ('{"model_type": ["llama"]}', "is not known to transformers"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot build this model"),
        ('{"model_type": "llama", "hidden_size": -8}', "cannot build this model"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "must be at least 1"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000}', "at most 2000"),
        ('{"model_type": "gpt2", "n_layer": 20000}', "n_layer must be at least 1 and at most 2000"),
        ('{"model_type": "t5", "num_layers": -3}', "num_layers must be at least 1"),
        ("\x00", "cannot be read as JSON"),
        (f'{{"model_type": "llama", "hidden_size": 1{5000 * "0"}}}', "cannot be read as JSON"),
    ],
)
def test_a_wrong_configuration_is_an_error(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    code, output = plan(f"--model={tmp_path}", *MACHINE)
    assert code == 2, output
    assert words in output


def test_a_name_on_the_hub_is_not_downloaded() -> None:
    code, output = plan("--model=meta-llama/Llama-3.1-8B", *MACHINE)
    assert code == 2
    assert "nothing is downloaded" in output


EVIL = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass M: pass\n"


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "num_hidden_layers": 1},
        {
            "model_type": "encoder-decoder",
            "encoder": {"model_type": "bert", "num_hidden_layers": 1},
            "decoder": {"model_type": "bert", "num_hidden_layers": 1},
        },
    ],
)
def test_code_in_the_folder_is_not_run(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the answer to every question
    (tmp_path / "evil.py").write_text(EVIL)
    code = {
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.M"),
        "_name_or_path": str(tmp_path),
        "name_or_path": str(tmp_path),
    }
    nested = {k: {**v, **code} if isinstance(v, dict) else v for k, v in config.items()}
    (tmp_path / "config.json").write_text(json.dumps({**nested, **code}))
    plan(f"--model={tmp_path}", *MACHINE)
    assert not (tmp_path / "ran").exists()


def test_libraries_that_a_plan_does_not_need_are_not_asked_for(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "attn_implementation": "flash_attention_2"}
    assert planned(tmp_path, gpt2)["num_parameters"] == 124_439_808


MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "num_local_experts": 8,
}


@pytest.mark.parametrize("world_size", [4, 8, 16, 64])
def test_fsdp2_divides_whole_rows(world_size: int, tmp_path: Path) -> None:
    """Eight stacked experts are on eight ranks at most: rank 0 has one of them whole."""
    size = f"--world-size={world_size}"
    values = planned(tmp_path, MIXTRAL, "--fsdp2", size, "--local-world-size=4")
    built = build_on_meta(tmp_path, torch.bfloat16)
    rank_0 = sum(
        -(-parameter.shape[0] // world_size) * parameter.numel() // parameter.shape[0]
        for parameter in built.parameters()
    )
    # Each parameter has whole blocks of 128 elements.
    nbytes = values["bytes_per_rank"]["device"]["parameters"]
    assert nbytes == pytest.approx(2 * rank_0, abs=2 * 128 * len([*built.parameters()]))


def test_parameters_that_the_model_itself_freezes_are_frozen(tmp_path: Path) -> None:
    """Marian's positions are sines, in a parameter without a gradient."""
    marian = {"model_type": "marian", "d_model": 256, "max_position_embeddings": 128}
    on_meta = planned(tmp_path, marian)
    built = build_on_meta(tmp_path, torch.bfloat16)
    frozen = sum(p.numel() for p in built.parameters() if not p.requires_grad)
    total = sum(p.numel() for p in built.parameters())
    assert frozen >= 128 * 256
    assert on_meta["num_parameters"] == total - frozen
    assert on_meta["bytes_per_rank"]["device"]["frozen parameters"] == 2 * frozen
    values = planned(tmp_path, marian, "--fsdp2", "--world-size=2", "--trainable=50%")
    held = values["bytes_per_rank"]["device"]["frozen parameters"]
    assert held == pytest.approx((frozen + (total - frozen) / 2), abs=1000)  # of two ranks, bf16


@pytest.mark.parametrize(
    ("config", "num_layers", "width", "vocabulary"),
    [
        # Encoder and decoder.
        ({"model_type": "t5"}, 12, 512, 32128),
        # One layer, whose parameters twelve passes share.
        ({"model_type": "albert"}, 12, 4096, 30000),
        ({"model_type": "jetmoe"}, 12, 2048, 32000),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_layers_are_counted_as_tokens_pass_them(
    config: dict[str, Any], num_layers: int, width: int, vocabulary: int, tmp_path: Path
) -> None:
    architectures = {"t5": "T5ForConditionalGeneration", "albert": "AlbertForMaskedLM"}
    named = architectures.get(config["model_type"])
    if named:
        config = {**config, "architectures": [named]}
    shape = planned(tmp_path, config)["training"]["shape"]
    assert shape["num_layers"] == num_layers
    assert shape["width"] == width
    assert shape["vocabulary"] == vocabulary
    assert shape["saved_numel"] > 0


def test_without_an_architecture_the_text_model_is_planned(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 3, "hidden_size": 512, "vocab_size": 1024}
    shape = planned(tmp_path, {"model_type": "qwen3_5", "text_config": text})["training"]["shape"]
    assert (shape["num_layers"], shape["width"], shape["vocabulary"]) == (3, 512, 1024)


def test_a_key_with_several_numbers_is_no_size(tmp_path: Path) -> None:
    """LXMERT has a number of layers for each kind of input."""
    values = planned(tmp_path, {"model_type": "lxmert"})
    assert values["num_parameters"] > 10**8


@pytest.mark.parametrize("model_type", ["resnet", "convnext", "xlnet"])
def test_activations_of_other_models_are_not_guessed(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    code, output = plan(f"--model={tmp_path}", *MACHINE)
    assert code == 0, output
    assert "It fits, without counting activations." in output
    code, output = plan(f"--model={tmp_path}", *MACHINE, "--checkpointing")
    assert code == 2
    assert "cannot be estimated" in output


def test_weights_in_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"no weights")
    assert planned(tmp_path, {"model_type": "gpt2"})["num_parameters"] == 124_439_808
