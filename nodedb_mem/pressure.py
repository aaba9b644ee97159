"""How near memory is to its limits, and when an engine spills and restores."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum


class PressureLevel(IntEnum):
    """Levels of pressure, in their order; `str()` gives the lower-case name."""

    NORMAL = 0
    WARNING = 1
    CRITICAL = 2
    EMERGENCY = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class PressureThresholds:
    """Where the levels begin, in per cent of a limit.

    A level begins when the threshold is reached. It ends when use is `hysteresis` points below the threshold, so that a
    level does not come and go with each reservation.

    Raises
    ------
    ValueError
        The thresholds do not ascend from 1, or `hysteresis` is not 0 to 100.
    """

    warning: int = 70
    critical: int = 85
    emergency: int = 95
    hysteresis: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.warning <= self.critical <= self.emergency <= 1000:
            raise ValueError("thresholds must be positive and ascend")
        if not 0 <= self.hysteresis <= 100:
            raise ValueError("hysteresis must be 0 to 100")


class SpillAction(Enum):
    """What an engine should do next."""

    NONE = "none"
    BEGIN_SPILL = "begin_spill"
    CONTINUE_SPILL = "continue_spill"
    BEGIN_RESTORE = "begin_restore"


class SpillController:
    """Decides when an engine spills: from the spill threshold all the way down to the restore threshold.

    Between the thresholds the answer depends on the way there. Coming from above, spilling goes on. Coming from below,
    nothing is done. Otherwise an engine at the threshold would spill one entry and restore it, again and again.

    Parameters
    ----------
    spill_threshold, restore_threshold
        In per cent of the budget. Spilling begins at the first, and ends at the second.

    Raises
    ------
    ValueError
        `restore_threshold` is negative, or not below `spill_threshold`.
    """

    def __init__(self, spill_threshold: float = 90, restore_threshold: float = 75) -> None:
        if not 0 <= restore_threshold < spill_threshold:
            raise ValueError("restore_threshold must be below spill_threshold, and not negative")
        self._spill, self._restore = spill_threshold, restore_threshold
        self._is_spilling = False
        self._spill_count = 0
        self._entries_spilled = 0

    def check(self, utilization_percent: float) -> SpillAction:
        """Say what to do at this use of the budget.

        `BEGIN_SPILL` comes once when the spill threshold is reached, `CONTINUE_SPILL` until use is at the restore
        threshold or below, then once `BEGIN_RESTORE`. Otherwise it is `NONE`.
        """
        if not utilization_percent >= 0:  # nor NaN
            raise ValueError("utilization must not be negative")
        if self._is_spilling:
            if utilization_percent > self._restore:
                return SpillAction.CONTINUE_SPILL
            self._is_spilling = False
            return SpillAction.BEGIN_RESTORE
        if utilization_percent < self._spill:
            return SpillAction.NONE
        self._is_spilling = True
        self._spill_count += 1
        return SpillAction.BEGIN_SPILL

    @property
    def is_spilling(self) -> bool:
        """Whether spilling has begun and not ended."""
        return self._is_spilling

    @property
    def spill_count(self) -> int:
        """How often spilling has begun."""
        return self._spill_count

    @property
    def entries_spilled(self) -> int:
        """Entries that were spilled in this cycle."""
        return self._entries_spilled

    def record_spill(self, entries: int = 1) -> None:
        """Count entries that were spilled."""
        if entries < 0:
            raise ValueError("entries must not be negative")
        self._entries_spilled += entries

    def reset_cycle(self) -> None:
        """Begin a cycle anew: nothing is spilling, no entries are counted. `spill_count` stays."""
        self._is_spilling = False
        self._entries_spilled = 0

    def __repr__(self) -> str:
        state = "spilling" if self._is_spilling else "idle"
        return f"<SpillController {self._spill:g}/{self._restore:g} %: {state}, {self._entries_spilled} entries>"
