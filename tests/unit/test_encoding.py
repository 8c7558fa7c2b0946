"""Encoding as JSON: a value is restored with its exact type and bits, or rejected with its path."""

from __future__ import annotations

import enum
import io
import json
import math
import random
import struct
import time
from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from offload_adam import CheckpointError
from offload_adam.dtypes import DTYPES
from offload_adam.encoding import MAX_NBYTES, TAG, decode, encode
from tests.unit.checkpoint.test_format import JSON, places


def bits(value: Any) -> Any:
    """Return a key that two values share only if they have the same type and bits."""
    kind = type(value)
    if kind is float:
        return kind, "nan" if math.isnan(value) else struct.pack("d", value)
    if kind is complex:
        return kind, bits(value.real), bits(value.imag)
    if kind is torch.Tensor:
        values = value.resolve_conj().resolve_neg()
        if values.element_size() == 1:
            values = values.view(torch.uint8)  # torch does not copy int4, for example
        data = values.contiguous().view(-1).view(torch.uint8).tolist()
        return kind, value.dtype, value.shape, value.device, data
    if kind is np.ndarray or isinstance(value, np.generic):
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        factory = getattr(value, "default_factory", None)
        return kind, factory, [(bits(key), bits(inner)) for key, inner in value.items()]
    if isinstance(value, (set, frozenset)):
        return kind, sorted(map(str, map(bits, value)))
    if isinstance(value, (list, tuple)):
        return kind, [bits(inner) for inner in value]
    if kind is io.BytesIO:
        return kind, value.getvalue(), value.tell()
    return kind, value


def through_text(value: Any) -> Any:
    """Return a value after encoding, writing as JSON, parsing and decoding."""
    text = json.dumps(encode(value, "x"), allow_nan=False)
    return decode(json.loads(text), "x")


INTS = st.integers(-(2**128), 2**128)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.just(TAG)
HASHABLE = st.recursive(
    st.none() | st.booleans() | INTS | st.floats(allow_nan=False) | TEXT | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
ARRAY_DTYPES = ["?", "i1", "<i2", ">i4", "u8", "<f2", ">f4", "f8", "c8", "c16", "u2", "u4"]
ARRAYS = st.sampled_from(ARRAY_DTYPES).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=3, min_side=0))
)
TENSOR_DTYPES = [torch.bool, torch.uint8, torch.int16, torch.uint32, torch.int64, torch.bfloat16]
TENSOR_DTYPES += [torch.float16, torch.float32, torch.float64, torch.complex64, torch.float8_e5m2]
TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randint(
        0, 2, shape, generator=torch.Generator().manual_seed(seed)
    ).to(dtype),
    st.sampled_from(TENSOR_DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 9),
)
LEAVES = (
    HASHABLE
    | st.floats()
    | st.complex_numbers()
    | st.binary(max_size=4).map(bytearray)
    | st.binary(max_size=4).map(io.BytesIO)
    | ARRAYS
    | ARRAYS.filter(lambda array: array.size > 0).map(lambda array: array.reshape(-1)[0])
    | TENSORS
    | st.sampled_from([torch.float32, torch.uint16, torch.device("cuda:1"), torch.Size([2, 3])])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(HASHABLE, max_size=3)
        | st.dictionaries(TEXT, inner, max_size=3)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.dictionaries(HASHABLE, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(HASHABLE, st.integers(), max_size=3).map(Counter)
        | st.dictionaries(TEXT, inner, max_size=3).map(lambda found: defaultdict(list, found))
    ),
    max_leaves=12,
)


@settings(max_examples=100)
@given(VALUES)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert bits(through_text(value)) == bits(value)


