"""Who else holds an object: references to a value, and to what is inside it, from outside of it.

What somebody else holds he may change in place. It must not leave RAM then: the change would go to an object that the
mapping has forgotten. And it would free nothing.

The references that a value holds inside itself are counted by the collector's own means, `gc.get_referents`. An object
that has more references than these has a holder elsewhere. NumPy's arrays are no business of the collector's: their
bases, and the elements of arrays of objects, are followed here.
"""

from __future__ import annotations

import enum
import gc
import mmap
import sys
import types
import weakref
from collections import Counter
from datetime import date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from fractions import Fraction
from opcode import opmap
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Iterable

# Nothing can be changed in these. What they refer to does not matter.
_PLAIN: tuple[type, ...] = (
    *(type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented), slice),
    *(Decimal, Fraction, date, datetime, time, timedelta, tzinfo, UUID),
)

# These are pickled by their name, or not at all.
_NAMED: tuple[type, ...] = (
    *(type, enum.Enum, property, types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.MappingProxyType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodDescriptorType, types.WrapperDescriptorType),
    *(weakref.ref, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary),
)

# What memoryviews of one object share.
_MANAGED = type(gc.get_referents(memoryview(b""))[0])

_IMMUTABLE_PACKAGES = frozenset({"nodedb_mem", "pyarrow"})
_IMMUTABLE_PLAIN = frozenset({"numpy", "pandas"})
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE

_count = sys.getrefcount


def _count_box() -> int:
    box = [object()]
    return _count(box[0])


def _count_argument(value: object) -> int:
    return _count(value)


def _count_view() -> int:
    entry = [object()]

    def holders(view: object = None) -> int:
        return _count_argument(view)

    return holders(view=entry[0]) + 1  # the array


class _Probe:
    """Counts the references to a value that ``mapping[key] = value`` has while it runs."""

    count = 0

    def __setitem__(self, key: object, value: object) -> None:
        local = object()
        self.count = _count(value) - _count(local) + 1


_probe = _Probe()
_probe[0] = object()
_IN_STATEMENT = _probe.count
_probe.__setitem__(0, object())
_IN_CALL = _probe.count
if sys.version_info >= (3, 14):  # a statement may borrow the reference of the caller's variable
    _IN_STATEMENT = _IN_CALL


def known_references(caller: types.FrameType) -> int:
    """How many references to a value `__setitem__` has, and whoever called it: an assignment has more than a call."""
    is_statement = caller.f_code.co_code[caller.f_lasti] == opmap["STORE_SUBSCR"]
    return _IN_STATEMENT if is_statement else _IN_CALL


# What getrefcount() says of an object that nothing refers to but the value of a dict; the item of a list; what it says
# of the argument of a function beyond the references that there are before; of a private mapping that an array lies in.
_OF_DICT = next(map(_count, {0: object()}.values()))
_OF_LIST = _count_box()
_OF_ARGUMENT = _count_argument(object())
_OF_VIEW = _count_view()


_is_atom: dict[type, bool] = {}
_known_atoms: set[type] = set()


def _learn(kind: type) -> bool:
    """Decide whether what an object of a type refers to is left alone."""
    package = kind.__module__.partition(".")[0]
    if package == "pandas" and (kind.__module__.startswith("pandas._libs") or hasattr(kind, "construct_from_string")):
        atom = True  # its internals, and its types of elements
    elif package == "numpy":
        numpy = sys.modules["numpy"]
        atom = issubclass(kind, numpy.dtype | numpy.generic | numpy.ufunc) and not issubclass(kind, numpy.void)
    elif package in _IMMUTABLE_PACKAGES:
        atom = not hasattr(kind, "is_mutable")  # a buffer of Arrow
    elif issubclass(kind, _PLAIN):
        atom = kind in _PLAIN or package in _IMMUTABLE_PLAIN or not _has_attributes(kind)
    else:
        atom = issubclass(kind, _NAMED)
    if len(_is_atom) < 10_000:  # types come and go
        _is_atom[kind] = atom
        if atom:
            _known_atoms.add(kind)
    return atom


