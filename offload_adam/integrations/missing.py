"""How to install an extra of this package, and the error if one of its libraries is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shlex import quote
from urllib.parse import unquote, urlsplit

from offload_adam.errors import MissingExtraError

_NAME = "offload-adam"
_SOURCES = Path(__file__).parents[2]


@contextmanager
def explain_missing(library: str) -> Iterator[None]:
    """Name the extra to install if the body's import of `library` fails.

    Raises:
        MissingExtraError: `library` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != library:
            raise  # a broken installation: its own message names the missing module
        raise MissingExtraError(
            f"{library} is not installed: {how_to_install('integrations')}"
        ) from error


def how_to_install(extra: str) -> str:
    """Return what to run to add an extra to this installation, such as "run pip install ...".

    An editable installation stays editable: without -e, a copy would replace it.

    Source: PEP 610, for direct_url.json, which pip writes unless it installs from an index.
    """
    try:
        text = distribution(_NAME).read_text("direct_url.json")
        origin = json.loads(text) if text else {}
    except PackageNotFoundError:  # imported from a folder on sys.path
        origin = {"url": _SOURCES.as_uri(), "dir_info": {"editable": True}}
    except ValueError:
        origin = {}
    url = origin.get("url", "")
    if "dir_info" in origin:
        flag = "-e " if origin["dir_info"].get("editable") else ""
        return f"run pip install {flag}'.[{extra}]' in {quote(unquote(urlsplit(url).path))}"
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    source = f" @ {url}" if url else ""
    return f"run pip install {quote(f'{_NAME}[{extra}]{source}')}"
