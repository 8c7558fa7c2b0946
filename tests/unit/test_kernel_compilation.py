"""Compiled kernels: vectorised, cached where possible, and never stale."""

from __future__ import annotations

import logging
import platform
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
import pytest
from filelock import FileLock
from numba.core import caching

from offload_adam.kernels import (
    adam,
    adam_8bit_ir,
    adam_bf16_ir,
    adam_plain,
    compilation,
    fold,
    norm,
)
from offload_adam.kernels.formats import FloatFormat
from offload_adam.kernels.intrinsics import block_sum_of_squares
from tests.unit.kernel_subprocess import CHECKOUT, ONE_UPDATE, run_python


def double(values: Any) -> Any:
    """Serve as a kernel that compiles at once."""
    return values * 2


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder that Numba caches in, rather than beside the sources."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    return tmp_path


def test_without_any_cache_folder_a_kernel_warns_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        kernel = compilation.jit(double)
    compilation.compile_now(kernel, (3.0,), "double")
    assert kernel(3.0) == 6.0


def test_without_a_home_folder_nothing_is_cached_in_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba would create a folder named "~" there. A checkout or package is read-only here."""
    monkeypatch.setattr(compilation, "__file__", str(tmp_path / "missing" / "compilation.py"))
    monkeypatch.setattr("numba.core.config.CACHE_DIR", "")
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserWideCacheLocator])
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "~")  # as expanduser returns it where there is none
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        kernel = compilation.jit(double)
    compilation.compile_now(kernel, (3.0,), "double")
    assert kernel(3.0) == 6.0
    assert list(tmp_path.iterdir()) == []


def test_a_warning_during_an_import_points_at_the_users_line() -> None:
    output = run_python(
        """
        import warnings
        from numba.core import caching
        caching.CacheImpl._locator_classes = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from offload_adam.kernels import norm  # line 7 of this script, which starts empty
        print({(str(one.filename), one.lineno) for one in caught if "folder" in str(one.message)})
        """
    )
    assert output == "{('<string>', 7)}\n"


def test_a_cache_that_cannot_be_written_warns_and_is_given_up(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no space left on device")

    kernel = compilation.jit(double)
    monkeypatch.setattr(caching.IndexDataCacheFile, "save", refuse)
    with pytest.warns(RuntimeWarning, match="no space left") as caught:
        compilation.compile_now(kernel, (3.0,), "double")
    assert [warning.filename for warning in caught] == [__file__]
    assert kernel(3.0) == 6.0
    assert kernel(3) == 6  # a second specialisation does not try the disk again
    assert not list(cache_folder.rglob("*.nbc"))


def test_the_cache_is_used(cache_folder: Path) -> None:
    compilation.compile_now(compilation.jit(double), (3.0,), "double")
    assert list(cache_folder.rglob("*.nbc"))
    again = compilation.jit(double)
    compilation.compile_now(again, (3.0,), "double")
    assert sum(again.stats.cache_hits.values()) == 1


def test_a_kernel_waits_for_the_process_that_compiles_it(cache_folder: Path) -> None:
    kernel = compilation.jit(double)
    lock = FileLock(Path(kernel.stats.cache_path) / "double.lock")
    lock.acquire()
    waiting = threading.Thread(target=compilation.compile_now, args=(kernel, (3.0,), "double"))
    waiting.start()
    waiting.join(0.5)
    assert not kernel.overloads
    lock.release()
    waiting.join(60)
    assert kernel(3.0) == 6.0
    assert len(kernel.overloads) == 1


def test_a_lock_that_is_never_given_back_stops_nobody(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compilation, "LOCK_TIMEOUT_S", 0.0)
    kernel = compilation.jit(double)
    with FileLock(Path(kernel.stats.cache_path) / "double.lock"):
        compilation.compile_now(kernel, (3.0,), "double")
    assert kernel(3.0) == 6.0
    assert "Compiling without a lock" in caplog.text


def test_a_slow_compilation_is_announced(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compilation, "SLOW_COMPILATION_S", 0.0)
    kernel = compilation.jit(double)
    with caplog.at_level(logging.INFO, logger="offload_adam.kernels.compilation"):
        compilation.compile_now(kernel, (3.0,), "double")
        compilation.compile_now(kernel, (3.0,), "double")
    assert caplog.text.count("Compiling the double kernel") == 1


def test_inner_functions_have_no_cache_of_their_own() -> None:
    # Its key is their own file, so it would outlive a change in the intrinsics that they inline.
    for function in (adam.update_range, fold.add_range, fold.copy_range, norm.sum_range):
        assert isinstance(function._cache, caching.NullCache)


@pytest.mark.slow
def test_a_change_in_an_inlined_file_reaches_the_cached_kernel(tmp_path: Path) -> None:
    kernels = tmp_path / "offload_adam" / "kernels"
    for package in ("kernels", "layout"):
        shutil.copytree(
            CHECKOUT / "offload_adam" / package,
            kernels.parent / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(CHECKOUT / "offload_adam" / "errors.py", kernels.parent)
    (kernels.parent / "__init__.py").touch()
    source = ONE_UPDATE + "run_one_update(); print(weight[0])"
    assert float(run_python(source, root=tmp_path)) == pytest.approx(-0.1)
    vectors = kernels / "ir_vectors.py"
    text = vectors.read_text(encoding="utf-8")
    changed = text.replace('return self._call("fma", a, b, c)', "return c")
    assert changed != text
    vectors.write_text(changed, encoding="utf-8")
    assert float(run_python(source, root=tmp_path)) != pytest.approx(-0.1)


def vector_instructions(assembly: str, mnemonic: str) -> int:
    """Return how often a packed instruction on 256- or 512-bit registers occurs."""
    return len(re.findall(rf"\b{mnemonic}\b[^\n]*%[yz]mm", assembly))


has_avx2 = platform.machine() == "x86_64" and all(
    llvmlite.binding.get_host_cpu_features().get(feature) for feature in ("avx2", "fma")
)


def assembly_of(update_range: Any, gradient_format: FloatFormat, place: tuple[Any, ...]) -> str:
    """Return the assembly of an element loop on float32 state that writes bfloat16 parameters.

    It is compiled here, because Numba has no assembly of a kernel from its cache.
    """
    state, param_out = np.zeros(0, dtype=np.float32), FloatFormat.BFLOAT16.dtype_tag()
    kernel = compilation.jit_inlined(update_range)
    gradient = gradient_format.dtype_tag()
    arguments = (gradient, state, None, state, state, None, param_out, *place, state, None, 0)
    compilation.compile_now(kernel, arguments, "update")
    (assembly,) = kernel.inspect_asm().values()
    return str(assembly)


@pytest.mark.skipif(not has_avx2, reason="looks for AVX2's instructions")
@pytest.mark.parametrize("gradient_format", FloatFormat)
def test_the_update_vectorises(gradient_format: FloatFormat) -> None:
    assembly = assembly_of(adam.update_range.py_func, gradient_format, (None, None, 0))
    assert vector_instructions(assembly, "vsqrtps") > 0
    assert vector_instructions(assembly, "vdivps") > 0
    assert vector_instructions(assembly, r"vfn?madd\d+ps") >= 5
    # For some processors (Zen 4), LLVM rounds and stores in one instruction of AVX-512, which is
    # never nontemporal.
    assert vector_instructions(assembly, "vmovnt(ps|dq)") or re.search(
        r"\bvpmovdw\s+%zmm\d+, -?\d*\(%r", assembly
    )


@pytest.mark.skipif(not has_avx2, reason="looks for AVX2's instructions")
def test_the_plain_update_vectorises() -> None:
    assembly = assembly_of(adam_plain.update_range, FloatFormat.BFLOAT16, (0, 0))
    assert vector_instructions(assembly, "vsqrtps") > 0
    assert vector_instructions(assembly, "vdivps") > 0
    assert vector_instructions(assembly, r"vfn?madd\d+ps") >= 5


@pytest.mark.skipif(not has_avx2, reason="looks for AVX2's instructions")
@pytest.mark.parametrize("is_split", [True, False])
def test_the_update_of_bfloat16_state_vectorises(is_split: bool) -> None:
    kernel = compilation.jit_inlined(adam_bf16_ir.update_range)
    half, single = FloatFormat.BFLOAT16.dtype_tag(), FloatFormat.FLOAT32.dtype_tag()
    master, remainder = (half, np.zeros(0, dtype=np.int16)) if is_split else (single, None)
    arguments = (half, master, remainder, half, half, None, None, 0, 0, single, None, 0)
    compilation.compile_now(kernel, arguments, "update")
    (assembly,) = kernel.inspect_asm().values()
    assert vector_instructions(assembly, "vdivps") >= 16
    assert vector_instructions(assembly, "vpmulld") >= 8
    # Only partial blocks call functions, to copy them; libm has none of the arithmetic.
    assert not re.search(r"\b(fmaf?|sqrtf?)\b", assembly)


@pytest.mark.skipif(not has_avx2, reason="looks for AVX2's instructions")
@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
def test_the_update_of_8_bit_state_vectorises(dtype: type[np.generic]) -> None:
    kernel = compilation.jit_inlined(adam_8bit_ir.update_range)
    half, single = FloatFormat.BFLOAT16.dtype_tag(), FloatFormat.FLOAT32.dtype_tag()
    remainder, codes = np.zeros(0, dtype=np.int8), np.zeros(0, dtype=np.uint8)
    exponents = np.zeros((0, 2), dtype=np.uint8)
    state = (half, remainder, np.zeros(0, dtype=dtype), codes, None, exponents)
    compilation.compile_now(kernel, (half, *state, 0, 0, 0, 1, 1, 0, 0, single, None, 0), "update")
    (assembly,) = kernel.inspect_asm().values()
    assert vector_instructions(assembly, "vdivps") >= 16
    assert vector_instructions(assembly, "vpmulld") >= 16
    # LLVM would take vectors of bytes apart if it lacked an instruction for them.
    assert len(re.findall(r"\bvpextrb\b", assembly)) == 0
    assert not re.search(r"\b(fmaf?|sqrtf?)\b", assembly)


def _first_block_sum(gradient: Any) -> Any:
    return block_sum_of_squares(gradient, 0)


@pytest.mark.skipif(not has_avx2, reason="looks for AVX2's instructions")
def test_the_block_sum_vectorises() -> None:
    kernel = compilation.jit_inlined(_first_block_sum)
    compilation.compile_now(kernel, (FloatFormat.BFLOAT16.dtype_tag(),), "norm")
    (assembly,) = kernel.inspect_asm().values()
    assert vector_instructions(assembly, "vmulpd") + vector_instructions(assembly, "vfmadd.*pd") > 0


@pytest.mark.skipif(not has_avx2, reason="looks for AVX2's instructions")
def test_the_fold_vectorises() -> None:
    kernel = compilation.jit_inlined(fold.add_range.py_func)
    arguments = (FloatFormat.FLOAT32.dtype_tag(), FloatFormat.BFLOAT16.dtype_tag())
    compilation.compile_now(kernel, arguments, "fold")
    (assembly,) = kernel.inspect_asm().values()
    assert vector_instructions(assembly, "vaddps") > 0
