"""`OverflowRegion.handle`, a number that is harmless once the region is gone; pins; the command config."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest

import nodedb_mem
from kit import NewRegion
from nodedb_mem import InvalidSlotError, OverflowRegion, RegionClosedError, WrongThreadError, native
from nodedb_mem._core import ffi, lib
from nodedb_mem.errors import raise_status
from nodedb_mem.tools import cli


def outcomes(handle: int) -> set[int]:
    """Statuses of every call by handle."""
    buffer = ffi.new("uint8_t[16]")
    statuses = {
        lib.ndm_h_write(handle, b"intruder", 8, 0),
        lib.ndm_h_read_into(handle, 0, buffer, 16),
        lib.ndm_h_size(handle, 0),
        lib.ndm_h_contains(handle, 0),
        lib.ndm_h_free(handle, 0),
    }
    for pointer in (lib.ndm_h_pin(handle, 0, ffi.NULL), lib.ndm_h_region(handle)):
        assert pointer == ffi.NULL
        statuses.add(lib.ndm_last_error().status)
    return statuses


def test_a_handle_is_a_number_of_the_region_alone(new_region: NewRegion) -> None:
    first, second = new_region("first"), new_region("second")
    assert first.handle == first.handle != second.handle
    assert 0 < first.handle < 1 << 63


def test_slots_written_by_handle_are_read_by_python_and_back(new_region: NewRegion) -> None:
    region = new_region()
    slot = lib.ndm_h_write(region.handle, b"from native code", 16, 200)
    assert region.read(slot) == b"from native code" and region.slot(slot).engine == 200
    slot = region.write(b"from Python", 0)
    assert lib.ndm_h_size(region.handle, slot) == 11 and lib.ndm_h_contains(region.handle, slot) == 1
    buffer = ffi.new("uint8_t[11]")
    assert lib.ndm_h_read_into(region.handle, slot, buffer, 11) == 11 and bytes(buffer) == b"from Python"
    assert lib.ndm_h_free(region.handle, slot) == 0 and slot not in region


def test_a_closed_region_has_no_handle_and_its_old_one_is_stale(new_region: NewRegion) -> None:
    region = new_region()
    region.write(b"kept", 0)
    handle = region.handle
    region.close()
    with pytest.raises(RegionClosedError):
        _ = region.handle
    assert outcomes(handle) == {lib.NDM_ERR_CLOSED}


def test_a_collected_region_leaves_a_stale_handle_that_no_later_region_gets(tmp_path: Path) -> None:
    old = []
    for _ in range(20):
        region = OverflowRegion.temporary(tmp_path, initial_capacity=4096)
        old.append(region.handle)
        del region
        gc.collect()
    with OverflowRegion.temporary(tmp_path, initial_capacity=4096) as region:
        assert region.handle not in old and len(set(old)) == len(old)
        assert all(outcomes(handle) == {lib.NDM_ERR_CLOSED} for handle in old)


def test_a_call_by_handle_that_fails_names_its_slot(new_region: NewRegion) -> None:
    region = new_region()
    slots = [region.write(b"x", 0) for _ in range(5)]
    region.free(slots[3])
    handle, buffer = region.handle, ffi.new("uint8_t[16]")
    calls = (
        lambda slot: lib.ndm_h_free(handle, slot),
        lambda slot: lib.ndm_h_size(handle, slot),
        lambda slot: lib.ndm_h_read_into(handle, slot, buffer, 16),
        lambda slot: lib.ndm_last_error().status if lib.ndm_h_pin(handle, slot, ffi.NULL) == ffi.NULL else 0,
    )
    for call in calls:
        for slot, reason in ((slots[3], "has been freed"), (99, "never existed")):
            with pytest.raises(InvalidSlotError, match=f"^slot {slot} {reason}$") as caught:
                raise_status(call(slot))
            assert caught.value.slot == slot


def test_where_the_core_knows_no_slot_none_is_named(new_region: NewRegion) -> None:
    region = new_region()
    region.free(region.write(b"x", 0))
    with pytest.raises(InvalidSlotError, match=r"^the slot has been freed$") as caught:
        raise_status(lib.ndm_region_free(region._handle, 0))
    assert caught.value.slot is None


@pytest.mark.parametrize("number", [0, 1, 1 << 32, (1 << 32) - 1, 1 << 63, (1 << 64) - 1])
def test_a_number_that_is_no_handle_is_refused(number: int) -> None:
    assert outcomes(number) == {lib.NDM_ERR_CLOSED}


def test_only_the_owner_may_use_a_handle(new_region: NewRegion) -> None:
    region = new_region()
    region.write(b"mine", 0)
    handle = region.handle
    seen: list[object] = []

    def intrude() -> None:
        seen.append(outcomes(handle))
        with pytest.raises(WrongThreadError):
            _ = region.handle

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join()
    assert seen == [{lib.NDM_ERR_WRONG_THREAD}]
    assert region.read_bytes(0) == b"mine"


def test_a_forked_child_may_not_use_a_handle(new_region: NewRegion) -> None:
    region = new_region()
    region.write(b"mine", 0)
    handle = region.handle
    child = os.fork()
    if child == 0:
        os._exit(0 if outcomes(handle) == {lib.NDM_ERR_WRONG_THREAD} else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert region.read_bytes(0) == b"mine"


def test_a_pin_keeps_the_bytes_through_free_reuse_growth_and_close(new_region: NewRegion) -> None:
    region = new_region()
    value = os.urandom(5000)
    slot = region.write(value, 0)
    size = ffi.new("uint64_t *")
    pinned = lib.ndm_h_pin(region.handle, slot, size)
    region.free(slot)
    for _ in range(40):
        region.write(os.urandom(5000), 0)
    assert region.stats().pinned_bytes >= 5000
    assert ffi.buffer(pinned, size[0])[:] == value
    region.close()
    assert ffi.buffer(pinned, size[0])[:] == value
    lib.ndm_region_unpin(pinned)


def test_pins_and_views_of_a_slot_are_counted_together(new_region: NewRegion) -> None:
    region = new_region()
    slot = region.write(b"x" * 100, 0)
    view = region.read(slot)
    pinned = lib.ndm_h_pin(region.handle, slot, ffi.NULL)
    region.free(slot)
    view.release()
    del view
    region.write(b"y" * 100, 0)
    assert ffi.buffer(pinned, 100)[:] == b"x" * 100 and region.stats().pinned_bytes > 0
    lib.ndm_region_unpin(pinned)
    region.write(b"z", 0)
    assert region.stats().pinned_bytes == 0


def test_the_package_tells_where_its_native_parts_are() -> None:
    headers = {"nodedb_mem.h", "nodedb_mem_governor.h"}
    assert {path.name for path in Path(nodedb_mem.get_include()).iterdir()} == headers
    (folder,) = map(Path, nodedb_mem.get_library_dirs())
    (name,) = nodedb_mem.get_libraries()
    assert (folder / f"lib{name}.so").is_file() and (folder / f"lib{name}.a").is_file()
    assert (Path(native.get_cmake_dir()) / "nodedb_mem-config.cmake").is_file()
    assert (Path(native.get_pkgconfig_dir()) / "nodedb_mem.pc").is_file()


def test_config_prints_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    (libdir,) = nodedb_mem.get_library_dirs()
    assert cli.main(["config", "--pkgconfigdir", "--cflags", "--libs", "--includedir", "--cmakedir"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"-I{nodedb_mem.get_include()}",
        f"-L{libdir} -Wl,-rpath,{libdir} -lnodedb_mem",
        nodedb_mem.get_include(),
        native.get_cmake_dir(),
        native.get_pkgconfig_dir(),
    ]
    assert cli.main(["config", "--libs", "--static"]) == 0
    assert capsys.readouterr().out == f"{libdir}/libnodedb_mem.a -pthread\n"


def test_config_without_a_question_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["config"])
    assert stopped.value.code == 2 and "say what to print" in capsys.readouterr().err
