"""Objects as buffers: pickle protocol 5 with its large buffers left where they are, behind a head that says all.

A value is a head, the part that pickle makes, and the buffers that pickle leaves out. The head holds all that another
process needs to take the value apart again:

| field | bytes | meaning |
|---|---|---|
| magic | 4 | ``NdmV`` |
| version | 1 | 1 |
| kind | 1 | pickle, bytes, bytearray, str, memoryview, NumPy array |
| alignment | 1 | its power of two: each buffer starts at a multiple of it, counted from the value's start |
| flags | 1 | 1: read-only (a memoryview); 2: the pickle names objects that live in the process that wrote it |
| start | 4 | where the pickled part starts; of a memoryview or an array its layout, as text |
| buffers | 4 | how many there are |
| size | 8 | of the pickled part |
| reserved | 4 | 0 |
| check | 4 | CRC-32 of what is before it, and of all from here to the end of the pickled part |
| sizes | 8 each | of the buffers |

The buffers have no checksum: it would cost more than all else.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import ChainMap
from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from zlib import crc32

from nodedb_mem._held import is_plain_array
from nodedb_mem.errors import UndecodableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

_HEAD = Struct("<4s4B2IQ2I")
_CHECK = _HEAD.size - 4
_MAGIC = b"NdmV"
_VERSION = 1
_PICKLE, _BYTES, _BYTEARRAY, _STR, _MEMORYVIEW, _ARRAY = range(6)
_READ_ONLY, _BOUND = 1, 2

_JOINED = 16 << 10  # a pickled part, or a value of bytes, up to this size is copied behind the head: one part less
IN_BAND = 256  # a buffer up to this size is copied into the pickled part

#: What a buffer of a value is aligned to, in bytes, where its region lets it.
ALIGNMENT = 64


class Encoded(NamedTuple):
    """An object as buffers, made by `encode`.

    Attributes
    ----------
    parts : list of buffer
        To be gathered into one slot.
    aligned : bool
        Each part has to start at a multiple of the alignment that `encode` was told.
    size : int
        Of the value, in bytes, as it will lie in its slot.
    buffers : list of memoryview
        Where the object's own bytes are.
    copied : bool
        Decoding gives an object that shares no memory with the value.
    named : frozenset of int
        Which of the kept objects were met.
    """

    parts: list[Buffer]
    aligned: bool
    size: int
    buffers: list[memoryview]
    copied: bool
    named: frozenset[int] = frozenset()


class Value(NamedTuple):
    """A value that was taken apart by `split`."""

    kind: int
    flags: int
    pickled: memoryview | bytes
    buffers: list[memoryview]


def encode(value: object, *, alignment: int = ALIGNMENT, kept: Sequence[object] = (), prove: bool = False) -> Encoded:
    """Take an object apart into buffers, without a copy of what is large.

    Parameters
    ----------
    value
        Anything that pickle takes, or cloudpickle where it is installed. bytes, bytearray, str, memoryview and NumPy's
        arrays of plain elements go without pickle.
    alignment
        Of the region that the buffers go to.
    kept
        Objects inside the value that are named by their place in this list, not pickled. The value can be decoded with
        such a list only.
    prove
        Make the object again, once for every type in it that is new here, and throw it away.

    Raises
    ------
    TypeError
        The object cannot be pickled; or, with `prove`, it cannot be made again.
    """
    kind = _KINDS.get(type(value))
    if kind is not None:
        return _encode_plain(kind, value, alignment)
    if is_plain_array(value) and (array := _encode_array(value, alignment)):
        return array
    pickled, buffers, named = _pickle(value, kept, prove)
    encoded = _lay_out(_PICKLE, _BOUND if named else 0, alignment, pickled, buffers)
    return encoded._replace(named=named) if named else encoded


def decode(buffer: Buffer, *, kept: Sequence[object] = ()) -> Any:
    """Make the object again.

    Parameters
    ----------
    buffer
        The whole value. The object's buffers are views of it, writable if it is. What is immutable is copied.
    kept
        As it was given to `encode`.

    Raises
    ------
    UndecodableError
        The buffer is no encoded value, or is cut off, or damaged, or of another version, or its classes cannot be had.
    """
    return load(split(buffer), kept)


def split(buffer: Buffer, head: bytes | None = None) -> Value:
    """Take a value apart: its pickled part, and its buffers, as views. Raises `UndecodableError` as `decode` does.

    `head` is a copy of what is before the buffers: with it, the value's own is not read.
    """
    view = memoryview(buffer)
    if view.format != "B" or view.ndim != 1:
        view = view.cast("B")
    kind, flags, pickled, places, end = _read_head(view) if head is None else _read_known_head(head)
    if end != len(view):
        raise UndecodableError(f"the encoded object has {end} bytes: there are {len(view)}")
    return Value(kind, flags, pickled, [view[begin:last] for begin, last in places])


def _read_head(first: memoryview | bytes) -> tuple[int, int, memoryview | bytes, list[tuple[int, int]], int]:
    """Read what is before the buffers: kind, flags, pickled part, where the buffers lie, where the value ends."""
    if len(first) < _HEAD.size:
        raise UndecodableError(f"a value has a head of {_HEAD.size} bytes: there are {len(first)}")
    magic, version, kind, shift, flags, start, count, size, _, check = _HEAD.unpack_from(first)
    if magic != _MAGIC:
        raise UndecodableError("the bytes are no encoded object")
    if version != _VERSION:
        raise UndecodableError(f"the object was encoded by version {version}, this is version {_VERSION}")
    end = _HEAD.size + 8 * count
    if not (end <= start and start + size <= len(first) and shift < 32):
        raise UndecodableError("the encoded object is cut off")
    last = start + size
    if crc32(first[_HEAD.size : last], crc32(first[:_CHECK])) != check:
        raise UndecodableError("the encoded object is damaged")
    pickled = first[start:last]
    places = []
    for number in memoryview(bytes(first[_HEAD.size : end])).cast("Q") if count else ():
        begin = _up(last, 1 << shift)
        last = begin + number
        places.append((begin, last))
    return kind, flags, pickled, places, last


_read_known_head = lru_cache(1024)(_read_head)


def load(value: Value, kept: Sequence[object] = ()) -> Any:
    """Make an object from what `split` gave. Raises `UndecodableError` as `decode` does."""
    try:
        if value.kind == _PICKLE:
            if value.flags & _BOUND:
                return _Unpickler(value.pickled, value.buffers, kept).load()
            return pickle.loads(value.pickled, buffers=value.buffers)
        return _DECODERS[value.kind](value)
    except MemoryError:
        raise
    except Exception as error:
        raise UndecodableError(f"the object cannot be made again: {type(error).__name__}: {error}") from error


# -- what needs no pickle -----------------------------------------------------------------------------------------

_KINDS: dict[type, int] = {bytes: _BYTES, bytearray: _BYTEARRAY, str: _STR, memoryview: _MEMORYVIEW}


def _encode_plain(kind: int, value: Any, alignment: int) -> Encoded:
    if kind == _MEMORYVIEW:
        return _encode_view(value, alignment)
    data = value.encode("utf-8", "surrogatepass") if kind == _STR else value
    head = _head(kind, 0, 0, _HEAD.size + 8, b"", (len(data),))
    size = len(head) + len(data)
    parts: list[Buffer] = [b"".join((head, data))] if len(data) <= _JOINED else [head, data]
    return Encoded(parts, False, size, [memoryview(data)], True)


def _encode_array(value: Any, alignment: int) -> Encoded | None:
    """Encode an array of plain elements. None where that is for pickle: it is small, or in pieces, or says more."""
    dtype, flags = value.dtype, value.flags
    if value.nbytes <= IN_BAND or not flags.forc or dtype.metadata is not None:
        return None
    order = "C" if flags.c_contiguous else "F"
    head = _array_head(dtype, value.shape, order, 0 if flags.writeable else _READ_ONLY, value.nbytes, alignment)
    if head is None:
        return None
    # Dates are no buffers.
    data = pickle.PickleBuffer(value.view("i8") if dtype.kind in "mM" else value).raw()
    return Encoded([head, data], True, _up(len(head), alignment) + data.nbytes, [data], False)


@lru_cache(1024)
def _array_head(dtype: Any, shape: tuple[int, ...], order: str, flags: int, size: int, alignment: int) -> bytes | None:
    if sys.modules["numpy"].dtype(dtype.str) != dtype:
        return None
    layout = " ".join((dtype.str, order, *map(str, shape))).encode()
    return _head(_ARRAY, alignment.bit_length() - 1, flags, _HEAD.size + 8, layout, (size,)) + layout


def _decode_array(value: Value) -> Any:
    (data,) = value.buffers
    dtype, order, shape = _array_layout(bytes(value.pickled))
    buffer = data.toreadonly() if value.flags & _READ_ONLY else data
    return sys.modules["numpy"].ndarray(shape, dtype, buffer, order=order)


@lru_cache(1024)
def _array_layout(layout: bytes) -> tuple[Any, Any, tuple[int, ...]]:
    import numpy

    dtype, order, *sizes = layout.decode().split(" ")
    return numpy.dtype(dtype), order, tuple(map(int, sizes))


def _encode_view(view: memoryview, alignment: int) -> Encoded:
    if view.format.lstrip("@") not in tuple("cbB?hHiIlLqQnNfd"):
        raise TypeError(f"cannot store a memoryview of format {view.format!r}")
    sizes = view.shape or ()
    shape = " ".join(map(str, (view.format, *sizes))).encode()
    data = view.cast("B") if view.c_contiguous and 0 not in sizes else memoryview(view.tobytes())
    return _lay_out(_MEMORYVIEW, _READ_ONLY if view.readonly else 0, alignment, shape, [data])


def _decode_view(value: Value) -> memoryview:
    layout: Any
    layout, *sizes = bytes(value.pickled).decode().split(" ")
    shape = [int(size) for size in sizes]
    (data,) = value.buffers
    if layout != "B" or len(shape) != 1:
        # memoryview.cast() takes no shape with a 0 in it.
        data = data.cast(layout, shape) if 0 not in shape else data.cast(layout)
    return data.toreadonly() if value.flags & _READ_ONLY else data


_DECODERS: dict[int, Callable[[Value], object]] = {
    _BYTES: lambda value: bytes(value.buffers[0]),
    _BYTEARRAY: lambda value: bytearray(value.buffers[0]),
    _STR: lambda value: str(value.buffers[0], "utf-8", "surrogatepass"),
    _MEMORYVIEW: _decode_view,
    _ARRAY: _decode_array,
}


# -- pickle -------------------------------------------------------------------------------------------------------


_sound: set[type] = set()  # their objects have been made again
_MOST_SOUND = 10_000  # types come and go


def _note_type(pickler: Any, obj: object) -> Any:
    """As a pickler's `reducer_override`: collect the types that are made by a call."""
    if type(obj) not in _sound:
        pickler.types.add(type(obj))
    return NotImplemented