def _has_attributes(kind: type) -> bool:
    """Whether a class that was derived from a plain one gives its objects attributes."""
    derived = [base for base in kind.__mro__ if base.__flags__ & _HEAP_TYPE and base not in _PLAIN]
    return any(vars(base).get("__slots__", True) for base in derived)


def _is_named(function: types.FunctionType) -> bool:
    """Whether a function is where its name says, so that it is pickled by it."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


_stays: dict[type, bool | None] = {}  # None: where it is mutable, and on memory of others


def _learn_whether_it_stays(kind: type) -> bool | None:
    numpy = sys.modules.get("numpy")
    known: bool | None = (
        issubclass(kind, types.FunctionType | mmap.mmap)
        or (numpy is not None and issubclass(kind, numpy.void))
        or any(isinstance(vars(base).get("__del__"), types.FunctionType) for base in kind.__mro__)
    )
    if hasattr(kind, "is_mutable"):
        known = None
    if len(_stays) < 10_000:
        _stays[kind] = known
    return known


def stays(value: object, *, own_memory: bool = False) -> bool:
    """Whether an object is more than what pickle makes of it, so that it has to stay as it is.

    Such are functions without a name of their own, memory of files, what has a finalizer, memory of others in a buffer
    of Arrow, and records of NumPy, which cannot be stored to once they were pickled.
    """
    kind = type(value)
    known = _stays[kind] if kind in _stays else _learn_whether_it_stays(kind)
    return known if known is not None else not own_memory and bool(getattr(value, "is_mutable", False))


def is_atom(value: object) -> bool:
    """Whether nothing can be changed in an object."""
    kind = type(value)
    if kind is types.FunctionType:
        return _is_named(value)  # type: ignore[arg-type]
    return _is_atom[kind] if kind in _is_atom else _learn(kind)


def is_plain_array(value: Any) -> bool:
    """Whether an object is an array of NumPy's own class, of elements that are bytes and nothing else."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray and value.dtype.kind in "biufcmMSU"


def _may_have_held_base(base: Any, own_memory: bool) -> bool:
    """Whether others than an array may refer to its base, or to the base of that."""
    if base is None:
        return False
    if _count(base) > _OF_ARGUMENT + 1:
        return True
    if is_plain_array(base):
        return _may_have_held_base(base.base, own_memory)
    return not own_memory


def _referents(level: list[Any]) -> Iterable[Any]:
    """What the objects refer to, one by one."""
    numpy = sys.modules.get("numpy")
    arrays = [value for value in level if isinstance(value, numpy.ndarray)] if numpy is not None else []
    found = gc.get_referents(*level)
    for each in arrays:
        if each.base is not None:
            found.append(each.base)
        if each.dtype.hasobject:
            found.extend(_elements(each))
    return found


def _elements(objects: Any) -> list[object]:
    """Return what an array of objects, or of records with objects, refers to."""
    names = objects.dtype.names
    if names is None:
        return list(objects.flat) if objects.dtype.kind == "O" else []
    return [value for name in names if objects.dtype[name].hasobject for value in _elements(objects[name])]


