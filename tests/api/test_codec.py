"""Objects as buffers: nodedb_mem.codec, and the way through a region."""

from __future__ import annotations

import array
import datetime
import decimal
import enum
import pickle
import random
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import NewRegion, RunPython
from nodedb_mem import MemError, OverflowRegion, UndecodableError
from nodedb_mem.codec import ALIGNMENT, Encoded, decode, encode


def laid_out(encoded: Encoded, alignment: int = ALIGNMENT) -> bytearray:
    """The value as it lies in its slot."""
    value = bytearray()
    for part in encoded.parts:
        value += bytes(-len(value) % (alignment if encoded.aligned else 1))
        value += memoryview(part).cast("B")
    assert len(value) == encoded.size
    return value


def through(value: object, region: OverflowRegion) -> Any:
    """The value after it went into a region and came back from there."""
    encoded = encode(value, alignment=64)
    slot = region.write_vectored(encoded.parts, 0, aligned=encoded.aligned)
    assert region.slot(slot).size == encoded.size
    return decode(region.restore(slot))


@dataclass
class Node:
    name: str
    data: Any = None
    nodes: list[Node] = field(default_factory=list)


class Colour(enum.Enum):
    RED = 1


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: object) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and self.x == other.x

    __hash__ = None  # type: ignore[assignment]


Point = namedtuple("Point", "x y")

OBJECTS = {
    "none": None,
    "int": 1 << 200,
    "empty": {},
    "dict": {"a": [1, 2.5, None, (3, b"4")], 5: {6, 7}},
    "text": "ä€😀\0x",
    "long text": "ä€😀" * 20_000,
    "surrogate": "a\ud800b",
    "bytes": b"\0\1",
    "no bytes": b"",
    "long bytes": bytes(range(256)) * 1000,
    "bytearray": bytearray(b"abc"),
    "frozenset": frozenset({1, "a"}),
    "ordered": OrderedDict([(2, 1), (1, 2)]),
    "deque": deque([1, 2], maxlen=5),
    "array": array.array("d", [1.5, 2.5]),
    "date": datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC),
    "decimal": decimal.Decimal("1.10"),
    "enum": Colour.RED,
    "class": Node,
    "function": laid_out,
    "dataclass": Node("a", b"x" * 9, [Node("b")]),
    "slotted": Slotted([1]),
    "namedtuple": Point(1, [2]),
    "long pickle": list(range(100_000)),
    "exception": None,
    "ellipsis": ...,
    "range": range(3, 1000, 7),
    "complex": 1 + 2j,
}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_comes_back_equal_and_of_the_same_type(new_region: NewRegion, name: str) -> None:
    value = OBJECTS[name]
    again = through(value, new_region())
    assert type(again) is type(value)
    assert again == value
    if isinstance(value, bytearray):
        again += b"more"
        assert value == b"abc"


def test_an_int_is_no_bool_and_an_exception_keeps_its_arguments(new_region: NewRegion) -> None:
    region = new_region()
    assert through(True, region) is True
    again = through(ValueError("a", 1), region)
    assert type(again) is ValueError and again.args == ("a", 1)


def test_what_is_inside_twice_comes_back_as_one(new_region: NewRegion) -> None:
    inner = [np.arange(1000)]
    first, second = through([inner, inner], new_region())
    assert first is second


def test_a_cycle_comes_back_as_a_cycle(new_region: NewRegion) -> None:
    cycle: list[object] = []
    cycle.append(cycle)
    again = through(cycle, new_region())
    assert again[0] is again


# Arrays


class Subclass(np.ndarray):
    pass


_ARRAYS = {
    "C order": np.arange(6000.0).reshape(20, 300),
    "F order": np.asfortranarray(np.arange(6000.0).reshape(20, 300)),
    "transposed": np.arange(24000, dtype="i2").reshape(20, 30, 40).transpose(1, 2, 0),
    "sliced": np.arange(6000)[::3],
    "reversed": np.arange(6000)[::-1],
    "swapped bytes": np.arange(6000, dtype=">i4"),
    "record": np.zeros(500, dtype=[("a", "i4"), ("b", "f8", (3,))]),
    "dates": np.arange("2000-01", "2200-01", dtype="datetime64[D]"),
    "steps": np.arange(3000).astype("m8[25us]").reshape(2, 1500),
    "text": np.array(["a", "bcd"] * 500),
    "swapped text": np.array(["a", "bcd"] * 500).astype(">U3"),
    "bytes": np.array([b"a", b"bcd"] * 500),
    "long double": np.arange(3000, dtype="g"),
    "metadata": np.zeros(3000, np.dtype("f8", metadata={"unit": "m"})),
    "one row": np.arange(3000.0)[None, :, None],
    "cut": np.arange(6000).reshape(60, 100)[:30],
    "bool": np.ones(3000, bool),
    "complex": np.ones(3000, "c16") * 1j,
    "half": np.ones(3000, "f2"),
    "no elements": np.zeros((0, 5)),
    "no axis": np.array(3.5),
    "small": np.arange(3),
    "object": np.array([1, "a", None, [2], np.arange(3)], dtype=object),
    "string": np.array(["a", "longer than what fits in place", ""] * 50, dtype=np.dtypes.StringDType()),
    "record of objects": np.array([(1, "a"), (2, [3])], dtype=[("n", "i4"), ("o", "O")]),
    "masked": np.ma.masked_greater(np.arange(1000), 900),
    "matrix": np.eye(40).view(Subclass),
}