def _name(pickler: Any, obj: object) -> int | None:
    """As a pickler's `persistent_id`: name the kept objects by their number, instead of pickling them."""
    number: int | None = pickler.numbers.get(id(obj))
    if number is not None:
        pickler.named.add(number)
    return number


def _refuse_view(view: memoryview) -> NoReturn:
    """Refuse, as pickle does, what cloudpickle would make bytes of."""
    raise TypeError("cannot pickle 'memoryview' object")


def _pickler(base: Any, kept: Sequence[object], prove: bool) -> Any:
    """Make a class of picklers."""
    verbs: dict[str, Any] = {"numbers": {id(each): number for number, each in enumerate(kept)}}
    if kept:
        verbs["persistent_id"] = _name
    if prove and base is pickle.Pickler:
        verbs["reducer_override"] = _note_type
    if base is not pickle.Pickler:
        verbs["dispatch_table"] = ChainMap({memoryview: _refuse_view}, base.dispatch_table)
    return type("Pickler", (base,), verbs)


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: memoryview | bytes, buffers: Sequence[Buffer], kept: Sequence[object]) -> None:
        super().__init__(io.BytesIO(pickled), buffers=buffers)
        self.kept = kept

    def persistent_load(self, number: int) -> object:
        if not self.kept:
            raise ValueError("it names objects of the process that wrote it")
        return self.kept[number]


