"""Validates a mapping as a `RunConfig`: finds all mistakes, and suggests the key that was meant."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from offload_adam.config.conflicts import find_conflicts
from offload_adam.config.declared import TEXT_PATTERN
from offload_adam.config.mistakes import MAX_SHOWN, Mistake
from offload_adam.config.sections import COMPLETE, FACTORY_PATTERN, NAME_PATTERN, RunConfig

Key = tuple[str, str]
"""The dotted path of a section, "" for the top level, and the name of a key in it."""

_PAIR = "must be a list of two numbers such as [0.9, 0.95]"
# Type of pydantic's error -> what a value must be. Used where pydantic's own message names Python
# types. Tuples are pairs: the two betas.
_EXPECTED = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping of keys to values",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "missing": _PAIR,  # no second beta; all keys have defaults
    "model_type": "must be a mapping of keys to values",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "too_long": _PAIR,
    "tuple_type": _PAIR,
}
# Words of pydantic's own messages -> plainer ones.
_PLAINER = {
    "Input should": "must",
    "String should": "must",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}
PATTERNS = {
    FACTORY_PATTERN: "must have the form package.module:function",
    TEXT_PATTERN: "must not contain control characters",
    NAME_PATTERN: "must have only letters, digits and . _ -, and not begin with . or -",
}
"""Pattern of a key's text -> what the text must be."""
# Each set has the names of one setting: ours, and those of PyTorch, transformers, torchtitan,
# Lightning and nanoGPT.
_SYNONYMS = [
    set(names.split())
    for names in (
        "batch_size batch micro_batch_size local_batch_size per_device_train_batch_size",
        "betas beta1 beta2 adam_beta1 adam_beta2 momentum",
        "dir out_dir output_dir dump_folder default_root_dir",
        "dtype precision",
        "eps epsilon adam_epsilon",
        "eval_every eval_interval eval_steps val_check_interval",
        "every interval save_steps save_every save_interval every_n_train_steps",
        "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches",
        "http_host host",
        "http_port port",
        "keep_last keep_latest_k save_total_limit save_top_k",
        "lr learning_rate base_lr max_lr",
        "max_grad_norm clip grad_clip max_norm clip_grad_norm gradient_clip_val",
        "min_lr_ratio min_lr min_lr_factor",
        "num_heads n_head n_heads num_attention_heads heads",
        "num_layers n_layer n_layers num_hidden_layers layers depth",
        "num_steps steps max_steps train_steps max_iters iterations epochs max_epochs "
        "num_epochs num_train_epochs",
        "path file files data_path dataset data_dir",
        "resume resume_from resume_from_checkpoint",
        "sequence_length seq_len seq_length block_size context_length max_length",
        "tied_head tie_word_embeddings weight_tying",
        "warmup_steps warmup warmup_iters num_warmup_steps",
        "weight_decay wd",
        "width n_embd dim hidden_size d_model embed_dim",
    )
]


def validate(values: dict[str, Any]) -> tuple[RunConfig | None, list[Mistake]]:
    """Return the configuration and no mistakes, or None and all mistakes in `values`."""
    mistakes: list[Mistake] = []
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        # To find the key that was meant takes a while, so only for those that are shown.
        mistakes = list(dict.fromkeys(map(_mistake_of, details[:MAX_SHOWN])))
        mistakes += [Mistake(_path(detail), detail["msg"]) for detail in details[MAX_SHOWN:]]
        # Conflicts can only be found in a valid configuration, so defaults replace invalid values.
        values = copy.deepcopy(values)
        for detail in details:
            _remove(values, _location(detail))
        try:
            config = RunConfig.model_validate(values)
        except ValidationError:
            return None, mistakes
    invalid_paths = [mistake.path for mistake in mistakes]
    mistakes += [
        Mistake(path, problem)
        for path, other, problem in find_conflicts(config)
        # Leave out conflicts that involve a default that has replaced an invalid value.
        if not any(_overlap(key, invalid) for key in (path, other) for invalid in invalid_paths)
    ]
    return (None if mistakes else config), mistakes


