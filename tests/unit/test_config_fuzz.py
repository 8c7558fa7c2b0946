"""Any configuration file and command line is read, or is a ConfigError."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload_adam.config import ConfigError, RunConfig, dump_config, load_config
from offload_adam.config.sections import COMPLETE

SECTIONS = sorted(RunConfig.model_fields)
KEYS = sorted({key for section in COMPLETE.model_dump().values() for key in section})
PLAIN: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**20)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["auto", "never", "fp32", "Adam", "external", "1e-3", "a:b", "/"])
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FILES = st.dictionaries(
    st.sampled_from(SECTIONS) | st.text(max_size=4),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3) | VALUES,
    max_size=3,
)


def read_or_reject(text: str | bytes, *overrides: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.yaml"
        path.write_bytes(text.encode("utf-8", "replace") if isinstance(text, str) else text)
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            rejected = error
        else:
            path.write_text(dump_config(config), encoding="utf-8")
            assert load_config(path) == config  # the resolved configuration reads back
            return
    assert rejected.mistakes
    assert str(rejected)


@settings(max_examples=60)
@given(FILES)
@example({"Adam": {}})
@example({"optimizer": {"Adam": {}}})
def test_any_mapping_is_read_or_rejected(values: dict[str, Any]) -> None:
    read_or_reject(yaml.safe_dump(values))


@settings(max_examples=60)
@given(st.text(max_size=60) | st.binary(max_size=40))
@example("a: &a [*a]")
@example("&a {a: *a}")
@example("run: !!python/object/apply:os.system [true]")
@example("? [1, 2]\n: 3")
@example("a: 0b_")
@example("run: {name: \u0000}")
@example("[" * 1200)
@example("- " * 1200)
@example("{" * 1200)
def test_any_text_is_read_or_rejected(text: str | bytes) -> None:
    read_or_reject(text)


@settings(max_examples=60)
@given(
    st.lists(
        st.text(max_size=12)
        | st.tuples(st.sampled_from(SECTIONS), st.sampled_from(KEYS), st.text(max_size=8)).map(
            lambda parts: f"--{parts[0]}.{parts[1]}={parts[2]}"
        ),
        max_size=3,
    )
)
@example(["--run.name=" + "[" * 1200])
def test_any_override_is_read_or_rejected(overrides: list[str]) -> None:
    read_or_reject("{}", *overrides)
