"""What ``nodedb-mem governor`` shows: a shared governor, seen from outside. It claims nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nodedb_mem.pressure import PressureLevel
from nodedb_mem.tools.shown import shown

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from nodedb_mem.budgets import GovernorSnapshot

_COLOURS = {
    PressureLevel.NORMAL: "green",
    PressureLevel.WARNING: "yellow",
    PressureLevel.CRITICAL: "red",
    PressureLevel.EMERGENCY: "bold red",
}


def picture(shot: GovernorSnapshot, width: int) -> RenderableType:
    """Draw a snapshot: figures, a bar for each engine, a bar for each process."""
    from rich.console import Group
    from rich.text import Text

    figures = [
        f"{shown(shot.path or '')}: {_decimal(shot.allocated)} of {_decimal(shot.ceiling)} reserved",
        f"pressure: {shot.pressure}; peak: {_decimal(shot.peak)}; waiting: {shot.waiting}",
    ]
    if shot.headroom:
        figures.append(f"headroom: {_decimal(shot.headroom)}")
    if shot.overcommitted:
        figures.append(f"over-committed: {_decimal(shot.overcommitted)}")
    figures.append(
        f"beyond what is reserved: {_decimal(shot.unmanaged)}"
        if any(process.real_bytes is not None for process in shot.processes)
        else "beyond what is reserved: unknown (no process runs a watch)"
    )
    return Group(*(Text(line) for line in figures), _engines(shot, width), _processes(shot, width))


def _engines(shot: GovernorSnapshot, width: int) -> Table:
    table = _table("engine", "", "reserved", "limit", "peak", "refused", "waits", "reclaimed", "pressure")
    for engine, budget in shot.engines.items():
        colour = _COLOURS[budget.pressure]
        table.add_row(
            str(engine),
            _bar(budget.allocated, budget.limit, width, colour),
            _decimal(budget.allocated),
            _decimal(budget.limit),
            _decimal(budget.peak),
            str(budget.rejections),
            str(budget.waits),
            _decimal(budget.reclaimed),
            str(budget.pressure),
        )
    return table


def _processes(shot: GovernorSnapshot, width: int) -> Table:
    table = _table("process", "", "reserved", "peak", "in RAM")
    for process in shot.processes:
        real = "unknown" if process.real_bytes is None else _decimal(process.real_bytes)
        bar = _bar(process.allocated, shot.ceiling, width, "cyan")
        table.add_row(str(process.pid), bar, _decimal(process.allocated), _decimal(process.peak), real)
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
    return table


def _bar(used: int, limit: int, width: int, colour: str) -> RenderableType:
    from rich.progress_bar import ProgressBar

    return ProgressBar(
        total=limit or 1,
        completed=min(used, limit or 1) if limit else (1 if used else 0),
        width=max(8, min(width - 90, 40)),
        complete_style=colour,
        finished_style=colour,
    )


def _decimal(size: int) -> str:
    from rich.filesize import decimal

    return decimal(size)
