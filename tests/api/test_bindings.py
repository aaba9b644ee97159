"""The line between the two bindings, and the one translator that makes exceptions for both."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit import NewRegion
from nodedb_mem import InvalidSlotError, OverflowReader, OverflowRegion, RegionClosedError, RegionError, _memory
from nodedb_mem._core import lib
from nodedb_mem.errors import error_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def translator() -> Iterator[None]:
    yield
    _memory.translate_with(error_of)


def test_no_function_of_the_core_is_called_through_both_bindings() -> None:
    def used(folder: str, pattern: str, call: str) -> set[str]:
        return {name for file in (ROOT / folder).glob(pattern) for name in re.findall(call, file.read_text())}

    extension = used("csrc/python", "*.c", r"\b(ndm_(?:region|reader|view|h|path|governor)_\w+)\(")
    control = used("csrc/python", "control.h", r"\b(ndm_(?:region|reader|governor)_\w+)\(")  # which cffi compiles in
    cffi = control | used("nodedb_mem", "**/*.py", r"\blib\.(ndm_\w+)")
    assert len(extension) > 20 and len(cffi) > 15
    assert extension & cffi == set()


def test_each_public_function_is_held_to_leaving_the_last_error_alone() -> None:
    headers = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.h"))
    public = set(re.findall(r"\b(ndm_[a-z_]+)\(", headers))
    assert len(public) > 60
    assert public <= set(re.findall(r"\b(ndm_[a-z_]+)\(", (ROOT / "tests/core/test_last_error.c").read_text()))


REFUSED: dict[str, Callable[[OverflowRegion], object]] = {
    "read": lambda region: region.read(77),
    "read_bytes": lambda region: region.read_bytes(77),
    "read_many": lambda region: region.read_many([77]),
    "free": lambda region: region.free(77),
    "free_many": lambda region: region.free_many([77]),
    "commit": lambda region: region.commit(77),
    "slot": lambda region: region.slot(77),
    "share": lambda region: region.share(77),
    "evict": lambda region: region.evict([77]),
    "prefetch": lambda region: region.prefetch([77]),
    "write": lambda region: region.write(bytes(1 << 25), 0),
    "write_packed": lambda region: region.write_many(bytes(1 << 25), 0, lengths=memoryview(LENGTHS).cast("q")),
    "allocate": lambda region: region.allocate(1 << 25, 0),
}
LENGTHS = (1 << 25).to_bytes(8, sys.byteorder)


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_a_translator_that_fails_ends_in_an_exception(
    new_region: NewRegion, call: Callable[[OverflowRegion], object]
) -> None:
    region = new_region()
    _memory.translate_with(lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        call(region)
    for wrong in (None, 7, ValueError, "no exception"):
        _memory.translate_with(lambda *_: wrong)  # type: ignore[arg-type, return-value]  # noqa: B023
        with pytest.raises(SystemError, match="no exception"):
            call(region)
    _memory.translate_with(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callable"):
        call(region)
    assert len(region) == 0


def test_what_is_seldom_needed_is_not_imported_with_the_package(run_python: Callable[..., str]) -> None:
    """asyncio alone takes as long as all of the package."""
    script = """
    import sys, nodedb_mem
    print(sorted({"asyncio", "numpy", "pandas", "pyarrow", "psutil", "dask", "zict", "rich"} & set(sys.modules)))
    """
    assert run_python(script) == "[]\n"


def test_without_a_translator_a_refusal_is_an_exception_all_the_same(run_python: Callable[..., str]) -> None:
    """The extension alone, as its own module under another path: nothing has registered there."""
    script = """
    import sys
    from importlib.machinery import ExtensionFileLoader
    from importlib.util import module_from_spec, spec_from_file_location

    sys.path.insert(0, sys.argv[2])
    spec = spec_from_file_location("alone._memory", sys.argv[1])
    memory = module_from_spec(spec)
    spec.loader.exec_module(memory)
    assert "nodedb_mem" not in sys.modules
    try:
        memory.open_reader(b"nowhere", b"nowhere.slots", b"nowhere.leases", ("reader", "nowhere"))
    except SystemError as error:
        print(error)
    """
    assert "no translator for status -8" in run_python(script, _memory.__file__, ROOT)


def test_what_the_translator_does_cannot_change_what_was_refused(new_region: NewRegion) -> None:
    region, other = new_region(), new_region("other")
    freed = region.write(b"x", 0)
    region.free(freed)
    other.close()

    def busy(details: bytes, *rest: Any) -> Exception:
        _memory.translate_with(error_of)  # the one that runs goes on
        assert lib.ndm_region_flush(other._handle) == lib.NDM_ERR_CLOSED
        with pytest.raises(InvalidSlotError, match="slot 99 never existed"):
            region.read(99)
        return error_of(details, *rest)

    _memory.translate_with(busy)
    with pytest.raises(InvalidSlotError, match=f"slot {freed} has been freed") as caught:
        region.read(freed)
    assert caught.value.__context__ is None and caught.value.__cause__ is None


def test_refusals_keep_no_references(new_region: NewRegion) -> None:
    region = new_region()
    counted = (error_of, region._where, region._holder)
    before = [sys.getrefcount(thing) for thing in counted]
    for call in REFUSED.values():
        for _ in range(20):
            with pytest.raises(RegionError):
                call(region)
    assert [sys.getrefcount(thing) for thing in counted] == before


def test_both_bindings_give_the_same_exception(new_region: NewRegion) -> None:
    region = new_region()
    region.write(b"x", 0)
    with OverflowReader(str(region.path)) as reader:
        reader.close()
        messages = set()
        for call in (reader.stats, reader.leased, reader.slots, lambda: reader.read(0), lambda: reader.read_bytes(0)):
            with pytest.raises(RegionClosedError) as caught:
                call()
            messages.add(str(caught.value))
        assert messages == {f"{region.path}: the reader is closed"}
    region.close()
    messages = set()
    for call in (region.stats, region.flush, region.trim, lambda: region.capacity, lambda: region.read(0)):
        with pytest.raises(RegionClosedError) as caught:
            call()
        messages.add(str(caught.value))
    assert messages == {"the region is closed"}


def test_only_a_borrow_gives_what_is_asked_about_afterwards(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"x", 0)
    with OverflowReader(str(region.path)) as reader:
        view, loan = _memory.borrow(reader._holder, slot, -1)
        assert view == b"x" and _memory.is_unchanged(loan)
        for wrong in (bytes(48), None, view, reader._holder, type(loan)):
            with pytest.raises(TypeError, match="loan"):
                _memory.is_unchanged(wrong)
        region.free(slot)
        assert not _memory.is_unchanged(loan)
    del reader
    with pytest.raises(RegionClosedError):  # the loan keeps what it is of
        _memory.is_unchanged(loan)