class Span(NamedTuple):
    """Where the elements of an array lie."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, array: Any) -> Self:
        """Describe an array."""
        return cls(array.__array_interface__["data"][0], array.shape, array.strides, array.itemsize)

    def extent(self, *, but: int | None = None) -> tuple[int, int]:
        """Return where it begins and ends, in bytes; as if the axis `but` were of length 1."""
        steps = [
            (count - 1) * step
            for axis, (count, step) in enumerate(zip(self.shape, self.strides, strict=True))
            if axis != but
        ]
        begin = self.address + sum(step for step in steps if step < 0)
        return begin, self.address + sum(step for step in steps if step > 0) + self.itemsize

    def is_apart(self, other: Span) -> bool:
        """Whether two arrays have no byte in common. False where that is hard to tell."""
        if 0 in self.shape or 0 in other.shape:
            return True
        (begin, end), (others_begin, others_end) = self.extent(), other.extent()
        if end <= others_begin or others_end <= begin:
            return True
        if self.strides != other.strides or not self.strides:
            return False
        # Parts of the rows of one matrix: where they lie in a row tells.
        axis = max(range(len(self.strides)), key=lambda axis: abs(self.strides[axis]))
        row = abs(self.strides[axis])
        (begin, end), (others_begin, others_end) = self.extent(but=axis), other.extent(but=axis)
        origin = min(begin, others_begin)
        first, second = (begin - origin) % row, (others_begin - origin) % row
        ends = first + end - begin, second + others_end - others_begin
        return max(ends) <= row and (ends[0] <= second or ends[1] <= first)


class Shared(NamedTuple):
    """An array that others refer to, and that a value has views of; it is not in the value itself.

    `outside` and `inside` count the references; `spans` tells where the views of the value lie.
    """

    base: Any
    outside: int
    inside: int
    spans: list[Span]


class Held(NamedTuple):
    """What others hold of a value.

    Attributes
    ----------
    itself : bool
        Someone else refers to the value itself.
    inside : list
        What is inside the value, can be changed, and is referred to from outside.
    shared : list of Shared
        Those arrays of `inside` that are there as the memory of views only.
    """

    itself: bool
    inside: list[Any]
    shared: list[Shared]


_NOT_HELD = Held(False, [], [])


class Memory:
    """Memory that a value was made on, and that nobody else knew then.

    Libraries keep views of it that the collector does not see. Views that came later are somebody's.
    """

    __slots__ = ("_managed", "_references")

    def __init__(self, view: memoryview) -> None:
        self._managed = gc.get_referents(view)[0]
        self._references = 0

    def settle(self) -> None:
        """Count who has it, once the value is made."""
        self._references = _count(self._managed)

    def has_new_views(self) -> bool:
        """Whether there are views that the value was not made of."""
        return _count(self._managed) > self._references


def is_referred_to(box: list[Any], known: int = 0) -> bool:
    """Whether others refer to the value itself; `box` and `known` as `holders` has them."""
    return not is_atom(box[0]) and _count(box[0]) > _OF_LIST + known


def holders(box: list[Any], known: int = 0, *, memory: Memory | None = None, view: object = None) -> Held:
    """Tell what others hold of a value.

    Parameters
    ----------
    box
        The value, in a list, which should be the only reference to it.
    known
        Further references to the value that do not count.
    memory
        What the value was made on.
    view
        The private mapping that an array came in, which its entry refers to.
    """
    if is_atom(box[0]):
        return _NOT_HELD
    own_memory = memory is not None and not memory.has_new_views()
    if is_plain_array(box[0]):
        if is_referred_to(box, known):
            return Held(True, [], [])
        if view is not None and box[0].base is view:
            return Held(True, [], []) if _count_argument(view) > _OF_VIEW else _NOT_HELD
        if not _may_have_held_base(box[0].base, own_memory):
            is_one = box[0].flags.forc or not box[0].flags.writeable or not _has_overlap(box[0])
            return _NOT_HELD if is_one else Held(True, [], [])
    elif stays(box[0], own_memory=own_memory):
        return Held(True, [], [])
    seen: dict[int, Any] = {id(box[0]): box[0]}
    inner: dict[int, int] = {}
    level = box
    while level:
        found = _referents(level)
        level = []
        if _known_atoms.issuperset(map(type, found)):
            break
        for value in found:
            number = id(value)
            if number in inner:
                inner[number] += 1
            elif not is_atom(value):
                inner[number] = 1
                if number not in seen:
                    seen[number] = value
                    if type(value) is not types.FunctionType:  # its module is not inside of the value
                        level.append(value)
    del found
    value = None
    counts = list(map(_count, seen.values()))
    own = next(iter(seen))
    counts[0] -= 1 + known
    outside = {number: count - _OF_DICT - inner.get(number, 0) for number, count in zip(seen, counts, strict=True)}
    others = [
        number
        for number, count in outside.items()
        if (count > 0 and not _is_harmless(seen[number], own_memory)) or stays(seen[number], own_memory=own_memory)
    ]
    if _HIDES_ATTRIBUTES and _has_held_attributes(seen):
        return Held(True, [], [])
    if _has_common_memory(seen, inner):
        return Held(True, [], [])
    if others and (caches := _caches(seen, others)):
        others = [number for number in others if number not in caches]
    if not others:
        return _NOT_HELD
    if others[0] == own or _are_attributes(seen, others):
        return Held(True, [], [])
    return Held(False, [seen[number] for number in others], _find_shared(seen, inner, outside, others))


def _has_common_memory(seen: dict[int, Any], inner: dict[int, int]) -> bool:
    """Whether a store to one part of a value changes another part: pickle makes each array again by itself.

    What is the memory of views, and nothing else, is no part. What pandas keeps beside its own arrays is its business.
    """
    own = next(iter(seen))
    numpy = sys.modules.get("numpy")
    if numpy is None or type(seen[own]).__module__.partition(".")[0] == "pandas":
        return False
    arrays = [value for value in seen.values() if isinstance(value, numpy.ndarray)]
    if not arrays:
        return False
    views = Counter(id(array.base) for array in arrays if array.base is not None)
    views.update(map(id, gc.get_referents(*(value for value in seen.values() if type(value) is _MANAGED))))
    memories = [number for number in views if number in inner and not isinstance(seen[number], numpy.ndarray)]
    if any(inner[number] > views[number] for number in memories):
        return True
    parts = [each for each in arrays if id(each) == own or inner[id(each)] > views[id(each)]]
    if any(each.flags.writeable and _has_overlap(each) for each in parts):
        return True
    places = sorted((*Span.of(each).extent(), number) for number, each in enumerate(parts) if each.size)
    for at, (_, end, number) in enumerate(places):
        for begin, _, other in places[at + 1 :]:
            if begin >= end:
                break
            one, two = parts[number], parts[other]
            if (one.flags.writeable or two.flags.writeable) and not Span.of(one).is_apart(Span.of(two)):
                return True
    return False


def _has_overlap(array: Any) -> bool:
    """Whether elements of an array lie on one another."""
    begin, end = Span.of(array).extent()
    return bool(array.nbytes > end - begin)


def _caches(seen: dict[int, Any], others: list[int]) -> set[int]:
    """Tell which of the others are caches: equal indexes of pandas share one, which pickle leaves out."""
    pandas = sys.modules.get("pandas")
    if pandas is None or not any(type(seen[number]) is dict for number in others):
        return set()
    return {id(getattr(value, "_cache", None)) for value in seen.values() if isinstance(value, pandas.Index)}


def _are_attributes(seen: dict[int, Any], others: list[int]) -> bool:
    """Whether the attributes of an object are among the others: by its ``__dict__``, which it gets anew from pickle."""
    mappings = {number for number in others if type(seen[number]) is dict}
    return bool(mappings) and any(
        id(value.__dict__) in mappings
        for value in seen.values()
        if type(value).__dictoffset__ and hasattr(value, "__dict__")
    )


class _Plain:
    pass


_plain = _Plain()
_OF_ATTRIBUTES = _count(_plain.__dict__)
# From 3.13 on, the collector does not tell of the ``__dict__`` of an object that keeps its attributes in itself.
_HIDES_ATTRIBUTES = sys.version_info >= (3, 13)


def _has_held_attributes(seen: dict[int, Any]) -> bool:
    """Whether others refer to a ``__dict__`` that the collector does not tell of."""
    return any(
        id(value.__dict__) not in seen and _count(value.__dict__) > _OF_ATTRIBUTES
        for value in list(seen.values())
        if type(value).__dictoffset__ == _Plain.__dictoffset__ and hasattr(value, "__dict__")
    )


def _find_shared(
    seen: dict[int, Any], inner: dict[int, int], outside: dict[int, int], others: list[int]
) -> list[Shared]:
    """Find the arrays among `others` that the value refers to by views only."""
    views: dict[int, list[Span]] = {number: [] for number in others if is_plain_array(seen[number])}
    for value in seen.values() if views else ():
        if is_plain_array(value) and id(value.base) in views:
            views[id(value.base)].append(Span.of(value))
    return [
        Shared(seen[number], outside[number], inner[number], spans)
        for number, spans in views.items()
        if len(spans) == inner[number]
    ]


def _is_harmless(value: object, own_memory: bool) -> bool:
    """Whether a holder of an object has nothing to change: not in it, nor in what it holds."""
    if isinstance(value, tuple | frozenset):
        return all(is_atom(each) or _is_harmless(each, own_memory) for each in value)
    return own_memory and isinstance(value, _MANAGED)
