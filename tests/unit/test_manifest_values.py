"""Values in a manifest: all kinds come back as they were, and what cannot be kept is refused by name."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_opt.errors import ConfigError, StoreError
from offload_opt.manifest import DTYPES, decode_value, encode_value
from tests.optim.support import bits_equal


def tensors_of(dtype: torch.dtype, shape: list[int], fill: bytes, transposed: bool) -> torch.Tensor:
    """A tensor with bytes that repeat ``fill``."""
    nbytes = math.prod(shape) * dtype.itemsize
    data = bytearray((fill * nbytes)[:nbytes])
    if dtype is torch.bool:
        data = bytearray(byte & 1 for byte in data)
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    return tensor.t() if transposed and len(shape) == 2 else tensor


TENSORS = st.builds(
    tensors_of,
    st.sampled_from(list(DTYPES)),
    st.lists(st.integers(0, 3), max_size=3),
    st.binary(min_size=1, max_size=16),
    st.booleans(),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.integers(-(2**200), 2**200) | st.floats() | TEXT | st.binary()
KEYS = TEXT | TEXT.map("${}".format) | st.integers() | st.booleans() | st.none() | st.tuples(TEXT, st.integers())
VALUES = st.recursive(
    SCALARS | TENSORS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(TEXT | KEYS, inner),
    max_leaves=12,
)


def is_same(a: Any, b: Any) -> bool:
    """Of the same types and the same bits, in the same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return bits_equal(a, b)
    if isinstance(a, float):
        return math.isnan(a) if math.isnan(b) else struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        return is_same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return bool(a == b)


def through_json(value: Any) -> Any:
    return decode_value(msgspec.json.decode(msgspec.json.encode(encode_value(value, "extra"))))


@given(VALUES)
def test_values_come_back(value: Any) -> None:
    assert is_same(through_json(value), value)


@pytest.mark.parametrize(
    "value",
    [
        *(math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308, 1e22, 0.1, 1.0),
        *(2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**5000, True, 1),
        *({"$int": "1"}, {"$tensor": [1]}, {"$": 1}, {"": {"$dict": []}}, {1: 2, "1": 3, None: (), (1, "a"): [()]}),
        *((), [], {}, "", b"", (((),),), "[bold]", "\0\x7f\u2028😀"),
    ],
    ids=lambda value: repr(value)[:30] if not isinstance(value, int) else "",
)
def test_awkward_values_come_back(value: Any) -> None:
    assert is_same(through_json(value), value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back(dtype: torch.dtype) -> None:
    for shape in ([], [0], [2, 0, 3], [5], [2, 3]):
        tensor = tensors_of(dtype, shape, bytes(range(240, 256)) + bytes(range(7)), transposed=True)
        again = through_json({"rng": tensor})["rng"]
        assert is_same(again, tensor), shape
        again.zero_()  # it is the reader's own
    gradient = torch.nn.Parameter(torch.ones(2))
    assert not through_json(gradient).requires_grad


def test_what_derives_from_plain_types_comes_back_plain() -> None:
    # A learning rate that numpy has computed is a float, and msgspec takes only floats themselves.
    numpy = pytest.importorskip("numpy")

    class Name(str):
        pass

    values = {"lr": numpy.float64(0.25), "nan": numpy.float64("nan"), Name("name"): Name("x"), "size": torch.Size([2])}
    assert is_same(through_json(values), {"lr": 0.25, "nan": math.nan, "name": "x", "size": (2,)})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "is a object"),
        ({1, 2}, "is a set"),
        (1j, "is a complex"),
        (torch.ones(2, dtype=torch.complex64), "is a Tensor"),
        ("\ud800", "not valid Unicode"),
        ({"\ud800": 1}, "not valid Unicode"),
        ({"a": {"b": object()}}, r"extra\['a'\]\['b'\] is a object"),
        ({"a": [object()]}, r"extra\['a'\] is a object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_cannot_be_kept_are_refused_by_name(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        encode_value(value, "extra")


@pytest.mark.parametrize(
    "encoded",
    [
        {"$pickle": "gASVAAAAAAA="},
        {"$int": "1", "$float": "1"},
        {"$int": "1", "x": 1},
        {"$int": "one"},
        {"$int": None},
        {"$float": None},
        {"$tuple": 1},
        {"$dict": [[[1], 2]]},
        {"$dict": [1]},
        {"$bytes": "***"},
        {"$bytes": "é"},
        {"$tensor": ["F32", [2], "AAAAAA=="]},
        {"$tensor": ["F32", [1], "AAAA"]},
        {"$tensor": ["C64", [1], "AAAAAAAAAAA="]},
        {"$tensor": ["F32", [1]]},
        {"$tensor": ["F32", [10**30, 0], ""]},
        {"deep": [{"$int": "one"}]},
    ],
    ids=str,
)
def test_encoded_values_that_nothing_gives_are_refused(encoded: Any) -> None:
    with pytest.raises(StoreError, match="the manifest has a value"):
        decode_value(encoded)
