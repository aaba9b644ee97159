"""The ways to open a region. What the options mean stands at `OverflowRegion`."""

from __future__ import annotations

import os
from operator import index
from typing import ClassVar, Literal, Self

from nodedb_mem._control import RegionControl
from nodedb_mem._opening import absolute, region_options, temporary_folder
from nodedb_mem.tuning import (
    DEFAULT_ALIGNMENT,
    DEFAULT_CACHE_LIMIT,
    DEFAULT_INITIAL_CAPACITY,
    DEFAULT_MAX_CAPACITY,
    MemoryTuning,
)


class RegionConstructors(RegionControl):
    """Opening by path, by sizes, or on an unnamed file. Each runs the `__init__` of the class that it is called on."""

    DEFAULT_INITIAL_CAPACITY: ClassVar[int] = DEFAULT_INITIAL_CAPACITY
    DEFAULT_MAX_CAPACITY: ClassVar[int] = DEFAULT_MAX_CAPACITY

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None,
        *,
        directory: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None = None,
        initial_capacity: int = DEFAULT_INITIAL_CAPACITY,
        max_capacity: int = DEFAULT_MAX_CAPACITY,
        alignment: int = DEFAULT_ALIGNMENT,
        cache_limit: int | None = DEFAULT_CACHE_LIMIT,
        keep_mapped: bool = False,
        ownership: Literal["thread", "process"] = "thread",
        recover: bool = False,
    ) -> None:
        options = region_options(
            initial_capacity,
            max_capacity,
            alignment,
            cache_limit,
            recover=recover,
            keep_mapped=keep_mapped,
            ownership=ownership,
        )
        if path is None:
            if directory is None:
                raise TypeError("a path is needed; or a directory, for an unnamed file")
            if recover:
                raise ValueError("an unnamed file has nothing to recover")
            self._open(None, os.fsdecode(directory), options)
            return
        if directory is not None:
            raise ValueError("directory is for an unnamed file: path must be None")
        name = os.fsdecode(path)
        self._open(name, absolute(name), options)  # a later chdir() must not lead share() elsewhere

    @classmethod
    def open(
        cls,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        *,
        initial_capacity: int = DEFAULT_INITIAL_CAPACITY,
        max_capacity: int = DEFAULT_MAX_CAPACITY,
        alignment: int = DEFAULT_ALIGNMENT,
        cache_limit: int | None = DEFAULT_CACHE_LIMIT,
        keep_mapped: bool = False,
        ownership: Literal["thread", "process"] = "thread",
        recover: bool = False,
    ) -> Self:
        """Create or open the region at `path`; the same as calling the class."""
        return cls(
            os.fspath(path),  # None is no path here
            initial_capacity=initial_capacity,
            max_capacity=max_capacity,
            alignment=alignment,
            cache_limit=cache_limit,
            keep_mapped=keep_mapped,
            ownership=ownership,
            recover=recover,
        )

    @classmethod
    def open_with_capacity(
        cls,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        initial: int,
        *,
        alignment: int = DEFAULT_ALIGNMENT,
        cache_limit: int | None = DEFAULT_CACHE_LIMIT,
        keep_mapped: bool = False,
        ownership: Literal["thread", "process"] = "thread",
        recover: bool = False,
    ) -> Self:
        """Open with an initial capacity in bytes. The ceiling is the default, or `initial` where that is more."""
        return cls(
            os.fspath(path),
            initial_capacity=initial,
            max_capacity=max(index(initial), DEFAULT_MAX_CAPACITY),
            alignment=alignment,
            cache_limit=cache_limit,
            keep_mapped=keep_mapped,
            ownership=ownership,
            recover=recover,
        )

    @classmethod
    def open_with_config(
        cls,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        initial: int,
        maximum: int,
        *,
        alignment: int = DEFAULT_ALIGNMENT,
        cache_limit: int | None = DEFAULT_CACHE_LIMIT,
        keep_mapped: bool = False,
        ownership: Literal["thread", "process"] = "thread",
        recover: bool = False,
    ) -> Self:
        """Open with an initial capacity and a ceiling, both in bytes."""
        return cls(
            os.fspath(path),
            initial_capacity=initial,
            max_capacity=maximum,
            alignment=alignment,
            cache_limit=cache_limit,
            keep_mapped=keep_mapped,
            ownership=ownership,
            recover=recover,
        )

    @classmethod
    def open_with_tuning(
        cls,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        tuning: MemoryTuning,
        *,
        alignment: int = DEFAULT_ALIGNMENT,
        cache_limit: int | None = DEFAULT_CACHE_LIMIT,
        keep_mapped: bool = False,
        ownership: Literal["thread", "process"] = "thread",
        recover: bool = False,
    ) -> Self:
        """Open with the sizes of a `MemoryTuning`."""
        if not isinstance(tuning, MemoryTuning):
            raise TypeError(f"a MemoryTuning is needed, not {type(tuning).__name__!r}")
        return cls(
            os.fspath(path),
            initial_capacity=tuning.overflow_initial_bytes,
            max_capacity=tuning.overflow_max_bytes,
            alignment=alignment,
            cache_limit=cache_limit,
            keep_mapped=keep_mapped,
            ownership=ownership,
            recover=recover,
        )

    @classmethod
    def temporary(
        cls,
        directory: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None = None,
        *,
        initial_capacity: int = DEFAULT_INITIAL_CAPACITY,
        max_capacity: int = DEFAULT_MAX_CAPACITY,
        alignment: int = DEFAULT_ALIGNMENT,
        cache_limit: int | None = DEFAULT_CACHE_LIMIT,
        keep_mapped: bool = False,
        ownership: Literal["thread", "process"] = "thread",
    ) -> Self:
        """Open a region on an unnamed file, which leaves nothing behind however the process ends.

        The same as calling the class with None as its path, and `directory`: a subclass whose ``__init__`` hands both
        on may be temporary.

        Parameters
        ----------
        directory
            Where its blocks are taken from; by default the directory for temporary files. On many systems that is
            a tmpfs, which keeps them in RAM.
        initial_capacity, max_capacity, alignment, cache_limit, keep_mapped, ownership
            As for the class.

        Raises
        ------
        RegionIOError
            The folder, or any folder for temporary files, cannot be written to.
        """
        return cls(
            None,
            directory=temporary_folder() if directory is None else directory,
            initial_capacity=initial_capacity,
            max_capacity=max_capacity,
            alignment=alignment,
            cache_limit=cache_limit,
            keep_mapped=keep_mapped,
            ownership=ownership,
        )
