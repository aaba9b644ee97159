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

# What memoryviews of one object share.
_MANAGED = type(gc.get_referents(memoryview(b""))[0])

# What has memory of its own, of which others may have views.
_MEMORY = (bytearray, memoryview, array, _MANAGED)

_IMMUTABLE_PACKAGES = frozenset({"nodedb_mem", "pyarrow"})

_count = sys.getrefcount


def _count_box() -> int:
    box = [object()]
    return _count(box[0])


def _count_argument(value: object) -> int:
    return _count(value)


# What getrefcount() says of an object that nothing refers to but the value of a dict; the item of a list; what it says
# of the argument of a function beyond the references that there are before.
_OF_DICT = next(map(_count, {0: object()}.values()))
_OF_LIST = _count_box()
_OF_ARGUMENT = _count_argument(object())

_is_atom: dict[type, bool] = {}
_known_atoms: set[type] = set()


def _learn(kind: type) -> bool:
    """Decide whether what an object of a type refers to is left alone."""
    atom = issubclass(kind, _ATOMS) or kind.__module__.partition(".")[0] in _IMMUTABLE_PACKAGES
    if kind.__module__.partition(".")[0] == "numpy":
        numpy = sys.modules["numpy"]
        atom = issubclass(kind, numpy.dtype | numpy.generic | numpy.ufunc)
    if len(_is_atom) < 10_000:  # types come and go
        _is_atom[kind] = atom
        if atom:
            _known_atoms.add(kind)
    return atom


def has_memory(value: object) -> bool:
    """Whether an object's memory may be seen through others."""
    numpy = sys.modules.get("numpy")
    return isinstance(value, _MEMORY) or (numpy is not None and isinstance(value, numpy.ndarray))


def is_atom(value: object) -> bool:
    """Whether nothing can be changed in an object."""
    kind = type(value)
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


def holders(box: list[Any], known: int = 0, *, own_memory: bool = False) -> tuple[bool, list[Any]]:
    """Tell what others hold of a value.

    Parameters
    ----------
    box
        The value, in a list, which should be the only reference to it.
    known
        Further references to the value that do not count.
    own_memory
        The value was made on memory that nobody else knows. Views that libraries keep of it do not count.

    Returns
    -------
    itself : bool
        Someone else refers to the value itself.
    inside : list
        What is inside the value, can be changed, and is referred to from outside.
    """
    if is_atom(box[0]):
        return False, []
    if is_plain_array(box[0]):
        if _count(box[0]) > _OF_LIST + known:
            return True, []
        if not _may_have_held_base(box[0].base, own_memory):
            return False, []
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
                    level.append(value)
    del found
    value = None
    counts = list(map(_count, seen.values()))
    own = next(iter(seen))
    counts[0] -= 1 + known
    others = [
        value
        for (number, value), count in zip(seen.items(), counts, strict=True)
        if count - _OF_DICT - inner.get(number, 0) > 0 and not _is_harmless(value, own_memory)
    ]
    itself = bool(others) and id(others[0]) == own
    return itself, others[itself:]


def _is_harmless(value: object, own_memory: bool) -> bool:
    """Whether a holder of an object has nothing to change: not in it, nor in what it holds."""
    if isinstance(value, tuple | frozenset):
        return all(is_atom(each) or _is_harmless(each, own_memory) for each in value)
    return own_memory and isinstance(value, _MANAGED)
