"""Nothing depends on torch's default dtype and device: every tensor of ours states both."""

from __future__ import annotations

import ast
from pathlib import Path

import offload_adam

PACKAGE = Path(offload_adam.__file__).parent
FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "sparse_coo_tensor",
    "tensor",
    "zeros",
}


def forgetful_calls(path: Path) -> list[str]:
    """Return the calls in a file that leave a tensor's dtype or device to torch's defaults."""
    return [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: torch.{node.func.attr}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
        and not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}
    ]


def test_every_tensor_states_its_dtype_and_device() -> None:
    """Benchmarks are programs of their own, which leave the defaults alone."""
    paths = [
        path for path in PACKAGE.rglob("*.py") if "bench" not in path.relative_to(PACKAGE).parts
    ]
    assert len(paths) > 100
    assert [call for path in paths for call in forgetful_calls(path)] == []
