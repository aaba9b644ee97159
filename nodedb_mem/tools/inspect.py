"""What ``nodedb-mem inspect`` shows: a region seen from outside, with or without a living owner.

Everything comes from the region's files, opened for reading only. The owner works on meanwhile, so the figures are of
slightly different moments; those that are derived from the slots agree with each other.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import time
import warnings
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nodedb_mem.engine import EngineId
from nodedb_mem.errors import RegionIOError, StaleSlotError
from nodedb_mem.reader import OverflowReader
from nodedb_mem.stats import ReaderSlot
from nodedb_mem.tools.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

_ATTEMPTS, _PAUSE = 20, 0.05  # while an owner is making the region, or opening it anew
_CACHESTAT = 451  # the number is the same on every architecture

# The colour of each engine, in a terminal and in a picture.
_COLOURS: dict[int, str] = {
    EngineId.VECTOR: "#4c9be8",
    EngineId.SPARSE: "#e8a33d",
    EngineId.CRDT: "#6abf69",
    EngineId.TIMESERIES: "#d96459",
    EngineId.QUERY: "#a27bd1",
    EngineId.WAL: "#c9b23f",
    EngineId.BRIDGE: "#58b8b0",
}
_BY_NAME = {str(engine): colour for engine, colour in _COLOURS.items()}
_OTHER, _LEASED, _FREE, _BEYOND = "#999999", "#6b5b4b", "#d0d0d0", "#f6f6f6"


@dataclass
class Cell:
    """A part of the file: bytes of live values by engine, bytes of freed ones that leases keep, bytes in RAM.

    `is_used`: whether any of it is below the high-water mark.
    """

    size: int
    is_used: bool
    engines: dict[int, int] = field(default_factory=dict)
    kept_bytes: int = 0
    resident_bytes: int | None = None

    @property
    def engine(self) -> int | None:
        """The engine that has the most of it; None: no value lives there."""
        return max(self.engines, key=self.engines.__getitem__) if self.engines else None

    @property
    def is_resident(self) -> bool:
        """Whether at least half of it is in RAM."""
        return self.resident_bytes is not None and 2 * self.resident_bytes >= self.size > 0


@dataclass(frozen=True)
class Snapshot:
    """A region at about one moment; sizes in bytes.

    `owner` is the process id of a living owner, None where the region is closed or its owner is dead.
    Below `used_bytes` the file is live, pinned or free. `pinned_bytes` are freed, but wait for a view of the owner's or
    a lease to end, or for the owner to ask for leases: as the owner last published them, and without an owner what
    leases keep. `leases` are those held by
    living processes, `leased_bytes` the values that they keep, live or freed; None where the leases file may not be
    read. `kept` lists the freed ones among these, offset and size. `resident_bytes` is None where the kernel does not
    tell.
    """

    path: str
    owner: int | None
    incarnation: int
    alignment: int
    capacity: int
    max_capacity: int
    used_bytes: int
    live_bytes: int
    live_slots: int
    slot_count: int
    free_bytes: int
    pinned_bytes: int
    leases: int | None
    leased_bytes: int | None
    resident_bytes: int | None
    engines: dict[str, dict[str, int]]
    slots: list[ReaderSlot]
    kept: list[tuple[int, int]]

    def as_json(self) -> dict[str, Any]:
        """Everything but the single slots and places."""
        return {name: value for name, value in vars(self).items() if name not in ("slots", "kept")}

    def cells(self, count: int) -> list[Cell]:
        """Cut the file into at most `count` parts of equal size, whole pages."""
        pages = -(-self.capacity // mmap.PAGESIZE)
        step = -(-pages // count) * mmap.PAGESIZE
        starts = range(0, self.capacity, step) if step else range(0)
        cells = [Cell(min(step, self.capacity - start), start < self.used_bytes) for start in starts]
        for slot in self.slots:
            engine = int(slot.engine)
            for number, size in self._parts(slot.offset, slot.size, step):
                cells[number].engines[engine] = cells[number].engines.get(engine, 0) + size
        for offset, length in self.kept:
            for number, size in self._parts(offset, length, step):
                cells[number].kept_bytes += size
        for cell, resident in zip(cells, _residency(self.path, starts, step), strict=False):
            cell.resident_bytes = resident
        return cells

    def _parts(self, offset: int, size: int, step: int) -> Iterator[tuple[int, int]]:
        """Cut a range of the file: number of a part, and the bytes there."""
        end = min(offset + size, self.capacity)
        while offset < end:
            upto = min(end, (offset // step + 1) * step)
            yield offset // step, upto - offset
            offset = upto


def look(path: str) -> Snapshot:
    """Take a snapshot of the region at `path`.

    Raises
    ------
    OSError
        There is no such file, or it is no region's, or may not be read. `filename` is the path at fault.
    """
    for attempt in range(_ATTEMPTS):
        try:
            facts = os.stat(path)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(errno.EINVAL, "Not a regular file", path)
            if facts.st_size > 0 and not os.path.exists(path + ".slots"):
                raise OSError(errno.EINVAL, "Not a region: it has no slot table beside it", path)
            with OverflowReader(path) as reader:
                return _look(path, reader)
        except (StaleSlotError, RegionIOError) as error:
            passing = isinstance(error, StaleSlotError) or error.errno == errno.EINVAL  # the table: being made
            if attempt < _ATTEMPTS - 1 and (passing or not os.path.exists(path + ".slots")):
                time.sleep(_PAUSE)
            elif not os.path.exists(path + ".slots"):
                raise OSError(errno.EINVAL, "Not a region: it has no slot table beside it", path) from None
            else:
                raise
    raise AssertionError


def _look(path: str, reader: OverflowReader) -> Snapshot:
    stats, slots = reader.stats(), reader.slots()
    engines: dict[int, list[int]] = {}
    for slot in slots:
        usage = engines.setdefault(int(slot.engine), [0, 0])
        usage[0] += slot.size
        usage[1] += 1
    taken = sum(-(-slot.size // stats.alignment) * stats.alignment for slot in slots)
    try:
        leased = reader.leased()
    except RegionIOError:
        leased = None
    live = [(slot.offset, slot.size) for slot in slots]
    kept = _without(_union(leased or []), _union(live))
    pinned = stats.pinned_bytes if stats.owner is not None else sum(size for _, size in kept)
    return Snapshot(
        path=path,
        owner=stats.owner,
        incarnation=stats.incarnation,
        alignment=stats.alignment,
        capacity=stats.capacity,
        max_capacity=stats.max_capacity,
        used_bytes=stats.used_bytes,
        live_bytes=sum(slot.size for slot in slots),
        live_slots=len(slots),
        slot_count=stats.slot_count,
        free_bytes=max(0, stats.used_bytes - taken - pinned),
        pinned_bytes=pinned,
        leases=None if leased is None else len(leased),
        leased_bytes=None if leased is None else sum(size for _, size in _union(leased)),
        resident_bytes=stats.resident_bytes,
        engines={
            name_of(engine): {"live_bytes": size, "live_slots": count}
            for engine, (size, count) in sorted(engines.items())
        },
        slots=slots,
        kept=kept,
    )


def name_of(engine: int) -> str:
    """The name of a known engine, else its number."""
    try:
        return str(EngineId(engine))
    except ValueError:
        return str(engine)


def _union(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Places in order, those that overlap joined."""
    union: list[tuple[int, int]] = []
    for offset, size in sorted(places):
        if union and offset < (end := sum(union[-1])):
            union[-1] = (union[-1][0], max(end, offset + size) - union[-1][0])
        elif size:
            union.append((offset, size))
    return union


