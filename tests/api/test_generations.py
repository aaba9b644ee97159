"""The generation of a slot comes to its end: an old reference never gives another value's bytes."""

from __future__ import annotations

import os
import struct

import pytest

from kit import Check, NewRegion
from nodedb_mem import InvalidSlotError, OverflowReader, OverflowRegion, StaleSlotError

HEADER, RECORD = 4096, 24
LAST = (1 << 32) - 1


def set_generation(region: OverflowRegion, slot: int, generation: int) -> None:
    """What many frees and writes would do to a closed region's table."""
    with open(f"{region.path}.slots", "r+b") as file:
        place = HEADER + RECORD * slot + 16
        (life,) = struct.unpack("=Q", os.pread(file.fileno(), 8, place))
        os.pwrite(file.fileno(), struct.pack("=Q", life >> 32 << 32 | generation), place)


@pytest.mark.parametrize("generation", [LAST - 3, LAST - 2, LAST - 1, LAST])
def test_a_slot_at_its_last_generation_is_never_given_out_again(
    new_region: NewRegion, check: Check, generation: int
) -> None:
    region = new_region()
    slot = region.write(b"first value", 0)
    old = region.share(slot)
    region.free(slot)
    assert region.write(b"another", 0) == slot
    region.close()
    set_generation(region, slot, generation)
    region = new_region(recover=True)
    refs = [old]
    with OverflowReader(region.path) as reader:
        for turn in range(8):
            if slot in region:
                refs.append(region.share(slot))
                region.free(slot)
            written = region.write(b"OTHER BYTES %d" % turn, 0)
            assert written == slot or LAST - generation <= turn + 1
            for ref in refs:
                with pytest.raises(StaleSlotError):
                    reader.read_bytes(ref)
                assert not reader.is_current(ref)
            check(region)
        assert slot not in region
        for verb in (region.read, region.free, reader.read):
            with pytest.raises(InvalidSlotError, match="freed"):
                verb(slot)
        count, live_values = region.slot_count, {found.slot for found in reader.slots()}
        assert slot not in live_values and len(live_values) == len(region)
    region.close()
    region = new_region(recover=True)  # retired for whoever comes later, too
    check(region)
    assert region.slot_count == count and {n for n in range(count) if n in region} == live_values
    assert slot not in [region.write(b"x", 0) for _ in range(20)]
    region.close()
    region = new_region()  # an empty region begins anew: its references have another incarnation
    assert region.write(b"new", 0) == 0
    with OverflowReader(region.path) as reader, pytest.raises(StaleSlotError):
        reader.read(old)
