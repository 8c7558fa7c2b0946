"""The job's data: text files as byte tokens, split by file, and the batches drawn from them.

files --load_corpus--> Corpus(training, validation) --sample_batch, cut_batch--> Batch
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from offload_adam.config import ConfigError
from offload_adam.config.sections import DataSection

VOCABULARY_SIZE = 256
ByteTokens = npt.NDArray[np.uint8]
_SEPARATOR = b"\0"
# Folders of the standard library that are not read. Tests and installed packages differ between
# installations. pydoc_data has one large file of prose, which would dominate its split.
_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages"}
)


@dataclass(frozen=True)
class Corpus:
    """The tokens of both splits, (num_tokens,) uint8 each, and a line that describes the splits."""

    training: ByteTokens
    validation: ByteTokens
    description: str


class Batch(NamedTuple):
    """Tokens, and for each token the one that follows it; both (batch, time) int64."""

    inputs: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return Batch(self.inputs.to(device), self.targets.to(device))


def load_corpus(data: DataSection, sequence_length: int) -> Corpus:
    """Read and split the files that the configuration names.

    Raises:
        ConfigError: no file matches, a file cannot be read, or a split is shorter than one sequence
            plus one token.
    """
    if data.path is None:
        key, files = "data.source", standard_library_files()
    else:
        key, files = "data.path", matching_files(data.path)
    split = _split_by_position if len(files) == 1 else _split_by_file
    corpus = split(files, data.validation_fraction, key)
    for side, tokens in (("training", corpus.training), ("validation", corpus.validation)):
        if tokens.size <= sequence_length:
            raise ConfigError.at(
                key,
                f"too little data: {tokens.size:,} bytes for {side}, but one sequence needs "
                f"{sequence_length + 1:,} (train.sequence_length + 1); give more text, or change "
                "data.validation_fraction or train.sequence_length",
            )
    return corpus


def standard_library_files(root: Path | None = None) -> dict[str, Path]:
    """Return the standard library's Python files, by their POSIX path relative to `root`."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ConfigError.at(
            "data.source",
            f"the standard library in {root} has no source files; set data.path to your own text",
        )
    return _by_name(files, root)


def matching_files(pattern: str) -> dict[str, Path]:
    """Return the files that match a glob, by their POSIX path relative to its fixed folders.

    The fixed folders are those before the first wildcard.

    Args:
        pattern: `**` matches any number of folders, and `~` at the start is the home folder.

    Raises:
        ConfigError: no file matches.
    """
    pattern = os.path.expanduser(pattern)
    parts = Path(pattern).parts[:-1]
    num_fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root = Path(*parts[:num_fixed])
    paths = [Path(match) for match in glob.glob(pattern, recursive=True)]
    files = [path for path in paths if path.is_file()]
    if not files:
        raise ConfigError.at(
            "data.path",
            f"no file matches {pattern!r}: write an absolute path, or one from the working folder, "
            f"{Path.cwd()}",
        )
    return _by_name(files, root)


def _by_name(files: Iterable[Path], root: Path) -> dict[str, Path]:
    """Return the files by their POSIX path relative to `root`, sorted by it."""
    return dict(sorted((path.relative_to(root).as_posix(), path) for path in files))


