"""Text as byte tokens, split by file into what the model trains on and what it is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offload_adam.config import ConfigError
from offload_adam.config.sections import DataSection
from offload_adam.train.sources import SourceFile, matching_files, standard_library_files

VOCABULARY_SIZE = 256
ByteTokens = npt.NDArray[np.uint8]
_SEPARATOR = b"\0"


@dataclass(frozen=True)
class Corpus:
    """The tokens of both splits, (num_tokens,) uint8 each, and one line that says what they are."""

    training: ByteTokens
    validation: ByteTokens
    description: str


def load_corpus(data: DataSection, sequence_length: int) -> Corpus:
    """Read and split the files that the configuration names.

    Raises: ConfigError where nothing matches, a file cannot be read, or a split is shorter than
        one sequence and its next token.
    """
    if data.path is None:
        key, files = "data.source", standard_library_files()
    else:
        key, files = "data.path", matching_files(data.path)
    if len(files) == 1:
        corpus = _split_by_position(files[0], data.validation_fraction, key)
    else:
        corpus = _split_by_file(files, data.validation_fraction, key)
    _reject_too_little(corpus, sequence_length, key)
    return corpus


def split_by_hash(names: Sequence[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Return the training names and the validation names, in the given order.

    A name's side depends on nothing but its own hash, so that it is the same on every rank and
    machine and stays when files come or go. Only where one side would be empty does the name
    nearest to it change over. Needs two names or more.
    """
    place = {name: _place_in_unit_interval(name) for name in names}
    ordered = sorted(names, key=place.__getitem__)
    limit = max(validation_fraction, place[ordered[0]])
    limit = min(limit, place[ordered[-2]])
    training = [name for name in names if place[name] > limit]
    validation = [name for name in names if place[name] <= limit]
    return training, validation


def _place_in_unit_interval(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split_by_file(files: list[SourceFile], fraction: float, key: str) -> Corpus:
    by_name = {file.name: file for file in files}
    training, validation = split_by_hash(list(by_name), fraction)
    train_tokens = _tokens([by_name[name] for name in training], key)
    validation_tokens = _tokens([by_name[name] for name in validation], key)
    description = (
        f"{len(training)} file(s), {train_tokens.size:,} bytes for training; "
        f"{len(validation)} file(s), {validation_tokens.size:,} bytes for validation"
    )
    return Corpus(train_tokens, validation_tokens, description)


def _split_by_position(file: SourceFile, fraction: float, key: str) -> Corpus:
    tokens = _tokens([file], key)
    start = tokens.size - int(tokens.size * fraction)
    description = (
        f"one file only, so it is split by position: its first {start:,} bytes for training, "
        f"its last {tokens.size - start:,} bytes for validation"
    )
    return Corpus(tokens[:start], tokens[start:], description)


def _tokens(files: list[SourceFile], key: str) -> ByteTokens:
    """Return the bytes of all files with a zero byte between each two."""
    try:
        contents = [file.path.read_bytes() for file in files]
    except OSError as error:
        raise ConfigError.at(key, f"cannot be read: {error}") from error
    return np.frombuffer(_SEPARATOR.join(contents), dtype=np.uint8)


def _reject_too_little(corpus: Corpus, sequence_length: int, key: str) -> None:
    for split, tokens in (("training", corpus.training), ("validation", corpus.validation)):
        if tokens.size <= sequence_length:
            raise ConfigError.at(
                key,
                f"too little data: {tokens.size:,} bytes for {split}, but one sequence needs "
                f"{sequence_length + 1:,} (train.sequence_length and its next token); "
                "give more text, or change data.validation_fraction or train.sequence_length",
            )
