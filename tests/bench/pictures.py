"""`python -m tests.bench.pictures`: draw the pictures of a report in docs/guides/profile.md.

It profiles the example of that page on two ranks, prints the lines that the page quotes, and draws
charts of its `report.html` as PNG files, by the library that draws them in a browser. With
`--report`, it draws the charts of a report that exists.

All other pictures show measurements, which draw them with `--picture`: `tests.bench.convergence`
and `tests.bench.tracking` those of docs/internals/state-formats.md, and `tests.bench.table` the
step times of `bench train`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.report_page import read_page
from tests.support.torchrun import ROOT, run_two_ranks

EXAMPLE = (
    *("-m", "offload_adam", "profile", str(ROOT / "configs" / "tiny.yaml"), "--run.name=slow"),
    *("--model.sizes.width=768", "--model.sizes.num_heads=12", "--train.batch_size=1"),
    *("--train.gradient_accumulation_steps=1", "--train.num_steps=20", "--train.eval_every=0"),
    "--train.eval_sequences=2",
)
"""The command of that page, with an absolute path."""
PICTURES = {"gantt": ("report-time.png", 5), "memory-0": ("report-memory.png", 4)}
"""File name and columns of the legend, by the key of a chart."""
WIDTH, SCALE = 640, 2.0
"""Width in pixels, and how many pixels of the PNG each of them has: read well at half size."""


def draw(spec: dict[str, Any], path: Path, num_columns: int) -> None:
    """Draw a chart of a report below its title.

    Args:
        spec: in Vega-Lite; changed.
        num_columns: of the legend.
    """
    import vl_convert

    spec["layer"][0]["encoding"]["color"]["legend"]["columns"] = num_columns
    title = {"fontSize": 16, "anchor": "start", "frame": "group", "offset": 12}
    changes = {"title": spec["description"], "width": WIDTH, "background": "white", "padding": 12}
    picture = {**spec, **changes, "config": {**spec["config"], "title": title}}
    path.write_bytes(vl_convert.vegalite_to_png(picture, scale=SCALE))


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile the example unless there is a report, and draw its pictures."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/guides/profile.md.")
    parser.add_argument("--report", type=Path, help="a report.html that exists")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where to write them")
    options = parser.parse_args(arguments)
    with TemporaryDirectory(prefix="pictures-") as folder:
        if options.report is None:
            run_two_ranks([*EXAMPLE, f"--run.dir={folder}"], ROOT, timeout_s=600.0)
        page = read_page(options.report or Path(folder) / "slow" / "report.html")
    # What the page quotes.
    for line in page.text.splitlines():
        if line.startswith(("A step takes", "Memory peaked", "Updates move")):
            print(line, end="\n\n")
    for key, (name, num_columns) in PICTURES.items():
        draw(page.specs[key], options.folder / name, num_columns)


if __name__ == "__main__":
    main()
