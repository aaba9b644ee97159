"""Buffers that are not all of an object: pointers, and arrays with a mask. No verb stores them or copies onto them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import Check, NewRegion, RunPython
from nodedb_mem import OverflowRegion

SCRIPT = """
import sys, types
from array import array
from nodedb_mem import OverflowRegion

class Short(types.ModuleType):
    def __getattr__(self, name):
        raise MemoryError(name)

sys.modules["numpy"] = Short("numpy")
with OverflowRegion.temporary(sys.argv[1], initial_capacity=1 << 20) as region:
    try:
        region.write(array("q", [1]), 0)
    except MemoryError as error:
        print(error, len(region))
    sys.modules["numpy"] = types.ModuleType("numpy")  # in the middle of its import
    print(region.write(array("q", [1]), 0))
"""


def test_no_memory_to_look_at_the_contents_is_an_error(run_python: RunPython, tmp_path: Path) -> None:
    assert run_python(SCRIPT, tmp_path).splitlines() == ["ndarray 0", "0"]


STRINGS: Any = getattr(getattr(np, "dtypes", None), "StringDType", None)  # NumPy 2


class Node(ctypes.Structure):
    _fields_ = (("value", ctypes.c_int), ("next", ctypes.POINTER(ctypes.c_int)))


class Letters(ctypes.Structure):
    _fields_ = (("O", ctypes.c_int), ("P", ctypes.c_double), ("Z", ctypes.c_char))


POINTERS: dict[str, Callable[[], Any]] = {
    "objects": lambda: np.array([{}, None], object),
    "a record with an object": lambda: np.zeros(2, [("id", "i8"), ("name", object)]),
    "a nested record": lambda: np.zeros(2, [("a:b", [("c", "i4"), ("d", object, 3)])]),
    "one record": lambda: np.zeros(2, [("id", "i8"), ("name", object)])[0],
    "a subclass": lambda: np.zeros(2, [("id", "i8"), ("name", object)]).view(np.recarray),
    "no elements": lambda: np.zeros(0, object),
    "a memoryview of objects": lambda: memoryview(np.array([{}, None], object)),
    "ctypes objects": lambda: (ctypes.py_object * 2)(1, 2),
    "ctypes pointers": lambda: (ctypes.POINTER(ctypes.c_int) * 2)(),
    "ctypes addresses": lambda: (ctypes.c_void_p * 2)(),
    "ctypes text": lambda: (ctypes.c_char_p * 2)(b"a", b"b"),
    "ctypes wide text": lambda: (ctypes.c_wchar_p * 2)("a", "b"),
    "ctypes functions": lambda: (ctypes.CFUNCTYPE(None) * 2)(),
    "a structure": lambda: Node(7),
    "structures": lambda: (Node * 2)(),
}
if STRINGS is not None:
    POINTERS["strings"] = lambda: np.array(["longer than what fits in place"], STRINGS())

VALUES: dict[str, Callable[[], Any]] = {
    "dates": lambda: np.array(["2024-02-29", "NaT"], "M8[s]"),
    "fixed text": lambda: np.array(["abc", "é"]),
    "complex": lambda: np.zeros(3, "F"),
    "records": lambda: np.zeros(2, [("O", "i8"), ("P", "M8[s]"), ("Z", "S3")]),
    "a memoryview of complex": lambda: memoryview(np.zeros(3, "D")),
    "a memoryview of records": lambda: memoryview(np.zeros(2, [("O", "i8"), ("&", "c16")])),
    "fields named as pointers": lambda: Letters(1, 2.0, b"3"),
    "ctypes characters": lambda: (ctypes.c_wchar * 2)("a", "b"),
    "a recarray": lambda: np.zeros(2, [("x", "f8")]).view(np.recarray),
    "a scalar": lambda: np.float64(1.5),
    "the data of a masked array": lambda: np.ma.array([1.0, 2.0], mask=[False, True]).data,
    "a filled masked array": lambda: np.ma.array([1.0, 2.0], mask=[False, True]).filled(np.nan),
}


def bytes_of(data: Any) -> bytes:
    return bytes(np.asarray(data).tobytes() if isinstance(data, np.generic | np.ndarray) else data)


TAKE: dict[str, Callable[[OverflowRegion, Any], object]] = {
    "write": lambda region, data: region.write(data, 0),
    "write_many": lambda region, data: region.write_many([b"before", data], 0),
    "write_packed": lambda region, data: region.write_many(data, 0, lengths=np.array([len(bytes_of(data))])),
    "write_vectored": lambda region, data: region.write_vectored([b"before", data], 0),
}
FILL: dict[str, Callable[[OverflowRegion, Any], object]] = {
    "read_into": lambda region, target: region.read_into(0, target),
    "read_many_into": lambda region, target: region.read_many_into([0], target),
}


@pytest.mark.parametrize("call", TAKE.values(), ids=TAKE.keys())
@pytest.mark.parametrize("make", POINTERS.values(), ids=POINTERS.keys())
def test_pointers_are_not_stored(
    new_region: NewRegion, check: Check, make: Callable[[], Any], call: Callable[..., object]
) -> None:
    region = new_region()
    with pytest.raises(TypeError, match="pointers, not values: store what they lead to"):
        call(region, make())
    assert len(region) == 0
    check(region)


@pytest.mark.parametrize("call", FILL.values(), ids=FILL.keys())
@pytest.mark.parametrize("make", POINTERS.values(), ids=POINTERS.keys())
def test_nothing_is_copied_onto_pointers(
    new_region: NewRegion, make: Callable[[], Any], call: Callable[..., object]
) -> None:
    region, target = new_region(), make()
    region.write(b"", 0)
    with pytest.raises(TypeError, match="pointers, not values"):
        call(region, target)


@pytest.mark.parametrize("call", TAKE.values(), ids=TAKE.keys())
@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES.keys())
def test_what_only_looks_like_pointers_is_stored(
    new_region: NewRegion, make: Callable[[], Any], call: Callable[..., Any]
) -> None:
    region, data = new_region(), make()
    slots = np.atleast_1d(call(region, data)).tolist()
    assert region.read_bytes(slots[-1]).removeprefix(b"before") == bytes_of(data)


MASKED = [np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]), np.ma.array([1.0, 2.0]), np.ma.masked]


@pytest.mark.parametrize("call", [*TAKE.values(), *FILL.values()], ids=[*TAKE.keys(), *FILL.keys()])
@pytest.mark.parametrize("data", MASKED, ids=["masked", "nothing masked", "the constant"])
def test_a_mask_is_not_lost_in_silence(new_region: NewRegion, data: Any, call: Callable[..., object]) -> None:
    region = new_region()
    if call in FILL.values():
        region.write(b"", 0)
    with pytest.raises(TypeError, match=r"masked array.*array\.data"):
        call(region, data)
    assert len(region) == (call in FILL.values())


def test_a_masked_slot_is_not_freed(new_region: NewRegion) -> None:
    region = new_region()
    slots = region.write_many([b"a", b"b", b"c"], 0)
    with pytest.raises(TypeError):
        region.free_many(np.ma.array(slots, mask=[False, True, False]))
    with pytest.raises(TypeError, match="masked array"):
        region.write_many(b"12", 0, lengths=np.ma.array([1, 1], mask=[False, True]))
    assert len(region) == 3
    region.free_many(np.array(slots[:2], object))  # numbers one by one, as before
    assert len(region) == 1


def test_arrays_are_recognised_whenever_numpy_is_imported(run_python: Callable[..., str]) -> None:
    script = """
    import array, sys
    from nodedb_mem import OverflowRegion
    region = OverflowRegion.temporary(sys.argv[1], initial_capacity=1 << 20)
    region.write(array.array("d", [1.0]), 0)
    assert "numpy" not in sys.modules
    import numpy
    region.write(numpy.zeros(3), 0)
    for wrong in (numpy.array([{}], object), numpy.ma.array([1.0], mask=[True])):
        try:
            region.write(wrong, 0)
        except TypeError:
            print("refused")
    """
    assert run_python(script, "/var/tmp").split() == ["refused", "refused"]
