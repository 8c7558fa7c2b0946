"""The colors of the charts: anyone can tell them apart, and from the page."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from offload_adam.profiling.phases import COLORS

LEAST = {"normal": (0.10, 0.15), "protanopia": (0.065, 0.09), "deuteranopia": (0.065, 0.09)}
"""Oklab distance of any two colors, and of neighbors. 0.02 is just visible on large patches."""
LEAST_CONTRAST = 1.5
ORDER = (
    *("other", "data", "forward", "backward", "pack", "late rank", "reduce", "D2H copy", "norm"),
    *("agree", "edits", "update", "gather", "loss", "all-reduce", "data"),
)
NEIGHBORS = {
    *pairwise(ORDER),
    *(("backward", "reduce"), ("norm", "late rank"), ("late rank", "agree"), ("agree", "update")),
    *(("update", "H2D copy"), ("H2D copy", "gather"), ("forward", "update wait")),
    *(("forward", "gather"), ("update", "checkpoint wait"), ("agree", "device update")),
    *(("late rank", "gather"), ("late rank", "all-reduce"), ("step", "reduce"), ("step", "agree")),
    *(("step", "pack"), ("step", "update"), ("step", "late rank"), ("wait previous", "reduce")),
}
"""Phases that follow each other, or enclose each other, in a step."""

VISIONS = {
    "normal": np.eye(3),
    # Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision
    # Deficiency" (2009), severity 1, for linear RGB.
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}
# Ottosson, "A perceptual color space for image processing" (2020).
CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def linear(color: str) -> np.ndarray:
    """Return red, green and blue from 0 to 1, proportional to light (IEC 61966-2-1)."""
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(color: str, vision: np.ndarray) -> np.ndarray:
    """Return lightness, green to red and blue to yellow, as seen."""
    seen = np.clip(vision @ linear(color), 0.0, 1.0)
    return np.asarray(OKLAB @ np.cbrt(CONES @ seen))


def test_oklab_is_that_of_its_definition() -> None:
    for color, expected in {
        "#FFFFFF": (1.0, 0.0, 0.0),
        "#FF0000": (0.6280, 0.2249, 0.1258),
        "#0000FF": (0.4520, -0.0325, -0.3115),
    }.items():
        np.testing.assert_allclose(oklab(color, VISIONS["normal"]), expected, atol=2e-4)


@pytest.mark.parametrize("vision", VISIONS)
def test_any_two_colors_differ(vision: str) -> None:
    seen = {name: oklab(color, VISIONS[vision]) for name, color in COLORS.items()}
    least, least_of_neighbors = LEAST[vision]
    near = {
        pair: round(distance, 3)
        for pair in combinations(seen, 2)
        if (distance := float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])))
        < (least_of_neighbors if {pair, pair[::-1]} & NEIGHBORS else least)
    }
    assert near == {}


def test_all_names_of_neighbors_have_a_color() -> None:
    assert {name for pair in NEIGHBORS for name in pair} <= set(COLORS)


@pytest.mark.parametrize("name", COLORS)
def test_a_color_stands_out_from_the_white_page(name: str) -> None:
    # WCAG 2.2, "contrast ratio". Bars are wide, and have their place in the order of a step.
    assert 1.05 / (linear(COLORS[name]) @ LUMINANCE + 0.05) >= LEAST_CONTRAST
