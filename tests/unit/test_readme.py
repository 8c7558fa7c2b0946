"""README.md and the pages of docs/: what they name exists, and what they print runs.

A block of Python or of shell commands runs in the order of its page, unless the line above it says

    <!-- not run: REASON -->     why not: it needs a GPU, minutes, the network, ...
    <!-- run by: tests/... -->   another test runs it, with settings of its own
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BUILT = (DOCS / "_build", DOCS / "reference" / "generated")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted(
        page for page in DOCS.glob("**/*.md") if not any(page.is_relative_to(b) for b in BUILT)
    ),
]
SHELLS = ("sh", "bash", "console")
BLOCK = re.compile(
    r"^(?:<!-- ((?:not run|run by): .+) -->\n)?(?P<fence>```+)(.*)\n((?s:.*?))^(?P=fence)$",
    flags=re.MULTILINE,
)


class Block(NamedTuple):
    """A fenced block. `mark` is the comment above it, such as "not run: REASON"; "" if none."""

    line: int
    language: str
    mark: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, match.start("fence")) + 1, match[3], match[1] or "", match[4])
        for match in BLOCK.finditer(text)
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def to_run(page: Path, languages: tuple[str, ...]) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in languages and not block.mark]


WITH_PYTHON = [page for page in PAGES if to_run(page, ("python",))]
# The commands of docs/operate take minutes: tests/launch/test_operate_guides.py runs them.
WITH_COMMANDS = [page for page in PAGES if page.parent.name != "operate" and to_run(page, SHELLS)]


def commands_of(block: Block) -> str:
    """Return a block's commands; in a console's block, those after a prompt."""
    if block.language != "console":
        return block.text
    continued = r"^\$ ((?:.*\\\n)*.*)$"
    return "\n".join(re.findall(continued, block.text, flags=re.MULTILINE)) + "\n"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_block_has_a_language_and_each_mark_is_true(page: Path) -> None:
    for block in blocks_of(page):
        where = f"{name_of(page)}:{block.line}"
        assert block.language, f"{where}: the block has no language: python, sh, yaml, text, ..."
        what, _, named = block.mark.partition(": ")
        if what == "run by":
            assert name_of(page) in (ROOT / named).read_text(encoding="utf-8"), where


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in to_run(page, ("python",)):
        # Empty lines in front, so that a traceback has the page's line numbers.
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """Run them in a folder with the files of a checkout, in which a run may write its own."""
    for item in ROOT.iterdir():
        if item.name not in (".git", "runs"):
            (tmp_path / item.name).symlink_to(item)
    script = "\n".join(map(commands_of, to_run(page, SHELLS)))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_the_marks_are_seen(tmp_path: Path) -> None:
    text = "<!-- not run: REASON -->\n```sh\nfalse\n```\n\n```console\n$ echo \\\n  2\n1\n```\n"
    (tmp_path / "page.md").write_text(text)
    marked, unmarked = blocks_of(tmp_path / "page.md")
    assert (marked.mark, marked.language) == ("not run: REASON", "sh")
    assert (unmarked.mark, commands_of(unmarked)) == ("", "echo \\\n  2\n")


def test_every_test_that_a_page_names_exists() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 100
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    assert named <= set(re.findall(r"^def (test_\w+)\(", sources, flags=re.MULTILINE))


def test_every_link_between_pages_has_a_target() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{name_of(page)} links to {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), flags=re.M)
                anchors = [
                    re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in headings
                ]
                assert heading in anchors, f"{name_of(page)} links to {target}#{heading}"


def test_every_kind_of_failure_names_a_test() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    section = text[text.index("## Failures") :].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*) \|$", section, flags=re.MULTILINE)[1:]
    assert len(rows) > 20
    assert [row for row in rows if "`test_" not in row] == []


def test_the_errors_are_those_of_the_code() -> None:
    """`...` in a message of the page stands for names and values; the rest is in the code."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| ", page.partition("## Failures")[0], flags=re.MULTILINE)
    texts = []
    for path in ROOT.glob("offload_adam/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values = node.values if isinstance(node, ast.JoinedStr) else [node]
            constants = [part.value for part in values if isinstance(part, ast.Constant)]
            texts.append("".join(text for text in constants if isinstance(text, str)))
    code = "\n".join(texts)
    messages = [text for row in rows for text in re.findall(r"`([^`]+ [^`]+)`", row)]
    assert len(messages) >= len(rows) > 15
    parts = [part.strip(" :") for message in messages for part in message.split("...")]
    assert [part for part in parts if part not in code] == []


def test_the_supported_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "launch/constraints.txt").read_text(), flags=re.M)
    )
    page = (DOCS / "reference/compatibility.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w[\w ]*) \| ([^|]+ \| [^|]+) \|$", page, flags=re.M))
    assert rows["Python"].startswith(project["requires-python"].strip(">=") + " or newer | ")
    wanted = [*project["dependencies"], *project["optional-dependencies"]["integrations"]]
    checked = 0
    for requirement in wanted:
        name, floor, below = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<(.*))?", requirement).groups()  # type: ignore[union-attr]
        if name in rows:
            ceiling = f", below {below}" if below else ""
            assert rows[name] == f"{floor} or newer{ceiling} | {pins[name]}"
            checked += 1
    assert checked == 7
    assert ("Linux" in rows["operating system"]) == (
        "Operating System :: POSIX :: Linux" in project["classifiers"]
    )