def split_by_hash(names: Sequence[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Return the training names and the validation names, in the given order.

    The split of a name depends only on its hash, so it is the same on every rank and machine, and
    stays when other files are added or removed. The only exception: if one split would be empty,
    the name whose hash is nearest to the limit moves to it. Needs two names or more.
    """
    digests = {
        name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names
    }
    # The first 8 bytes of the hash, as a fraction in [0, 1).
    position = {name: int.from_bytes(digests[name][:8], "big") / 2**64 for name in names}
    ordered = sorted(names, key=position.__getitem__)
    limit = max(validation_fraction, position[ordered[0]])  # at least one name for validation
    limit = min(limit, position[ordered[-2]])  # at least one name for training
    training = [name for name in names if position[name] > limit]
    validation = [name for name in names if position[name] <= limit]
    return training, validation


def _split_by_file(files: dict[str, Path], fraction: float, key: str) -> Corpus:
    training, validation = split_by_hash(list(files), fraction)
    train_tokens = _tokens([files[name] for name in training], key)
    validation_tokens = _tokens([files[name] for name in validation], key)
    description = (
        f"{len(training)} file(s), {train_tokens.size:,} bytes for training; "
        f"{len(validation)} file(s), {validation_tokens.size:,} bytes for validation"
    )
    return Corpus(train_tokens, validation_tokens, description)


def _split_by_position(files: dict[str, Path], fraction: float, key: str) -> Corpus:
    tokens = _tokens(files.values(), key)
    start = tokens.size - int(tokens.size * fraction)
    description = (
        f"only one file, split by position: its first {start:,} bytes for training, its last "
        f"{tokens.size - start:,} bytes for validation"
    )
    return Corpus(tokens[:start], tokens[start:], description)


def _tokens(paths: Iterable[Path], key: str) -> ByteTokens:
    """Return the bytes of all files, with a zero byte between two files."""
    try:
        contents = [path.read_bytes() for path in paths]
    except OSError as error:
        raise ConfigError.at(key, f"{error.filename} cannot be read: {error.strerror}") from error
    return np.frombuffer(_SEPARATOR.join(contents), dtype=np.uint8)


def sample_batch(
    tokens: ByteTokens, batch_size: int, sequence_length: int, *, seed: int, first: int
) -> Batch:
    """Draw samples `first` to `first + batch_size - 1` of the run, at uniform positions.

    A sample depends only on the seed and its number, not on the rank or the world size. A resumed
    run therefore needs only the number of samples drawn so far.
    """
    numbers = range(first, first + batch_size)
    num_starts = tokens.size - sequence_length
    starts = [int(np.random.default_rng((seed, number)).integers(num_starts)) for number in numbers]
    return cut_batch(tokens, np.array(starts, dtype=np.int64), sequence_length)


def evaluation_starts(
    num_tokens: int, sequence_length: int, num_sequences: int
) -> npt.NDArray[np.int64]:
    """Return the starts of at most `num_sequences` evenly spread sequences.

    No two of them have a target in common, but the last target of one may be the first input of the
    next.
    """
    num_sequences = min(num_sequences, (num_tokens - 1) // sequence_length)
    last_start = num_tokens - 1 - sequence_length
    return np.linspace(0, last_start, num_sequences).astype(np.int64)


def cut_batch(tokens: ByteTokens, starts: npt.NDArray[np.int64], sequence_length: int) -> Batch:
    """Return the sequences that begin at `starts` (batch,), one row each."""
    rows = tokens[starts[:, np.newaxis] + np.arange(sequence_length + 1)].astype(np.int64)
    return Batch(torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:]))


def bigram_loss(training: ByteTokens, validation: ByteTokens, smoothing: float = 1.0) -> float:
    """Return the validation loss of a bigram model in nats a token: the baseline of a run.

    The model predicts a byte from the previous byte alone. Its probabilities are proportional to
    the counts of byte pairs in the training split plus `smoothing`.
    """
    counts = _pair_counts(training) + smoothing
    log_probabilities = np.log(counts) - np.log(counts.sum(axis=1, keepdims=True))
    seen = _pair_counts(validation)
    return float(-(seen * log_probabilities).sum() / seen.sum())


def _pair_counts(tokens: ByteTokens) -> npt.NDArray[np.int64]:
    """Return how often each byte (column) follows each byte (row), (256, 256) int64."""
    pairs = tokens[:-1].astype(np.int64) * VOCABULARY_SIZE + tokens[1:]
    counts = np.bincount(pairs, minlength=VOCABULARY_SIZE**2)
    return counts.reshape(VOCABULARY_SIZE, VOCABULARY_SIZE)
