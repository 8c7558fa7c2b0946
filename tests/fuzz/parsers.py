"""Feeds a parser bytes that atheris mutates, guided by the code that they reach.

    python -m tests.fuzz.parsers yaml -max_total_time=600
    python -m tests.fuzz.parsers yaml crash-...           runs one input that was found

Each input must be read, or rejected with a clean error: one message of bounded length, without
control characters. libFuzzer also ends the process if one input takes more than 5 s (`-timeout`)
or the process more than 2 GB (`-rss_limit_mb`). An input that fails is written to `crash-<hash>`.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(["offload_adam.config", "offload_adam.checkpoint", "yaml"]):
    from offload_adam.checkpoint.format import parse_manifest, sealed
    from offload_adam.checkpoint.torch_import import import_torch_pickle
    from offload_adam.config import ConfigError, load_config
    from offload_adam.errors import CheckpointError

MAX_LENGTH = 50_000
"""Characters of an error message: 50 mistakes of 500, and the name of the file."""


def read_yaml_file(data: bytes, folder: Path) -> None:
    path = folder / "case.yaml"
    path.write_bytes(data)
    load_config(path)


def read_overrides(data: bytes, folder: Path) -> None:
    path = folder / "case.yaml"
    path.write_text("{}")
    load_config(path, data.decode("utf-8", "surrogateescape").split("\0"))


def read_manifest(data: bytes, folder: Path) -> None:
    """Parse the bytes, and once more with the checksum that their values need."""
    try:
        parse_manifest(data, "m")
    except CheckpointError as error:
        require_clean(error)
    try:
        values = json.loads(data)
        text = sealed(values) if isinstance(values, dict) else "[]"
    except (ValueError, RecursionError):
        return
    parse_manifest(text, "m")


def read_pickle(data: bytes, folder: Path) -> None:
    path = folder / "t.pt"
    path.write_bytes(data)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        import_torch_pickle(path, Path(out) / "c")


PARSERS: dict[str, Callable[[bytes, Path], None]] = {
    "yaml": read_yaml_file,
    "overrides": read_overrides,
    "manifest": read_manifest,
    "pickle": read_pickle,
}


def require_clean(error: Exception) -> None:
    text = str(error)
    assert text, "no message"
    assert len(text) <= MAX_LENGTH, len(text)
    assert text.replace("\n", "").replace("\t", "").isprintable(), repr(text)


def main() -> None:
    parser = PARSERS[sys.argv.pop(1)]
    logging.disable()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:

        def test_one(data: bytes) -> None:
            try:
                parser(data, Path(folder))
            except (ConfigError, CheckpointError) as error:
                require_clean(error)

        limits = ["-timeout=5", "-rss_limit_mb=2048"]
        atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], test_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
