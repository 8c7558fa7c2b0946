"""Builds the model of a Hugging Face configuration without its weights, for plans."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_adam.integrations.missing import explain_missing
from offload_adam.printable import show

_MOST_NBYTES = 16 * 2**20  # of a config.json; real ones have a few KiB
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def build_on_meta(path: Path, dtype: torch.dtype) -> nn.Module:
    """Return the model that a `config.json` describes, on the meta device.

    Nothing is downloaded, no code of the model's folder is run, and no weights are read. A model in
    quantized weights is built with weights of `dtype`.

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
    values.pop("quantization_config", None)
    try:
        config = transformers.CONFIG_MAPPING[name].from_dict(values)
        with torch.device("meta"):
            return _build(config, dtype)
    except Exception as error:  # of any type: it depends on the model
        raise ValueError(
            f"{file}: transformers cannot build this model: {type(error).__name__}: "
            f"{str(error)[:500]}. Correct the file, or give --params"
        ) from error


def _build(config: Any, dtype: torch.dtype) -> nn.Module:
    """Return the model of the named architecture, or else a causal language model."""
    import transformers

    for name in config.architectures or ():
        architecture = getattr(transformers, str(name), None)
        if architecture is not None:
            model: nn.Module = architecture._from_config(config, dtype=dtype)
            return model
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if type(config) in mapping else transformers.AutoModel
    model = auto.from_config(config, dtype=dtype)
    return model


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
            raise ValueError(f"{file} is too large for a config.json")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object with a model_type")
    return values, file


def active_experts(model: nn.Module) -> float:
    """Return the share of a layer's experts that a token passes through; 1.0 without experts."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    active = getattr(config, "num_experts_per_tok", None)
    total = next((getattr(config, name) for name in _NUM_EXPERTS if hasattr(config, name)), None)
    return min(1.0, active / total) if active and total else 1.0
