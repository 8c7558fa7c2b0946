"""What every test can use: the ranks, and a summary of which kinds of tests ran."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest

from tests.support.marker_summary import MarkerSummary
from tests.support.ranks import RankPool

with contextlib.suppress(ImportError):  # the tests for a GPU do without it
    import hypothesis

    # How long an example takes, to make or to try, is up to what else runs here.
    hypothesis.settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Return the pool of gloo ranks, kept for the session; a test that uses it is `distributed`."""
    with RankPool() as pool:
        yield pool


@pytest.fixture
def own_ranks() -> Iterator[RankPool]:
    """Return a pool whose ranks may hang or die, so that other tests keep theirs."""
    with RankPool() as pool:
        yield pool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-marker",
        metavar="MARKER",
        help="fail the run if no test with this marker passed",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(MarkerSummary(config))


def pytest_collection_finish() -> None:
    """Spare the tests' many collections what has been imported by now, and lives on."""
    gc.collect()
    gc.freeze()


# First, because -m selects by what this adds.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"ranks", "own_ranks"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.distributed)
