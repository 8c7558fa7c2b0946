"""Builds the model of a Hugging Face configuration without its weights, for plans."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from offload_adam.integrations.missing import explain_missing
from offload_adam.printable import show

_MOST_NBYTES = 16 * 2**20  # of a config.json; real ones have a few KiB
_MOST_LAYERS = 2000  # real models have up to about 200; more would take minutes to build
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Keys that name code or weights of the model's folder, or libraries that a plan does not need.
_REMOVED = {
    "_attn_implementation",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "name_or_path",
    "quantization_config",
    "use_kernels",
}


class ModelSizes(NamedTuple):
    """Sizes that a model's configuration names; None where it does not.

    width: elements of a token between two layers.
    num_layers: layers that a token passes through, also if they share parameters.
    num_logits: logits of a token.
    num_experts: experts of a layer, and how many of them a token passes through.
    reads_tokens: the model's input are tokens.
    """

    width: int | None = None
    num_layers: int | None = None
    num_logits: int | None = None
    num_experts: tuple[int, int] | None = None
    reads_tokens: bool = True


UNKNOWN_SIZES = ModelSizes()


def build_on_meta(path: Path, dtype: torch.dtype) -> nn.Module:
    """Return the model that a `config.json` describes, on the meta device.

    Nothing is downloaded, no code of the model's folder is run, and no weights are read. A model
    with quantized weights is built with weights of `dtype`.

    Args:
        path: a `config.json`, or the folder that contains it.

    Raises:
        MissingExtraError: transformers is not installed.
        ValueError: there is no such file, or transformers cannot build the model.
    """
    values, file = _read(path)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    with explain_missing("transformers"):
        import transformers
    transformers.logging.set_verbosity_error()  # what it advises is for training
    name = values.get("model_type")
    if not isinstance(name, str) or name not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{file}: model_type {show(name)} is not known to transformers "
            f"{transformers.__version__}. Update transformers, or give --params"
        )
    _reject_layers(values, file)
    try:
        config = transformers.CONFIG_MAPPING[name].from_dict(_without_code(values))
        with torch.device("meta"):
            return _build(config, dtype)
    except Exception as error:  # of any type: it depends on the model
        raise ValueError(
            f"{file}: transformers cannot build this model: {type(error).__name__}: "
            f"{str(error)[:500]}. Correct the file, or give --params"
        ) from error


def _build(config: Any, dtype: torch.dtype) -> nn.Module:
    """Return the model of the named architecture, or else a causal language model.

    The classes are transformers' own. Its Auto classes would also look for code of the model.
    """
    import transformers

    named = (getattr(transformers, str(name), None) for name in config.architectures or ())
    architecture: Any = next((one for one in named if isinstance(one, type)), None)
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if architecture is None and type(config) in mapping:
            architecture = mapping[type(config)]
    if architecture is None or not issubclass(architecture, transformers.PreTrainedModel):
        raise ValueError(f"there is no model of {type(config).__name__}")
    if not isinstance(config, architecture.config_class):  # the text model of one with images
        config = config.get_text_config()
    model: nn.Module = architecture(config)
    return model.to(dtype)


def _without_code(values: Any) -> Any:
    """Return a configuration, and those nested in it, without the keys in `_REMOVED`."""
    if isinstance(values, dict):
        return {k: _without_code(value) for k, value in values.items() if k not in _REMOVED}
    if isinstance(values, list):
        return [_without_code(value) for value in values]
    return values


def _reject_layers(values: Any, file: Path) -> None:
    """Reject a number of layers that cannot be built."""
    for key, value in values.items():
        if isinstance(value, dict):
            _reject_layers(value, file)
        elif key in _NUM_LAYERS and isinstance(value, int) and not 1 <= value <= _MOST_LAYERS:
            raise ValueError(
                f"{file}: {key} must be at least 1 and at most {_MOST_LAYERS}, not {show(value)}"
            )


def _read(path: Path) -> tuple[dict[str, Any], Path]:
    file = path / "config.json" if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise ValueError(
            f"--model {show(str(path))}: there is no file {show(str(file))}. Give the folder of a "
            "model that is on this machine, or its config.json; nothing is downloaded. Or give "
            "--params"
        )
    try:
        if file.stat().st_size > _MOST_NBYTES:
            raise ValueError("it is too large for a config.json")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:  # also of text that is not UTF-8
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object with a model_type")
    return values, file


def sizes_of(model: nn.Module) -> ModelSizes:
    """Return the sizes in the configuration of a model that `build_on_meta` has returned."""
    own: Any = model
    config = own.config.get_text_config()
    outputs = own.get_output_embeddings()

    def size(*names: str) -> int | None:
        """Return the first of these keys that is a number: some models have several in one key."""
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if isinstance(value, int)), None)

    active, total = size("num_experts_per_tok"), size(*_NUM_EXPERTS)
    return ModelSizes(
        width=size("hidden_size"),
        num_layers=size("num_hidden_layers"),
        num_logits=0 if outputs is None else int(outputs.weight.shape[0]),
        num_experts=(total, min(active, total)) if active and total else None,
        reads_tokens=own.main_input_name == "input_ids",
    )
