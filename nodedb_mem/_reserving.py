"""How a mapping reserves what its values hold in RAM with a memory governor, and gives it back when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakMethod

from nodedb_mem._system import default_ceiling
from nodedb_mem.errors import BudgetExhaustedError, GlobalCeilingExceededError
from nodedb_mem.governor import MemoryGovernor

if TYPE_CHECKING:
    from collections.abc import Callable

    from nodedb_mem._reclaim import Reclaimer
    from nodedb_mem._watch import Watch
    from nodedb_mem.governor import Reservation


class Account:
    """What one mapping reserves, of one engine. Without a governor it does nothing.

    With `watch` it has a governor of its own, whose ceiling is that of the process, and which watches what is real.
    """

    def __init__(self, governor: MemoryGovernor | None, engine: int, *, watch: bool = False) -> None:
        if watch and governor is not None:
            raise ValueError("the governor has a watch of its own: call its watch() instead")
        self.governor = governor
        self.engine = engine
        self.is_watching = watch
        self.watch: Watch | None = None
        self.reclaimer: Reclaimer | None = None

    def open(self, give_back: Callable[[int], int]) -> None:
        """Be asked for memory from now on, by a method whose object is not kept by that.

        Raises
        ------
        UnknownEngineError
            The governor does not know the engine.
        ModuleNotFoundError
            The watch finds no psutil.
        """
        if self.is_watching:
            ceiling = default_ceiling()
            self.governor = MemoryGovernor(ceiling, {self.engine: ceiling})
            self.watch = self.governor.watch()
        if self.governor is None:
            return
        known = WeakMethod(give_back)

        def ask(wanted: int) -> int:
            method = known()
            return 0 if method is None else method(wanted)

        self.governor.reserve(self.engine, 0).release()
        self.reclaimer = self.governor.add_reclaimer(self.engine, ask)

    def leave(self) -> None:
        """Be asked no more."""
        if self.reclaimer is not None:
            self.reclaimer.remove()
            self.reclaimer = None

    def close(self) -> None:
        """Be asked no more, and end the watch."""
        self.leave()
        if self.watch is not None:
            self.watch.stop()

    def obtain(self, size: int) -> tuple[Reservation | None, bool]:
        """Reserve the bytes of a value, for which others may have to give back theirs.

        Not to be called with the lock of a mapping: those others are mappings, too.

        Returns
        -------
        reservation
            Of exactly these bytes; None without a governor.
        fits : bool
            False if they are charged, beyond what there is: as much should go out.
        """
        if self.governor is None:
            return None, True
        try:
            return self.governor.reserve(self.engine, size), True
        except (BudgetExhaustedError, GlobalCeilingExceededError):
            return self.governor.charge(self.engine, size), False
