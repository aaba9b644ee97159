"""How many bytes of RAM an object holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nodedb_mem.spilling import sizeof


def frame() -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"n": np.zeros(100_000), "s": ["some text"] * 100_000})


def series_of_objects() -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.Series([f"some text {i}" for i in range(10_000)], dtype=object)


def sparse(form: str) -> Any:
    return pytest.importorskip("scipy.sparse").random(1000, 1000, 0.1, format=form, random_state=1)


def table() -> Any:
    return pytest.importorskip("pyarrow").table({"a": np.zeros(100_000), "b": np.zeros(100_000)})


def tensor() -> Any:
    return pytest.importorskip("torch").zeros(100_000)


SIZES: dict[str, tuple[Callable[[], Any], int, int]] = {  # what, and between which sizes
    "array": (lambda: np.zeros(100_000), 800_000, 801_000),
    "view": (lambda: np.zeros(100_000)[:1000], 8000, 9000),
    "masked array": (lambda: np.ma.masked_greater(np.arange(100_000.0), 5), 900_000, 901_000),
    "array of objects": (lambda: np.array([bytes([i]) * 1000 for i in range(100)], dtype=object), 100_000, 110_000),
    "number of NumPy": (lambda: np.float64(1), 8, 300),
    "frame": (frame, 800_000 + 900_000, 10_000_000),
    "series of objects": (series_of_objects, 500_000, 1_000_000),
    "csr": (lambda: sparse("csr"), 1_200_000, 1_300_000),
    "coo": (lambda: sparse("coo"), 1_600_000, 2_500_000),
    "lil": (lambda: sparse("lil"), 500_000, 5_000_000),
    "table": (table, 1_600_000, 1_700_000),
    "chunked array": (lambda: table()["a"], 800_000, 900_000),
    "tensor": (tensor, 400_000, 401_000),
    "bytes": (lambda: b"x" * 1000, 1000, 1100),
    "text": (lambda: "x" * 1000, 1000, 1100),
    "dictionary": (lambda: dict.fromkeys(range(1000), "x" * 100), 3000, 200_000),
    "arrays inside": (lambda: [{"a": np.zeros(1000)}] * 2 + [np.zeros(500)], 12_000, 13_000),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_size_is_about_what_the_buffers_hold(name: str) -> None:
    make, least, most = SIZES[name]
    assert least <= sizeof(make()) <= most


def test_large_arrays_are_not_touched() -> None:
    assert sizeof(np.empty(1 << 33, "u1")) > 1 << 33  # its pages do not exist


def test_what_cannot_be_pickled_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        sizeof([threading.Lock()])
