"""Whether a private mapping was stored to, as the kernel tells it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nodedb_mem import _memory

if TYPE_CHECKING:
    from typing_extensions import Buffer


class PageMap:
    """Tells whether private mappings of a file were stored to: the kernel has given such pages a copy.

    It looks into the process that made it. `close` it in the end.
    """

    def __init__(self) -> None:
        self.by_page = False
        try:
            self._file = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def has_changed(self, private: Buffer) -> bool:
        """Tell whether a page of a mapping was stored to. True where the kernel does not say."""
        changed = _memory.has_changed(self._file, private, self.by_page)
        if changed is None and not self.by_page:
            changed = _memory.has_changed(self._file, private, True)
            self.by_page = changed is not None  # before Linux 6.7
        return changed is not False