@pytest.mark.parametrize("name", _ARRAYS)
def test_an_array_comes_back_as_pickle_brings_it(new_region: NewRegion, name: str) -> None:
    value = _ARRAYS[name]
    region = new_region()
    again, plain = through(value, region), pickle.loads(pickle.dumps(value, 5))
    assert type(again) is type(plain) and again.dtype == plain.dtype and again.dtype.metadata == plain.dtype.metadata
    assert again.shape == plain.shape and again.strides == plain.strides
    assert again.flags.writeable
    assert repr(again) == repr(value)
    if value.dtype.hasobject or isinstance(value.dtype, np.dtypes.StringDType):
        assert again.tolist()[-1] is not value.tolist()[-1] or isinstance(value.tolist()[-1], str)
    else:
        assert again.tobytes() == value.tobytes()


def test_an_array_of_plain_elements_needs_no_pickle(new_region: NewRegion) -> None:
    region = new_region()
    for name in ("C order", "F order", "dates", "swapped text", "half", "cut"):
        assert b"numpy" not in bytes(encode(_ARRAYS[name]).parts[0])
        frozen = _ARRAYS[name].copy()
        frozen.setflags(write=False)
        assert not through(frozen, region).flags.writeable


def test_the_buffers_are_views_of_the_value_at_aligned_places(new_region: NewRegion) -> None:
    region = new_region()
    value = {"a": np.arange(1001, dtype="u1"), "b": [np.arange(777.0)], "c": np.ones((333, 3), order="F")}
    encoded = encode(value)
    assert sum(np.shares_memory(buffer, value["a"]) for buffer in encoded.buffers) == 1  # not copied
    slot = region.write_vectored(encoded.parts, 0, aligned=encoded.aligned)
    view = region.restore(slot)
    again = decode(view)
    for array_ in (again["a"], again["b"][0], again["c"]):
        assert np.shares_memory(array_, np.frombuffer(view, "u1"))
        assert array_.ctypes.data % 64 == 0
    again["a"][:] = 0
    assert decode(region.restore(slot))["a"].tolist() == value["a"].tolist()


@pytest.mark.parametrize("alignment", [64, 128, 4096])
def test_the_alignment_of_the_region_is_in_the_value(new_region: NewRegion, alignment: int) -> None:
    region = new_region(alignment=alignment)
    value = [np.arange(700 + i) for i in range(5)]
    encoded = encode(value, alignment=alignment)
    slot = region.write_vectored(encoded.parts, 0, aligned=encoded.aligned)
    stored = region.read_bytes(slot)
    assert stored == laid_out(encoded, alignment)
    assert all((a == b).all() for a, b in zip(decode(stored), value, strict=True))


def test_a_read_only_array_stays_read_only(new_region: NewRegion) -> None:
    value = np.arange(1000)
    value.flags.writeable = False
    assert not through(value, new_region()).flags.writeable


def test_a_read_only_value_gives_read_only_arrays() -> None:
    again = decode(bytes(laid_out(encode(np.arange(1000)))))
    assert again.tolist() == list(range(1000)) and not again.flags.writeable


def test_pandas_scipy_and_arrow(new_region: NewRegion) -> None:
    pandas = pytest.importorskip("pandas")
    sparse = pytest.importorskip("scipy.sparse")
    arrow = pytest.importorskip("pyarrow")
    region = new_region()
    frame = pandas.DataFrame(
        {
            "n": np.arange(500),
            "f": np.linspace(0, 1, 500),
            "s": [f"text {i}" for i in range(500)],
            "o": [[i] for i in range(500)],
            "c": pandas.Categorical(["a", "b"] * 250),
            "t": pandas.date_range("2024-01-01", periods=500, tz="Europe/Berlin"),
        },
        index=pandas.Index(range(500, 1000), name="i"),
    )
    pandas.testing.assert_frame_equal(through(frame, region), frame)
    matrix = sparse.random(300, 200, 0.1, format="csr", random_state=1)
    assert (through(matrix, region) != matrix).nnz == 0
    table = arrow.table({"a": list(range(1000)), "b": ["x"] * 1000})
    assert through(table, region) == table


# Buffers

_VIEWS = {
    "bytes": memoryview(b"abc" * 1000),
    "bytearray": memoryview(bytearray(b"abc" * 1000)),
    "doubles": memoryview(np.arange(6.0).reshape(2, 3)),
    "gaps": memoryview(np.arange(20, dtype="i4")[::2]),
    "empty": memoryview(b""),
    "no axis": memoryview(np.array(2.5)),
    "short": memoryview(bytearray(b"x")),
}