_PROVING = _pickler(pickle.Pickler, (), True)


def _pickle(value: object, kept: Sequence[object], prove: bool) -> tuple[bytes, list[memoryview], frozenset[int]]:
    try:
        if not kept and not prove:
            buffers: list[memoryview] = []
            return pickle.dumps(value, 5, buffer_callback=_taker(buffers)), buffers, frozenset()
        return _dump(_pickler(pickle.Pickler, kept, prove) if kept else _PROVING, value, kept, prove)
    except MemoryError:
        raise
    except Exception as refused:
        try:
            import cloudpickle

            return _dump(_pickler(cloudpickle.Pickler, kept, prove), value, kept, prove)
        except MemoryError:
            raise
        except Exception as error:
            raise TypeError(f"cannot pickle {type(value).__name__!r}: {refused}") from error


def _dump(
    kind: Any, value: object, kept: Sequence[object], prove: bool
) -> tuple[bytes, list[memoryview], frozenset[int]]:
    file = io.BytesIO()
    buffers: list[memoryview] = []
    pickler = kind(file, 5, buffer_callback=_taker(buffers))
    pickler.named, pickler.types = set(), set()
    pickler.dump(value)
    pickled = file.getvalue()
    if prove and (pickler.types or "reducer_override" not in vars(kind)):
        _make_again(pickled, buffers, kept)
        if len(_sound) < _MOST_SOUND:
            _sound.update(pickler.types)
    return pickled, buffers, frozenset(pickler.named)


