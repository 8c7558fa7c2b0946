"""The training text: which files are read, how they are split, and which errors are raised."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_adam.config import ConfigError
from offload_adam.config.sections import DataSection
from offload_adam.train.data import (
    load_corpus,
    matching_files,
    split_by_hash,
    standard_library_files,
)


def write(root: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_tests_and_installed_packages_are_left_out(tmp_path: Path) -> None:
    kept = {"b.py": b"", "a.py": b"", "json/decoder.py": b"", "testing.py": b""}
    left_out = {
        "test/test_x.py": b"",
        "lib2to3/tests/test_y.py": b"",
        "idlelib/idle_test/z.py": b"",
        "site-packages/numpy/core.py": b"",
        "pydoc_data/topics.py": b"",
        "json/data.txt": b"",
    }
    write(tmp_path, kept | left_out)
    assert list(standard_library_files(tmp_path)) == sorted(kept)


def test_a_standard_library_without_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.source"):
        standard_library_files(tmp_path)


def test_the_standard_library_of_this_python_is_split_about_as_asked() -> None:
    corpus = load_corpus(DataSection.model_validate({}), sequence_length=128)
    share = corpus.validation.size / (corpus.validation.size + corpus.training.size)
    assert corpus.training.size > 4_000_000
    assert 0.05 < share < 0.15


def test_names_of_matches_do_not_depend_on_where_the_folder_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"x/a.txt": b"1", "x/deep/er/b.txt": b"2", "x/c.md": b"3"})
    absolute = list(matching_files(f"{tmp_path}/x/**/*.txt"))
    monkeypatch.chdir(tmp_path)
    relative = list(matching_files("x/**/*.txt"))
    assert absolute == relative == ["a.txt", "deep/er/b.txt"]
    assert list(matching_files("x/c.md")) == ["c.md"]


def test_no_match_is_an_error_that_names_the_pattern(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: no file matches .*\.txt"):
        matching_files(f"{tmp_path}/**/*.txt")


def test_a_names_side_does_not_depend_on_the_other_names() -> None:
    names = [f"folder/file{number}.py" for number in range(1000)]
    training, validation = split_by_hash(names, 0.1)
    assert sorted(training + validation) == sorted(names)
    assert 60 < len(validation) < 140
    fewer_training, fewer_validation = split_by_hash(names[::2], 0.1)
    assert set(fewer_training) <= set(training)
    assert set(fewer_validation) <= set(validation)


def test_the_split_is_that_of_sha256() -> None:
    """`printf d.py | sha256sum` prints less than 3333..., a fifth of ffff...; for a.py, more."""
    _, validation = split_by_hash([f"{letter}.py" for letter in "abcdefghijklmnopqrst"], 0.2)
    assert "".join(name[0] for name in validation) == "deginoq"


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_neither_side_is_empty(fraction: float) -> None:
    for count in (2, 3, 7):
        training, validation = split_by_hash([f"{n}.txt" for n in range(count)], fraction)
        assert training
        assert validation
        assert len(training) + len(validation) == count


def test_files_are_joined_whole_on_one_side_each(tmp_path: Path) -> None:
    contents = {f"{n}.txt": bytes([n]) * 50 for n in range(1, 9)}
    write(tmp_path, contents)
    data = DataSection(path=f"{tmp_path}/*.txt", validation_fraction=0.4)
    corpus = load_corpus(data, sequence_length=8)
    sides = [bytes(corpus.training), bytes(corpus.validation)]
    for content in contents.values():
        assert sorted(content in side for side in sides) == [False, True]
    assert sum(len(side) for side in sides) == 8 * 50 + 8 - 2  # a zero between each two


def test_one_file_is_split_by_position_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, {"only.txt": bytes(range(200))})
    corpus = load_corpus(DataSection(path=f"{tmp_path}/only.txt"), sequence_length=8)
    assert bytes(corpus.training) == bytes(range(180))
    assert bytes(corpus.validation) == bytes(range(180, 200))
    assert "split by position" in corpus.description


def test_too_little_text_is_an_error_with_the_numbers(tmp_path: Path) -> None:
    write(tmp_path, {"only.txt": bytes(200)})
    data = DataSection(path=f"{tmp_path}/only.txt")
    load_corpus(data, sequence_length=19)
    with pytest.raises(ConfigError, match=r"20 bytes for validation.* needs 21"):
        load_corpus(data, sequence_length=20)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with pytest.raises(ConfigError, match=r"data\.path"):
        load_corpus(DataSection(path=f"{tmp_path}/*.txt"), sequence_length=8)
