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
import sys
import types
import weakref
from array import array
from datetime import date, time, timedelta, tzinfo
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Iterable

# Nothing can be changed in these, or they are pickled by their name. What they refer to does not matter.
_ATOMS: tuple[type, ...] = (
    *(type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented), slice),
    *(Decimal, Fraction, date, time, timedelta, tzinfo, UUID, type, enum.Enum, property),
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.MappingProxyType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodDescriptorType, types.WrapperDescriptorType),
    *(weakref.ref, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary),
)

# What memoryviews share: it is of no use without one of them.
_MANAGED = type(gc.get_referents(memoryview(b""))[0])

# What has memory of its own, of which others may have views.
_MEMORY = (bytearray, memoryview, array)

_IMMUTABLE_PACKAGES = frozenset({"pyarrow"})

_is_atom: dict[type, bool] = {}


def _learn(kind: type) -> bool:
    """Decide whether what an object of a type refers to is left alone."""
    atom = issubclass(kind, _ATOMS) or kind.__module__.partition(".")[0] in _IMMUTABLE_PACKAGES
    if kind.__module__.partition(".")[0] == "numpy":
        numpy = sys.modules["numpy"]
        atom = issubclass(kind, numpy.dtype | numpy.generic | numpy.ufunc)
    if len(_is_atom) < 10_000:  # types come and go
        _is_atom[kind] = atom
    return atom


def _is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def has_memory(value: object) -> bool:
    """Whether an object's memory may be seen through others."""
    return isinstance(value, _MEMORY) or _is_array(value)


def is_atom(value: object) -> bool:
    """Whether nothing can be changed in an object."""
    kind = type(value)
    return _is_atom[kind] if kind in _is_atom else _learn(kind)


def _referents(level: list[object]) -> Iterable[Any]:
    """What the objects refer to, one by one."""
    arrays = [value for value in level if _is_array(value)]
    found = gc.get_referents(*level)
    for each in arrays:
        if each.base is not None:  # type: ignore[attr-defined]
            found.append(each.base)  # type: ignore[attr-defined]
        if each.dtype.hasobject:  # type: ignore[attr-defined]
            found.extend(_elements(each))
    return found


def _elements(objects: Any) -> list[object]:
    """Return what an array of objects, or of records with objects, refers to."""
    names = objects.dtype.names
    if names is None:
        return list(objects.flat) if objects.dtype.kind == "O" else []
    return [value for name in names if objects.dtype[name].hasobject for value in _elements(objects[name])]


_count = sys.getrefcount

# What getrefcount() says of an object that nothing refers to but the value of a dict, or the item of a list.
_OF_DICT = next(map(_count, {0: object()}.values()))


def holders(box: list[Any], known: int = 0) -> tuple[bool, list[Any]]:
    """Tell what others hold of a value.

    Parameters
    ----------
    box
        The value, in a list, which should be the only reference to it.
    known
        Further references to the value that do not count.

    Returns
    -------
    itself : bool
        Someone else refers to the value itself.
    inside : list
        What is inside the value, can be changed, and is referred to from outside.
    """
    if is_atom(box[0]):
        return False, []
    seen: dict[int, Any] = {id(box[0]): box[0]}
    inner: dict[int, int] = {}
    level = box
    while level:
        found = _referents(level)
        level = []
        for value in found:
            number = id(value)
            if number in inner:
                inner[number] += 1
                continue
            kind = type(value)
            if _is_atom[kind] if kind in _is_atom else _learn(kind):
                continue
            inner[number] = 1
            if number not in seen:
                seen[number] = value
                level.append(value)
    del found
    value = None
    counts = list(map(_count, seen.values()))
    own = next(iter(seen))
    counts[0] -= 1 + known
    others = [
        value
        for (number, value), count in zip(seen.items(), counts, strict=True)
        if count - _OF_DICT - inner.get(number, 0) > 0 and not _is_harmless(value)
    ]
    itself = bool(others) and id(others[0]) == own
    return itself, others[itself:]


def _is_harmless(value: object) -> bool:
    """Whether a holder of an object has nothing to change: not in it, nor in what it holds."""
    if isinstance(value, tuple | frozenset):
        return all(is_atom(each) or _is_harmless(each) for each in value)
    return isinstance(value, _MANAGED)