def _make_again(pickled: bytes, buffers: list[memoryview], kept: Sequence[object]) -> None:
    """Make an object and throw it away. Its class may store to the buffers then, which are the original's."""
    try:
        _Unpickler(pickled, [buffer.toreadonly() for buffer in buffers], kept).load()
    except Exception:
        _Unpickler(pickled, [bytearray(buffer) for buffer in buffers], kept).load()


def _taker(buffers: list[memoryview]) -> Callable[[pickle.PickleBuffer], bool]:
    """Keep buffers out of a pickle, unless they are small."""

    def take(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes <= IN_BAND:
            return True
        buffers.append(raw)
        return False

    return take


# -- layout -------------------------------------------------------------------------------------------------------


def _lay_out(kind: int, flags: int, alignment: int, pickled: bytes, buffers: list[memoryview]) -> Encoded:
    sizes = [buffer.nbytes for buffer in buffers]
    first = _HEAD.size + 8 * len(sizes)
    joined = len(pickled) <= _JOINED
    start = first if joined else _up(first, alignment)
    head = _head(kind, alignment.bit_length() - 1 if buffers else 0, flags, start, pickled, sizes)
    # What the size of a value is, as the region lays its parts out.
    size = start + len(pickled)
    for each in sizes:
        size = _up(size, alignment) + each
    before: list[Buffer] = [head + pickled] if joined else [head, pickled]
    return Encoded([*before, *buffers], not joined or bool(buffers), size, buffers, not buffers)


def _head(kind: int, shift: int, flags: int, start: int, pickled: bytes, sizes: Sequence[int]) -> bytes:
    """Make a head, with the sizes of the buffers after it."""
    listed = b"".join(size.to_bytes(8, "little") for size in sizes) if sizes else b""
    head = _HEAD.pack(_MAGIC, _VERSION, kind, shift, flags, start, len(sizes), len(pickled), 0, 0)[:_CHECK]
    between = listed + bytes(start - _HEAD.size - len(listed))
    check = crc32(pickled, crc32(between, crc32(head)))
    return b"".join((head, check.to_bytes(4, "little"), listed))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