def _without(places: list[tuple[int, int]], others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those places that touch none of the others; both are in order, and apart."""
    starts = [offset for offset, _ in others]
    found = []
    for offset, size in places:
        before = bisect_left(starts, offset + size)
        if before == 0 or sum(others[before - 1]) <= offset:
            found.append((offset, size))
    return found


def _residency(path: str, starts: range, step: int) -> Iterator[int]:
    """Bytes in RAM of each part of a file. Stops where the system does not tell (before Linux 6.5)."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for start in starts:
            extent, counts = (ctypes.c_uint64 * 2)(start, step), (ctypes.c_uint64 * 5)()
            if call(ctypes.c_long(_CACHESTAT), fd, extent, counts, 0) != 0:
                return
            yield counts[0] * mmap.PAGESIZE
    finally:
        os.close(fd)


def _decimal(size: int) -> str:
    """Bytes with a decimal unit, the same in the terminal and in the picture."""
    if size < 1000:
        return _count(size, "byte")
    value, units = size / 1000, iter(("kB", "MB", "GB", "TB", "PB", "EB"))
    unit = next(units)
    while value >= 999.95:
        value, unit = value / 1000, next(units)
    return f"{value:.1f} {unit}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# ---- in a terminal ----------------------------------------------------------------------------------------------


def picture(shot: Snapshot, width: int, height: int) -> RenderableType:
    """Lay a snapshot out for a terminal: figures, bars, and a map of at most `height` lines."""
    from rich.console import Group

    return Group(_figures(shot), _bars(shot, width), *_map(shot, width, height))


def _figures(shot: Snapshot) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(shown(shot.path)), title_justify="left", show_header=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right")
    for label, value in (
        ("owner", "none: closed or dead" if shot.owner is None else f"alive, process {shot.owner}"),
        ("capacity", f"{_decimal(shot.capacity)} of {_decimal(shot.max_capacity)}"),
        ("used", _decimal(shot.used_bytes)),
        ("live", f"{_decimal(shot.live_bytes)} in {_count(shot.live_slots, 'slot')}"),
        ("free", _decimal(shot.free_bytes)),
        ("pinned", _decimal(shot.pinned_bytes)),
        ("leased", _leased(shot)),
        ("resident", "unknown" if shot.resident_bytes is None else _decimal(shot.resident_bytes)),
    ):
        table.add_row(label, value)
    return table


def _leased(shot: Snapshot) -> str:
    if shot.leases is None or shot.leased_bytes is None:
        return "unknown: the leases file may not be read"
    return f"{_decimal(shot.leased_bytes)} in {_count(shot.leases, 'lease')}"


def _bars(shot: Snapshot, width: int) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column("engine", no_wrap=True)
    table.add_column("bar")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("slots", justify="right", no_wrap=True)
    most = max((usage["live_bytes"] for usage in shot.engines.values()), default=0)
    for name, usage in shot.engines.items():
        colour = _BY_NAME.get(name, _OTHER)
        size = usage["live_bytes"]
        bar = ProgressBar(
            total=most or 1,
            completed=size,
            width=max(8, min(width - 45, 60)),
            complete_style=colour,
            finished_style=colour,
        )
        table.add_row(name, bar, _decimal(size), _count(usage["live_slots"], "slot"))
    return table


def _map(shot: Snapshot, width: int, height: int) -> Iterator[RenderableType]:
    from rich.panel import Panel
    from rich.text import Text

    columns = max(8, width - 4)
    cells = shot.cells(columns * max(1, height))
    text = Text(no_wrap=True, overflow="ignore")
    last = max((number for number, cell in enumerate(cells) if _symbol(cell)[0] != " "), default=0)
    shown = columns * (last // columns + 1)  # lines of nothing at the end are told, not drawn
    for start in range(0, min(shown, len(cells)), columns):
        if start:
            text.append("\n")
        for cell in cells[start : start + columns]:
            text.append(*_symbol(cell))
    each = f"map: a sign is {_decimal(cells[0].size)}" if cells else "map: the file is empty"
    yield Panel(text, title=each, title_align="left", width=columns + 4)
    if shown < len(cells):
        rest = sum(cell.size for cell in cells[shown:])
        yield Text(f"never used, and not drawn: the last {_decimal(rest)}")
    known = ", ".join(
        f"{_letter(engine)} {engine}" for engine in EngineId if any(int(engine) in cell.engines for cell in cells)
    )
    signs = [known] if known else []
    if any(engine not in _COLOURS for cell in cells for engine in cell.engines):
        signs.append("x other engine")
    if any(cell.engine is None and cell.kept_bytes for cell in cells):
        signs.append("# freed but leased")
    if unknown := bool(cells) and cells[0].resident_bytes is None:
        signs += [". free", "blank: never used"]
    else:
        signs += ["capital: in RAM", ". free", ": free and in RAM", "blank: never used"]
    yield Text(", ".join(signs))
    if unknown:
        yield Text("what is in RAM where: unknown (needs Linux 6.5, and a file that this user owns or may write to)")


def _colour_of(engine: int) -> str:
    return _COLOURS.get(engine, _OTHER)


def _letter(engine: int) -> str:
    return EngineId(engine).name[0].lower() if engine in _COLOURS else "x"


def _symbol(cell: Cell) -> tuple[str, str]:
    """A character and its style: legible without colours, and in ASCII."""
    if (engine := cell.engine) is not None:
        letter = _letter(engine)
        return letter.upper() if cell.is_resident else letter, f"black on {_colour_of(engine)}"
    if cell.kept_bytes:
        return "#", "dim"
    if cell.is_resident:
        return ":", "dim"
    return "." if cell.is_used else " ", "dim"


# ---- as a picture -----------------------------------------------------------------------------------------------


def plot(shot: Snapshot, target: str) -> None:
    """Draw a snapshot into a PNG file. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns, rows = 64, 32
    cells = shot.cells(columns * rows)
    blank = (1.0, 1.0, 1.0)
    colours = [to_rgb(_colour(cell)) for cell in cells]
    present = [to_rgb("#333333" if cell.is_resident else _BEYOND) for cell in cells]

    figure = Figure(figsize=(10, 9), layout="constrained")
    FigureCanvasAgg(figure)
    bars, used, resident = figure.subplots(3, 1, height_ratios=(2, 4, 4))
    names = list(shot.engines)
    sizes = [shot.engines[name]["live_bytes"] / 10**6 for name in names]
    bars.barh(names, sizes, color=[_BY_NAME.get(name, _OTHER) for name in names])
    bars.invert_yaxis()
    owner = "no owner" if shot.owner is None else f"owner {shot.owner}"
    in_ram = "unknown" if shot.resident_bytes is None else _decimal(shot.resident_bytes)
    bars.set(
        title=f"{shown(os.path.basename(shot.path))}: {owner}, {_decimal(shot.live_bytes)} live of "
        f"{_decimal(shot.capacity)}, resident: {in_ram}".replace("$", r"\$"),
        xlabel="MB live",
    )
    where = "in RAM: unknown" if cells and cells[0].resident_bytes is None else "in RAM: dark"
    for panel, values, title in ((used, colours, "used by"), (resident, present, where)):
        lines = max(1, -(-len(values) // columns))
        values += [blank] * (lines * columns - len(values))
        panel.imshow([values[i * columns : (i + 1) * columns] for i in range(lines)], aspect="auto")
        panel.set(xticks=[], yticks=[], title=title)
    legend = [Patch(color=_BY_NAME.get(name, _OTHER), label=name) for name in names]
    states = {"freed, leased": _LEASED, "free": _FREE, "never used": _BEYOND}
    legend += [Patch(color=colour, label=state) for state, colour in states.items()]
    used.legend(handles=legend, loc="center left", bbox_to_anchor=(1, 0.5))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in a name: a box stands for the sign
        figure.savefig(target, format="png", dpi=100)


def _colour(cell: Cell) -> str:
    if (engine := cell.engine) is not None:
        return _colour_of(engine)
    if cell.kept_bytes:
        return _LEASED
    return _FREE if cell.is_used else _BEYOND