@pytest.mark.parametrize("name", _VIEWS)
def test_a_memoryview_comes_back_as_a_view_of_the_value(new_region: NewRegion, name: str) -> None:
    value = _VIEWS[name]
    again = through(value, new_region())
    assert type(again) is memoryview and again == value
    assert (again.format, again.shape, again.readonly) == (value.format, value.shape, value.readonly)


@pytest.mark.parametrize("dtype", [">i4", object, [("a", "i4")]], ids=repr)
def test_a_memoryview_of_elements_that_python_cannot_read_is_refused(dtype: Any) -> None:
    with pytest.raises(TypeError, match="memoryview of format"):
        encode(memoryview(np.zeros(3, dtype)))


def test_large_bytes_are_not_copied() -> None:
    data = bytes(1 << 20)
    encoded = encode(data)
    assert encoded.parts[1] is data
    assert encode(bytearray(data)).size == encoded.size


# Refused


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


@pytest.mark.parametrize("make", [Unpicklable, lambda: [Unpicklable()], lambda: (x for x in ())], ids="abc")
def test_what_cannot_be_pickled_is_a_type_error(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        encode(make())


def test_cloudpickle_takes_what_pickle_refuses(new_region: NewRegion) -> None:
    pytest.importorskip("cloudpickle")
    weights = np.arange(1000.0)
    again = through((lambda x: x + 1, weights), new_region())
    assert again[0](2) == 3 and (again[1] == weights).all()


def test_without_cloudpickle_it_is_a_type_error(run_python: RunPython) -> None:
    script = """
        import sys
        sys.modules["cloudpickle"] = None
        from nodedb_mem.codec import encode
        try:
            encode([lambda: 1])
        except TypeError as error:
            assert "cannot pickle 'list'" in str(error)
            print("refused")
        """
    assert run_python(script) == "refused\n"


def test_objects_that_stay_are_named_not_pickled() -> None:
    config = {"depth": 3}
    value = [config, np.arange(100.0), config]
    stored = laid_out(encode(value, kept=[config]))
    again = decode(stored, kept=[config])
    assert again[0] is config and again[2] is config
    with pytest.raises(UndecodableError, match="names objects"):
        decode(stored)


# Damage


def _values() -> list[bytearray]:
    return [
        laid_out(encode(value))
        for value in (
            {"a": 1, "b": [2, 3]},
            b"some bytes",
            "text",
            np.arange(200.0),
            list(range(20_000)),
            memoryview(b"a"),
        )
    ]


def test_a_value_that_is_cut_off_is_a_typed_error() -> None:
    for value in _values():
        cuts = [*range(80), *random.Random(1).sample(range(len(value)), min(len(value), 200)), len(value) - 1]
        for cut in cuts:
            if cut < len(value):
                with pytest.raises(UndecodableError):
                    decode(value[:cut])
        with pytest.raises(UndecodableError):
            decode(value + b"\0")


def test_a_changed_bit_before_the_buffers_is_a_typed_error() -> None:
    for value, end in ((_values()[0], None), (_values()[3], -1600)):
        for place in range(len(value[:end])):
            for bit in (1, 128):
                damaged = bytearray(value)
                damaged[place] ^= bit
                if not any(value[place:end]):  # the zeros that align the buffer
                    continue
                with pytest.raises(UndecodableError):
                    decode(damaged)


@given(st.binary(max_size=200))
def test_other_bytes_are_a_typed_error(data: bytes) -> None:
    for junk in (data, b"NdmV" + data):
        with pytest.raises(UndecodableError) as caught:
            decode(junk)
        assert isinstance(caught.value, MemError) and isinstance(caught.value, ValueError)


def test_another_version_is_named() -> None:
    value = laid_out(encode([1]))
    value[4] = 9
    with pytest.raises(UndecodableError, match="version 9"):
        decode(value)


def test_a_class_that_is_gone_is_a_typed_error_with_its_cause() -> None:
    global Gone

    class Gone:
        pass

    Gone.__qualname__ = "Gone"
    value = laid_out(encode(Gone()))
    del Gone
    with pytest.raises(UndecodableError, match="Gone") as caught:
        decode(value)
    assert isinstance(caught.value.__cause__, AttributeError)


# Elsewhere


def test_another_process_decodes_a_recovered_value(tmp_path: Any, run_python: RunPython) -> None:
    with OverflowRegion.open(tmp_path / "region") as region:
        encoded = encode({"weights": np.arange(5000.0), "name": "ä"})
        slot = region.write_vectored(encoded.parts, 0, aligned=encoded.aligned)
    script = """
        import sys
        from nodedb_mem import OverflowRegion
        from nodedb_mem.codec import decode
        with OverflowRegion.open(sys.argv[1], recover=True) as region:
            value = decode(region.read(int(sys.argv[2])))
            print(value["weights"].sum(), value["name"])
        """
    assert run_python(script, tmp_path / "region", slot) == "12497500.0 ä\n"


# Any object

_leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
_objects = st.recursive(
    _leaves | st.binary().map(bytearray),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(_objects)
def test_any_object_comes_back_equal(value: object) -> None:
    assert decode(laid_out(encode(value))) == value