@pytest.mark.parametrize(
    "value",
    [
        {3: 1, 6: 2, "3": 4, None: 5, (1, 2): 6},
        {TAG: "tuple", "items": [1]},
        [-0.0, math.inf, -math.inf, math.nan, 5e-324, 0.1, 2**53 + 1],
        [True, 1, 1.0, np.float64(1.0), np.int64(1), np.bool_(True), torch.tensor(1.0)],
        {True: "bool", 2: "int", 3.0: "float"},
        torch.tensor(0.1, dtype=torch.float64),
        torch.arange(6).view(2, 3).t(),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        torch.arange(8, dtype=torch.uint8).view(DTYPES["int4"]).view(2, 4).t(),
        torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)[::2],
        torch.arange(8, dtype=torch.uint8).view(torch.bits16),
        torch.arange(8, dtype=torch.uint8).view(torch.complex32),
        [torch.qint8, DTYPES["int4"], torch.complex32],
        torch.ones(1).expand(3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.float32("nan"),
        defaultdict(None, {1: 2}),
        random.Random(1).getstate(),
        np.random.RandomState(1).get_state(),
        np.random.Generator(np.random.PCG64(1)).bit_generator.state,
        np.random.Generator(np.random.MT19937(1)).bit_generator.state,
        torch.Generator().manual_seed(1).get_state(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_json_would_change(value: Any) -> None:
    assert bits(through_text(value)) == bits(value)


def test_plain_json_is_not_tagged() -> None:
    """So people and other programs can read it."""
    value = {"a": [1, -0.5, None, True, "text"], "b": {"c": []}}
    assert encode(value, "x") == value


class Color(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


Point = namedtuple("Point", "x y")  # would be decoded as a tuple
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"a": [1, len]},
            r"^x\['a'\]\[1\] is of type builtin_function_or_method, which .*\. Save numbers",
        ),
        ({(1, len): 2}, "is of type builtin_function"),
        (Color.RED, "is of type Color"),
        (Text("a"), "is of type Text"),
        ([Point(1, 2)], r"^x\[0\] is of type Point"),
        (UserDict(a=1), "is of type UserDict"),
        (object, "is of type type"),
        (torch.nn.Parameter(torch.ones(1)), "is of type Parameter"),
        (torch.ones(1, requires_grad=True), r"tensor\.detach"),
        (torch.ones(1).to_sparse(), "sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged), "NestedTensor"),
        (torch.ones(1, device="meta"), "meta"),
        (torch.zeros(MAX_NBYTES + 1, dtype=torch.uint8), "1,048,577 bytes .* buffer of the model"),
        (bytes(MAX_NBYTES + 1), "1,048,577 bytes"),
        (np.zeros(MAX_NBYTES + 1, dtype=np.uint8), "1,048,577 bytes"),
        (np.array([object()]), "type ndarray and dtype object"),
        (np.ma.array([1]), "is of type MaskedArray"),
        (np.zeros(1, dtype=[("a", "f4")]), "type ndarray and dtype "),
        (np.longlong(1) if np.longlong is not np.int64 else object(), "is of type "),
        (np.str_("a"), "is of type str_"),
        (np.longdouble(1), "is of type longdouble"),
        (1 << 20_000, "an integer of 20001 bits"),
        ("\ud800", "lone surrogate"),
        ({"\ud800": 1}, "lone surrogate"),
        (defaultdict(lambda: 1), "a defaultdict of"),
        (LOOP, "contains itself"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_rejected_with_their_place(value: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        encode(value, "x")


def test_the_largest_and_the_deepest_value(tmp_path: Any) -> None:
    value: Any = torch.arange(MAX_NBYTES, dtype=torch.uint8)
    for _ in range(49):
        value = {1: value}
    assert bits(through_text(value)) == bits(value)
    with pytest.raises(CheckpointError, match="more than 50 levels"):
        encode({1: value}, "x")


@settings(max_examples=100)
@given(st.data())
def test_any_text_is_decoded_or_rejected(data: st.DataObject) -> None:
    """Replaces any part of an encoded value. Decoding allocates no more than the text holds."""
    value = encode(data.draw(VALUES), "x")
    holder = [value]
    *path, last = data.draw(st.sampled_from([p for p in places(holder) if p]))
    at: Any = holder
    for key in path:
        at = at[key]
    at[last] = data.draw(JSON | st.sampled_from(["torch.Tensor", "Counter", "numpy.generic"]))
    with suppress(CheckpointError):
        decode(holder, "x")


@pytest.mark.parametrize(
    "text",
    [
        {TAG: "builtins.eval", "value": "1"},
        {TAG: ["tuple"]},
        {TAG: "tuple"},
        {TAG: "tuple", "items": [], "more": 1},
        {TAG: "set", "items": [[]]},
        {TAG: "dict", "pairs": [[1, 2], [1, 3]]},
        {TAG: "dict", "pairs": [[[], 2]]},
        {TAG: "defaultdict", "pairs": [], "factory": "eval"},
        {TAG: "float", "value": "1e5"},
        {TAG: "bytes", "data": "?"},
        {TAG: "torch.Tensor", "dtype": "torch.float32", "shape": [10**9], "data": "AAAA"},
        {TAG: "torch.Tensor", "dtype": "torch.float32", "shape": [-1, -1], "data": "AAAAAA=="},
        {TAG: "torch.Tensor", "dtype": "torch.uint8", "shape": [0, 10**30], "data": ""},
        {TAG: "torch.Tensor", "dtype": "torch.load", "shape": [], "data": ""},
        {TAG: "torch.Tensor", "dtype": "torch.qint8", "shape": [0], "data": ""},
        {TAG: "numpy.ndarray", "dtype": "|O", "shape": [1], "data": "AAAAAAAAAAA="},
        {TAG: "numpy.generic", "dtype": "<f4", "data": "AAAAAAAAAAA="},
        {TAG: "torch.device", "value": "nowhere"},
        {TAG: "BytesIO", "data": "", "at": -1},
    ],
    ids=str,
)
def test_a_wrong_text_is_rejected(text: Any) -> None:
    with pytest.raises(CheckpointError, match="x cannot be decoded"):
        decode([text], "x")


def test_an_unknown_type_is_named() -> None:
    with pytest.raises(
        CheckpointError, match=r"x cannot be decoded \(ValueError: unknown type 'a'"
    ):
        decode({TAG: "a"}, "x")


def test_a_bool_that_is_neither_0_nor_1_becomes_1() -> None:
    found = decode(
        [
            {TAG: "torch.Tensor", "dtype": "torch.bool", "shape": [1], "data": "Bw=="},
            {TAG: "numpy.ndarray", "dtype": "|b1", "shape": [1], "data": "Bw=="},
        ],
        "x",
    )
    assert found[0].view(torch.uint8).item() == 1
    assert found[1].view(np.uint8).item() == 1


def test_a_small_value_that_is_enormous_as_text_is_rejected_at_once() -> None:
    value: Any = [1, 2]
    for _ in range(40):
        value = [value, value]
    with pytest.raises(CheckpointError, match=r"x would take about [0-9,]+ bytes in the manifest"):
        encode({"a": value}, "x")
    for small in ("", torch.empty(0), torch.float32, b"", (), "\x00" * 10):
        with pytest.raises(CheckpointError, match="would take about"):
            encode([[[small] * 300] * 300] * 300, "x")
    with pytest.raises(CheckpointError, match="would take about"):
        encode(["\x00" * 2**20] * 12, "x")  # six characters each
    text = "a" * 2**20
    assert encode([text] * 60, "x") == [text] * 60
    with pytest.raises(CheckpointError, match="limit of 67,108,864"):
        encode([text] * 65, "x")
    deep: list[Any] = []
    lists = [deep := [deep] for _ in range(2000)]  # each holds the one before, and comes after it
    with pytest.raises(CheckpointError, match="more than 50 levels"):
        encode(lists, "x")
    assert encode(lists[:48], "x") == lists[:48]
    loop: list[Any] = []
    loop += [loop, loop]
    with pytest.raises(CheckpointError, match="contains itself"):
        encode(loop, "x")


@pytest.mark.parametrize("kind", [set, frozenset, dict])
def test_keys_of_equal_hashes_are_rejected_at_once(kind: Any) -> None:
    """60,000 of them took 19 s."""
    keys = [number * (2**61 - 1) for number in range(60_000)]
    encoded = (
        {TAG: "dict", "pairs": [[key, 1] for key in keys]}
        if kind is dict
        else {TAG: kind.__name__, "items": keys}
    )
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="most keys have equal hashes"):
        decode(encoded, "x")
    assert time.monotonic() - began < 5
    many = set(range(100_000)) | {str(number) for number in range(1000)}
    assert decode(encode(many, "x"), "x") == many
