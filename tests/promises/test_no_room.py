"""What an error says where a value finds no room: what is free, what is pinned, what the disk has left."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kit import NewRegion
from nodedb_mem import CapacityExceededError, OverflowReader, OverflowRegion, RegionIOError

MIB = 1 << 20


def fill_disk(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for size in (65536, 4096, 512):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


VERBS: dict[str, Callable[[OverflowRegion, int], object]] = {
    "write": lambda region, size: region.write(bytes(size), 0),
    "write_vectored": lambda region, size: region.write_vectored([bytes(size - 1), b"x"], 0),
    "write_many": lambda region, size: region.write_many([b"x", bytes(size)], 0),
    "write_packed": lambda region, size: region.write_many(bytes(size), 0, lengths=np.array([size])),
    "allocate": lambda region, size: region.allocate(size, 0),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
def test_the_ceiling_says_what_is_scattered_and_what_is_pinned(
    new_region: NewRegion, verb: Callable[[OverflowRegion, int], object]
) -> None:
    region = new_region(initial_capacity=MIB, max_capacity=MIB)
    slots = region.write_many([bytes(MIB // 16)] * 16, 0)
    views = [region.read(slot) for slot in (slots[1], slots[1], slots[3])]
    more = region.restore(slots[3])
    between = region.read(slots[9])  # or the free bytes on both sides of it would be brought together
    region.free_many([*slots[1:4:2], *slots[6:12:2], slots[7]])
    before = region.stats()
    with pytest.raises(CapacityExceededError) as caught:
        verb(region, MIB // 4)
    error, after = caught.value, region.stats()
    assert (after.free_bytes, after.used_bytes) == (before.free_bytes, before.used_bytes)
    assert (error.free_bytes, error.largest_free_bytes) == (before.free_bytes, before.largest_free_bytes)
    assert (error.free_bytes, error.largest_free_bytes) == (4 * MIB // 16, 3 * MIB // 16)
    assert (error.pinned_bytes, error.views) == (2 * MIB // 16, 4)
    assert error.max_capacity == MIB and error.disk_free is not None and error.disk_free > 0
    assert "262144 bytes are free in the region, 196608 of them together" in str(error)
    assert "131072 freed bytes are pinned by 4 live views" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.views) == (str(error), 4)
    del views, more, between


def test_nothing_pinned_is_not_spoken_of_and_leases_are(new_region: NewRegion) -> None:
    region = new_region(initial_capacity=4096, max_capacity=4096)
    slot = region.write(bytes(4096), 0)
    with pytest.raises(CapacityExceededError) as caught:
        region.write(b"x", 0)
    assert (caught.value.free_bytes, caught.value.pinned_bytes, caught.value.views) == (0, 0, 0)
    assert "pinned" not in str(caught.value)
    ref = region.share(slot)
    with OverflowReader(ref) as reader, reader.lease(ref):
        region.free(slot)
        with pytest.raises(CapacityExceededError, match="4096 freed bytes are pinned by leases") as caught:
            region.write(b"x", 0)
        assert (caught.value.pinned_bytes, caught.value.views) == (4096, 0)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.filterwarnings("ignore:.*tmpfs:ResourceWarning")
def test_a_full_disk_says_so_too(
    mount: Callable[[str, int], Path], kind: str, verb: Callable[[OverflowRegion, int], object]
) -> None:
    folder = mount(kind, 16)
    with OverflowRegion(folder / "region", initial_capacity=MIB, max_capacity=1 << 30) as region:
        slots = region.write_many([bytes(100_000)] * 4, 0)
        view = region.read(slots[2])
        region.free_many(slots[1:3])
        fill_disk(folder / "rest")
        with pytest.raises(RegionIOError) as caught:
            verb(region, 32 * MIB)
        error = caught.value
        assert error.errno == errno.ENOSPC and error.filename == str(folder / "region")
        assert (error.free_bytes, error.pinned_bytes, error.views) == (100_032, 100_032, 1)
        assert error.disk_free is not None and error.disk_free < MIB
        assert f"the disk has {error.disk_free} bytes left" in str(error) and "1 live view" in str(error)
        del view


def test_other_errors_carry_no_figures(tmp_path: Path) -> None:
    with pytest.raises(RegionIOError) as caught:
        OverflowRegion(tmp_path / "missing" / "region")
    assert caught.value.free_bytes is None and "free in the region" not in str(caught.value)
    assert str(CapacityExceededError(2, 1)) == "2 bytes are required, max_capacity is 1"
