"""The configuration of the documentation's site: `launch/docs.sh` builds it.

Three parts of the reference are made from the code at each build:

    docstrings              -->  autodoc and napoleon, after `_as_rst`
    the options' models     -->  reference/generated/configuration.md
    typer's and argparse's  -->  reference/generated/commands.md
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["COLUMNS"] = "100"  # width of argparse's help

from offload_adam import __version__
from offload_adam.bench.__main__ import main as bench
from offload_adam.config.load import write_yaml
from offload_adam.config.reference import all_keys, allowed_by, kinds_of

HERE = Path(__file__).parent
GENERATED = HERE / "reference" / "generated"

project = "offload_adam"
copyright = "The offload_adam developers"
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "reference/generated"]
html_theme = "furo"
smartquotes = False  # would change --option and "text" on the pages
html_title = f"offload_adam {version}"
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"  # copy commands without the prompt and their output

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True  # OffloadPolicy(), without all its options
maximum_signature_line_length = 100
autodoc_mock_imports = ["accelerate", "lightning", "transformers"]
napoleon_use_rtype = False
napoleon_use_ivar = True
# Classes of other packages, and of ours that are not public.
nitpick_ignore_regex = [
    ("py:.*", r"(abc|torch|collections|offload_adam\.coordinator|TrainerCallback|DDPStrategy).*")
]

# A section of a docstring that napoleon does not know, such as "Cost: 4 MiB of host memory."
_SECTION = re.compile(r"(Cost|Lifecycle|Owns|Source|Threads): ")


def _as_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Change a docstring, in place, to what napoleon and docutils read as it is meant."""
    rewritten: list[str] = []
    in_section = False
    for number, line in enumerate(lines):
        following = next((text for text in lines[number + 1 :] if text), "")
        if _SECTION.match(line):
            in_section = True
            rewritten += ["", _SECTION.sub(r"**\1:** ", line)]
        elif in_section and line.startswith(" "):
            rewritten.append(line.strip())
        else:
            in_section = False
            rewritten.append(line)
            # An indented block after an empty line is code or a formula.
            is_deeper = _indent(following) >= _indent(line) + 4
            if line and is_deeper and lines[number + 1 : number + 2] == [""]:
                rewritten += ["", " " * _indent(line) + "::"]
    lines[:] = rewritten


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _configuration() -> str:
    """Return a table of the keys of each section, with values and meaning, as Markdown."""
    text = []
    for key in all_keys():
        meaning = key.schema.get("description", "")
        if "." not in key.path:
            other = f" with `{key.condition}`" if key.condition else ""
            text += ["", f"## {key.path}{other}", "", meaning, ""]
            text += ["| key | values | default | meaning |", "|---|---|---|---|"]
            continue
        cells = [f"`{key.path}`", "section", "", meaning]
        if not key.is_section:
            cells[1] = ": ".join(filter(None, (kinds_of(key.schema), allowed_by(key.schema))))
            default = key.schema.get("default", "")
            written = write_yaml({"": default}).partition(":")[2].strip()
            if isinstance(default, list):
                written = re.sub(r"\s*\n\s*", ", ", written).replace("- ", "")
            cells[2] = f"`{written}`" if default != "" else ""
        text.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*text, ""])


def _commands() -> str:
    """Return the help of every command as Markdown."""
    command = [sys.executable, "-m", "typer", "offload_adam.cli.app"]
    done = subprocess.run(
        [*command, "utils", "docs", "--name", "offload-adam"],
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    text = done.stdout.partition("\n## ")[2]
    helps = []
    for name in ("kernel", "step", "fsdp2", "train"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            bench([name, "--help"], prog="offload-adam bench")
        helps.append(f"### `offload-adam bench {name}`\n\n```text\n{printed.getvalue()}```\n")
    return "\n".join([f"## {text}", *helps])


GENERATED.mkdir(exist_ok=True)
(GENERATED / "configuration.md").write_text(_configuration(), encoding="utf-8")
(GENERATED / "commands.md").write_text(_commands(), encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Register the hook on docstrings, which Sphinx calls this function for."""
    # Before napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", _as_rst, priority=400)