def _mistake_of(detail: ErrorDetails) -> Mistake:
    kind, location = detail["type"], _location(detail)
    if kind == "invalid_key" or location[-1] == "[key]":  # such as 3, in a section or `arguments`
        path = ".".join(str(part) for part in location if part != "[key]")
        return Mistake(path, "this key is not text: put it in quotes")
    path = _path(detail)
    if kind == "extra_forbidden":
        tag = str(detail["loc"][1]) if location[0] == "optimizer" else "OffloadAdam"
        # Not split from `path`: the unknown key may have a dot in it.
        parent, name = ".".join(map(str, location[:-1])), str(location[-1])
        return Mistake(path, _unknown_key(parent, name, tag))
    problem = _EXPECTED.get(kind) or PATTERNS.get(detail.get("ctx", {}).get("pattern", ""))
    if problem is None:
        problem = detail["msg"].removeprefix("Value error, ")
        for words, plainer in _PLAINER.items():
            problem = problem.replace(words, plainer)
    value = detail["input"]
    if kind in ("bool_type", "float_type", "int_type") and _is_quoted(value, kind):
        problem += " without quotes"
    elif kind == "int_type" and isinstance(value, float) and value.is_integer():
        problem += f" such as {value:.0f}, without a point or an exponent"
    return Mistake(path, f"{problem}, got {_shown(value)}")


def _is_quoted(value: object, kind: str) -> bool:
    """Return whether a text would be a value of the right type without its quotes."""
    if not isinstance(value, str):
        return False
    if kind == "bool_type":
        return value in ("true", "false")
    try:
        float(value) if kind == "float_type" else int(value)
    except ValueError:
        return False
    return True


def _path(detail: ErrorDetails) -> str:
    """Return the dotted path of the key with the error."""
    location = _location(detail)
    return ".".join(map(str, location[:-1] if detail["type"] == "missing" else location))


def _location(detail: ErrorDetails) -> tuple[int | str, ...]:
    """Return the keys and list indices that lead to the value with the error."""
    # After "optimizer", pydantic inserts the tag of the section that it has validated.
    location = detail["loc"]
    return location[:1] + location[2:] if location[0] == "optimizer" else location


def _shown(value: object) -> str:
    """Return a value as JSON, cut to 60 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _overlap(first: str, second: str) -> bool:
    """Return whether two dotted paths are equal, or one leads to a key inside the other."""
    return f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}.")


def _remove(values: dict[str, Any], location: Sequence[int | str]) -> None:
    """Remove the key at `location` from nested mappings. A list is removed whole, not its item."""
    inner = values.get(str(location[0]))
    if len(location) > 1 and isinstance(inner, dict):
        _remove(inner, location[1:])
    else:
        values.pop(str(location[0]), None)


def _unknown_key(parent: str, name: str, tag: str) -> str:
    """Return the problem of the unknown key `name` in the section `parent`.

    It suggests the nearest keys. If there are none, it lists the keys of the section.

    Args:
        tag: the optimizer whose keys are suggested.
    """
    if nearest := nearest_keys(parent, name, tag):
        return f"unknown key; did you mean {' and '.join(nearest)}?"
    siblings = [known for section, known in _known_keys(tag) if section == parent]
    return f"unknown key; here you can set {', '.join(siblings)}"


def nearest_keys(parent: str, name: str, tag: str = "OffloadAdam") -> list[str]:
    """Return the dotted paths of the keys that `name` in the section `parent` may stand for.

    Keys with this name or a synonym, else the key with the most similar spelling, both first from
    the same section.

    Args:
        tag: the optimizer whose keys are suggested.
    """
    everywhere, name = _known_keys(tag), name.lower()
    siblings = [key for key in everywhere if key[0] == parent]
    synonyms = next((names for names in _SYNONYMS if name in names), {name})
    nearest = _keys_named(synonyms, siblings) or _keys_named(synonyms, everywhere)
    # A higher cutoff in other sections, where a similar name rarely means the same thing.
    nearest = nearest or _spelled_like(name, siblings, 0.65) or _spelled_like(name, everywhere, 0.8)
    return [".".join(key).lstrip(".") for key in nearest]


def _keys_named(names: Collection[str], keys: Sequence[Key]) -> list[Key]:
    return [key for key in keys if key[1] in names]


def _spelled_like(name: str, keys: Sequence[Key], cutoff: float) -> list[Key]:
    return _keys_named(difflib.get_close_matches(name, {key[1] for key in keys}, 1, cutoff), keys)


@cache
def _known_keys(tag: str) -> tuple[Key, ...]:
    """Return all keys of a configuration with this optimizer, sections included."""
    # A dump of the defaults has every key.
    optimizer = RunConfig.model_validate({"optimizer": {"name": tag}}).optimizer
    return tuple(_walk(COMPLETE.model_copy(update={"optimizer": optimizer}).model_dump(), ""))


def _walk(values: dict[str, Any], section: str) -> Iterator[Key]:
    for name, value in values.items():
        yield section, name
        if isinstance(value, dict):
            yield from _walk(value, f"{section}.{name}".lstrip("."))
