"""The tables of docs/does-it-fit.md and README's answer are those that `plan` gives."""

from __future__ import annotations

import pytest

from tests.bench import fits


def test_the_pages_are_up_to_date() -> None:
    """`python -m tests.bench.fits --write` brings them up to date."""
    page = fits.PAGE.read_text(encoding="utf-8")
    assert fits.replaced(page, "fit table", fits.fit_section()) == page
    readme = fits.README.read_text(encoding="utf-8")
    assert fits.replaced(readme, "plan", fits.plan_answer()) == readme


@pytest.mark.parametrize(
    ("name", "numel"),
    [
        ("Llama 3.2 1B", 1_235_814_400),
        ("Llama 3.2 3B", 3_212_749_824),
        ("Mistral 7B v0.3", 7_248_023_552),
        ("Llama 3.1 8B", 8_030_261_248),
        ("Qwen2.5 14B", 14_770_033_664),
        ("Qwen2.5 32B", 32_763_876_352),
        ("Llama 3.1 70B", 70_553_706_496),
    ],
)
def test_models_have_their_published_number_of_parameters(name: str, numel: int) -> None:
    # The shape leaves out Qwen's biases: 0.01%.
    assert fits.MODELS[name].numel == pytest.approx(numel, rel=2e-4)


def test_a_page_without_the_marker_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no <!-- fit table -->"):
        fits.replaced("# A page\n", "fit table", "")
