"""What the machine says of memory: this process's, its control groups', and how long tasks stall for want of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_SHARE = 80  # per cent of what this process may use
_UNLIMITED = 1 << 62  # v1 says "no limit" by a number near 2**63


def resident_bytes() -> int:
    """Return this process's resident set, in bytes."""
    fd = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(fd, 256).split(b" ", 2)[1]) * _PAGE
    finally:
        os.close(fd)


@dataclass(frozen=True)
class ControlGroup:
    """A memory control group that this process is in: its folder, and the hierarchy's version, 1 or 2."""

    folder: Path
    top: Path
    version: int

    def limit(self) -> int | None:
        """The smallest limit along the path to the top; None: no limit."""
        names = ("memory.max", "memory.high") if self.version == 2 else ("memory.limit_in_bytes",)
        found: list[int] = []
        folder = self.folder
        while True:
            found += [size for name in names if (size := _number(folder / name)) is not None and size < _UNLIMITED]
            if folder == self.top or folder == folder.parent:
                break
            folder = folder.parent
        return min(found, default=None)

    def current(self) -> int | None:
        """Bytes in use, page cache included; None where the kernel does not tell."""
        return _number(self.folder / ("memory.current" if self.version == 2 else "memory.usage_in_bytes"))

    def working_set(self) -> int | None:
        """Bytes in use, less the page cache that the kernel can drop at once."""
        current = self.current()
        if current is None:
            return None
        name = "inactive_file" if self.version == 2 else "total_inactive_file"
        facts = (line.split() for line in _lines(self.folder / "memory.stat"))
        droppable = next((int(fact[1]) for fact in facts if len(fact) == 2 and fact[0] == name), 0)
        return max(0, current - droppable)

    def stall(self) -> Stall | None:
        """How long its tasks have stalled; None where the kernel does not tell."""
        return read_stall(self.folder / "memory.pressure")


@dataclass(frozen=True)
class Stall:
    """Per cent of the last ten seconds in which some tasks, or all of them, waited for memory."""

    some: float
    full: float


def read_stall(path: Path) -> Stall | None:
    """Read a file of pressure stall information; None where the kernel has none."""
    values: dict[str, float] = {}
    for line in _lines(path):
        kind, *facts = line.split()
        values[kind] = next((float(fact[6:]) for fact in facts if fact.startswith("avg10=")), 0.0)
    return Stall(values["some"], values.get("full", 0.0)) if "some" in values else None


def control_groups(process: str = "/proc/self") -> list[ControlGroup]:
    """Return the memory control groups that this process is in: that of version 2, that of version 1, or both."""
    places = {
        tuple(controllers.split(",")) if controllers else (): place
        for _, controllers, place in (line.split(":", 2) for line in _lines(Path(process, "cgroup")))
    }
    memory = next((place for controllers, place in places.items() if "memory" in controllers), None)
    groups = []
    for line in _lines(Path(process, "mountinfo")):
        fields = line.split()
        at = fields.index("-")
        kind, options = fields[at + 1], fields[at + 3].split(",")
        if kind == "cgroup2" and () in places:
            groups.append(_group(_unescaped(fields[4]), _unescaped(fields[3]), places[()], 2))
        elif kind == "cgroup" and "memory" in options and memory is not None:
            groups.append(_group(_unescaped(fields[4]), _unescaped(fields[3]), memory, 1))
    return [group for group in groups if group is not None and group.current() is not None]


def default_ceiling() -> int:
    """Return 80 % of the smallest of physical memory and the limits of this process's control groups."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * _PAGE]
    sizes += [limit for group in control_groups() if (limit := group.limit()) is not None]
    return max(1, min(sizes) * _SHARE // 100)


def _group(mount: str, root: str, place: str, version: int) -> ControlGroup | None:
    """Where a group's folder is: `root` is the group that is mounted."""
    inside = os.path.relpath(place, root) if root != "/" else place.lstrip("/")
    top = Path(mount)
    folder = top / inside if not inside.startswith("..") else top
    while not folder.is_dir() and folder != top:
        folder = folder.parent  # another name space: the path is not ours to see
    return ControlGroup(folder, top, version) if folder.is_dir() else None


def _unescaped(path: str) -> str:
    for escape, sign in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(escape, sign)
    return path


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None
