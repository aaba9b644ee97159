"""How a mapping reserves what its values hold in RAM with a memory governor, and gives it back when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakMethod

from nodedb_mem.errors import BudgetExhaustedError, GlobalCeilingExceededError

if TYPE_CHECKING:
    from collections.abc import Callable


class Reservation(Protocol):
    """Bytes that are reserved until `release`."""

    def release(self) -> object:
        """Give them back."""


class Governor(Protocol):
    """What a mapping needs of a memory governor."""

    def reserve(self, engine: int, size: int, /) -> Reservation:
        """Reserve bytes; BudgetExhaustedError or GlobalCeilingExceededError where they do not fit."""

    def charge(self, engine: int, size: int, /) -> Reservation:
        """Count bytes that are in use already, whether they fit or not."""

    def add_reclaimer(self, engine: int, callback: Callable[[int], int], /) -> Any:
        """Ask `callback(bytes_wanted)` for bytes when they are short; the result has `remove()`."""


class Account:
    """What one mapping reserves, of one engine. Without a governor it does nothing."""

    def __init__(self, governor: Governor | None, engine: int) -> None:
        self.governor = governor
        self.engine = engine
        self.reclaimer: Any = None

    def open(self, give_back: Callable[[int], int]) -> None:
        """Be asked for memory from now on, by a method whose object is not kept by that.

        Raises
        ------
        UnknownEngineError
            The governor does not know the engine.
        """
        if self.governor is None:
            return
        known = WeakMethod(give_back)

        def ask(wanted: int) -> int:
            method = known()
            return 0 if method is None else method(wanted)

        self.governor.reserve(self.engine, 0).release()
        self.reclaimer = self.governor.add_reclaimer(self.engine, ask)

    def close(self) -> None:
        """Be asked no more."""
        if self.reclaimer is not None:
            self.reclaimer.remove()
            self.reclaimer = None

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
