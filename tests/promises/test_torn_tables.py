"""Tables and leases files with any bytes: what is refused is untouched, and nothing ends in a crash or a traceback."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import Check, NewRegion, blob, system
from nodedb_mem import MemError, OverflowReader, OverflowRegion, RegionIOError
from nodedb_mem.tools import inspect

HEADER_ROOM, RECORD = 4096, 24
ALIGNMENT, MOVE_SLOT = 24, 104
LIVE, MOVING = 1, 4
ENDINGS = ("", ".slots", ".leases")


def contents(path: Path) -> list[bytes]:
    return [Path(f"{path}{ending}").read_bytes() for ending in ENDINGS if Path(f"{path}{ending}").exists()]


def patch(path: Path, offset: int, *words: int) -> None:
    with open(f"{path}.slots", "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(f"={len(words)}Q", *words))


def shape(size: int, state: int) -> int:
    return size | state << 56


@pytest.fixture
def four(new_region: NewRegion, tmp_path: Path) -> Path:
    """Give the path of a closed region: four values of 1000 bytes at 0, 1024, 2048, 3072."""
    region = new_region()
    for number in range(4):
        region.write(blob(1000, number), 0)
    region.close()
    return tmp_path / "region"


def _moves(slot: int, start: int, to: int, moved: int, size: int = 1000) -> Callable[[Path], None]:
    def tear(path: Path) -> None:
        if slot < 4:
            patch(path, HEADER_ROOM + RECORD * slot, start, shape(size, MOVING))
        patch(path, MOVE_SLOT, slot + 1, start, to, moved)

    return tear


def _torn_later(path: Path) -> None:
    """A move that is sound, and after its value one that is not."""
    _moves(1, 1024, 8192, 0)(path)
    patch(path, HEADER_ROOM + RECORD * 3 + 8, shape(1000, 77))


REFUSED: dict[str, Callable[[Path], None]] = {
    "over another value": _moves(1, 1024, 0, 0),
    "out of another value": _moves(1, 2048, 8192, 0),
    "half over another value": _moves(1, 1024, 1024 + 512, 0),
    "over itself": _moves(3, 3072, 3072 + 64, 0),
    "past the end": _moves(3, 3072, 65_536, 0),
    "past the end, wrapping": _moves(3, 3072, (1 << 64) - 64, 0),
    "from past the end": _moves(3, (1 << 47), 0, 0),
    "more than there is": _moves(3, 3072, 8192, 1001),
    "slot 2^63": _moves((1 << 63) - 1, 0, 64, 0),
    "slot 2^63 + 1": _moves(1 << 63, 0, 64, 0),
    "slot 2^64 - 1": _moves((1 << 64) - 2, 0, 64, 0),
    "no such slot": _moves(4, 0, 64, 0),
    "a sound move, and a record of no state": _torn_later,
}


@pytest.mark.parametrize("tear", REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_recovery_has_changed_nothing(four: Path, tear: Callable[[Path], None]) -> None:
    tear(four)
    before = contents(four)
    for _ in range(2):
        with pytest.raises(RegionIOError, match="slot table is torn"):
            OverflowRegion(four, recover=True)
        assert contents(four) == before
    with OverflowRegion(four) as region:
        assert len(region) == 0


def test_a_sound_move_is_finished(four: Path, check: Check) -> None:
    _moves(1, 1024, 8192, 0)(four)
    with OverflowRegion(four, recover=True) as region:
        check(region)
        assert region.slot(1).offset == 8192
        assert [region.read_bytes(number) for number in range(4)] == [blob(1000, number) for number in range(4)]


@pytest.mark.parametrize("alignment", [0, 3, 8192, 1 << 63])
def test_a_table_with_no_alignment(four: Path, alignment: int) -> None:
    with OverflowReader(four) as reader:
        patch(four, ALIGNMENT, alignment)
        with pytest.raises(RegionIOError, match="torn"):
            reader.stats()
    with pytest.raises(RegionIOError, match="torn"):
        inspect.look(str(four))
    with pytest.raises(RegionIOError, match="torn"):
        OverflowRegion(four, recover=True)


_INTERESTING = (0, 1, 2, 63, 64, 255, 4096, 1 << 16, (1 << 31) - 1, 1 << 47, (1 << 48) - 1, 1 << 63, (1 << 64) - 1)


def _mutate(path: Path, chance: random.Random) -> None:
    """Set some words of the table and of the leases file, mostly where something stands."""
    for ending, start, end in (
        (".slots", 16, 200),
        (".slots", HEADER_ROOM, HEADER_ROOM + 8 * RECORD),
        (".leases", 0, 256),
    ):
        with open(f"{path}{ending}", "r+b") as file:
            for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
                file.seek(chance.randrange(start, end) & ~7)
                word = chance.choice(
                    (chance.choice(_INTERESTING), chance.getrandbits(64), shape(1000, chance.randrange(6)))
                )
                file.write(struct.pack("=Q", word))
    if chance.random() < 0.1:
        with open(f"{path}.slots", "r+b") as file:
            file.truncate(chance.choice((0, 7, 100, 199, 4096, 4120, 10_000)))


@pytest.mark.parametrize("rounds", [60, system(3000)])
def test_any_table_is_shown_recovered_or_refused(
    new_region: NewRegion, tmp_path: Path, check: Check, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    monkeypatch.setattr(inspect, "_PAUSE", 0)  # nobody is making the table
    region = new_region()
    for number in range(6):
        region.share(region.write(blob(1000, number), number))
    region.free(2)
    region.close()
    path, whole, outcomes = tmp_path / "region", contents(tmp_path / "region"), set()
    for seed in range(rounds):
        for ending, data in zip(ENDINGS, whole, strict=True):
            Path(f"{path}{ending}").write_bytes(data)
        _mutate(path, random.Random(seed))
        before = contents(path)
        try:
            shot = inspect.look(str(path))
            shot.as_json()
            shot.cells(100)
        except (OSError, MemError) as error:
            outcomes.add(type(error))
        assert contents(path) == before
        try:
            with OverflowRegion(path, recover=True) as again:
                check(again)
                for slot in range(min(again.slot_count, 100)):
                    if slot in again:
                        again.read_bytes(slot)
                outcomes.add(OverflowRegion)
        except RegionIOError:
            assert contents(path)[0] == before[0]
        try:
            with OverflowRegion(path, initial_capacity=1 << 16) as empty:
                check(empty)
                assert len(empty) == 0
        except RegionIOError as error:
            assert error.strerror
    assert {RegionIOError, OverflowRegion} <= outcomes
