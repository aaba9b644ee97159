"""Dask workers that spill into an overflow region: one a worker, temporary, in the worker's local directory.

Switch it on with ``dask worker --preload nodedb_mem.dask``, or with the configuration
``distributed.worker.preload: [nodedb_mem.dask]``, or with `install` for a cluster that runs. The section ``nodedb-mem``
of Dask's configuration has the settings, each of them optional:

| setting | meaning |
|---|---|
| directory | where the region's file takes its blocks; by default the worker's local directory |
| max-capacity | the most the file may grow to; by default 95 % of what the disk has free |
| cache-limit | the most bytes of the file that stay in RAM; by default the kernel decides |
| alignment | what every buffer is aligned to, in bytes |

Everything else of Dask's memory management stays as it is. Where a worker is not as this code knows it, there is a
warning in its log, and it spills as before.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import dask.config
from dask.utils import parse_bytes
from distributed import Worker, WorkerPlugin
from tornado.ioloop import PeriodicCallback

from nodedb_mem.region import OverflowRegion

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distributed import Client

    from nodedb_mem._dask_buffer import RegionBuffer

__all__ = ["SpillPlugin", "dask_setup", "install"]

_log = logging.getLogger("distributed.nodedb_mem")  # below Dask's own, so that its configuration applies

_NAME = "nodedb-mem"
_DEFAULTS: dict[str, Any] = {"directory": None, "max-capacity": None, "cache-limit": None, "alignment": 64}
_SMALLEST = 1 << 20  # bytes that a region has from the start
_TIDY = 100  # milliseconds between two pieces of housekeeping


def dask_setup(worker: Worker) -> None:
    """Make a worker spill into a region. Dask calls this for modules that it preloads."""
    _switch(worker, {})


def install(client: Client, **settings: Any) -> Any:
    """Make all workers of a running cluster spill into regions, and those that join later.

    What has been spilled already stays in its file until it is read.

    Parameters
    ----------
    client
        Of the cluster. For an asynchronous one, the result is to be awaited.
    **settings
        In the place of the workers' configuration: `directory`, `max_capacity`, `cache_limit`, `alignment`.

    Returns
    -------
    dict
        What ``Client.register_plugin`` returns.
    """
    return client.register_plugin(SpillPlugin(**settings))


class SpillPlugin(WorkerPlugin):
    """What `install` registers. The settings are those of `install`."""

    name = _NAME

    def __init__(self, **settings: Any) -> None:
        self.settings, unknown = _known(settings)
        if unknown:
            raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}")
        _check(self.settings)

    def setup(self, worker: Worker) -> None:
        """Make a worker spill into a region."""
        _switch(worker, self.settings)


def _switch(worker: Worker, settings: Mapping[str, Any]) -> None:
    """Replace the slow half of a worker's storage. Where that does not work, say so, and leave it as it was."""
    try:
        manager = worker.memory_manager
        if not (manager.memory_limit and (manager.memory_target_fraction or manager.memory_spill_fraction)):
            _log.info("The worker spills nothing, so that there is nothing to do")
            return
        from nodedb_mem import _dask_buffer

        if type(worker.data) is _dask_buffer.RegionBuffer:
            if settings:
                _log.warning("The worker spills to a region already; new settings hold once it has been restarted")
            return
        _probe(worker.local_directory)
        with warnings.catch_warnings(record=True) as caught:  # Python shows no ResourceWarning by itself
            warnings.simplefilter("always", ResourceWarning)
            region = _open(worker, settings)
        for each in caught:
            _log.warning("%s", each.message)
        most = region.max_capacity
        _dask_buffer.take_over(worker.data, region)
        _log.info("Spilling to a region in %s of at most %d bytes", region._place, most)
    except Exception:
        _log.warning("Cannot spill to a region; spilling stays as it is", exc_info=True)
        return
    try:
        from nodedb_mem._dask_peers import Sender

        Sender(worker)
        worker.periodic_callbacks[_NAME] = _Housekeeping(worker.data)
        worker.periodic_callbacks[_NAME].start()
    except Exception:
        _log.warning("Cannot keep the region tidy, or send from it", exc_info=True)


@cache
def _probe(directory: str) -> None:
    """Spill a value and bring it back, with a buffer that nobody else uses. Raises if anything is not as expected."""
    from distributed.spill import SpillBuffer

    from nodedb_mem import _dask_buffer

    value = bytes(100_000)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        buffer = SpillBuffer(os.path.join(folder, "storage"), target=1 << 20)
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            region = OverflowRegion.temporary(
                folder, initial_capacity=_SMALLEST, max_capacity=_SMALLEST, ownership="process"
            )
        _dask_buffer.take_over(buffer, region)
        try:
            buffer["key"] = value
            for _ in range(2):
                size = buffer.evict()
                out = "key" in buffer.slow and "key" not in buffer.fast and buffer.spilled_total.memory == size > 0
                if not out or buffer["key"] != value or "key" not in buffer.fast or any(buffer.spilled_total):
                    raise RuntimeError("a value that was spilled on trial did not come back")
            del buffer["key"]
            if len(buffer) or buffer.store.stats().live_slots:
                raise RuntimeError("a value that was spilled on trial did not go")
        finally:
            buffer.close()


def _known(settings: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Take settings by their names, in either spelling; the second are names that there are not."""
    named = {key.replace("_", "-"): value for key, value in settings.items()}
    return {key: value for key, value in named.items() if key in _DEFAULTS}, named.keys() - _DEFAULTS.keys()


def _check(settings: Mapping[str, Any]) -> None:
    """Refuse settings that no worker can use."""
    for name, least in (("max-capacity", _SMALLEST), ("cache-limit", 0)):
        if settings.get(name) is not None:
            try:
                size = parse_bytes(settings[name])
            except (TypeError, ValueError, AttributeError):
                size = -1
            if isinstance(settings[name], bool) or size < least:
                raise ValueError(f"{name}: {least} bytes or more are needed, not {settings[name]!r}")
    alignment = int(settings.get("alignment", _DEFAULTS["alignment"]))
    if alignment not in [1 << power for power in range(6, 13)]:
        raise ValueError(f"alignment: a power of two from 64 to 4096 is needed, not {settings['alignment']!r}")


def _open(worker: Worker, settings: Mapping[str, Any]) -> OverflowRegion:
    """Open a worker's region."""
    configured, unknown = _known(dask.config.get(_NAME, None) or {})
    if unknown:
        _log.warning("Unknown settings in the section %s: %s", _NAME, ", ".join(sorted(unknown)))
    wanted = {**_DEFAULTS, **configured, **settings}
    _check(wanted)
    directory = wanted["directory"] or worker.local_directory
    ceiling = shutil.disk_usage(directory).free * 95 // 100
    if wanted["max-capacity"] is not None:
        ceiling = min(ceiling, parse_bytes(wanted["max-capacity"]))
    if worker.memory_manager.max_spill is not False:
        # Dask counts the values; in the file each of them may be a page longer.
        ceiling = min(ceiling, worker.memory_manager.max_spill * 9 // 8 + _SMALLEST)
    limit = wanted["cache-limit"]
    return OverflowRegion.temporary(
        directory,
        initial_capacity=min(_SMALLEST, ceiling),
        max_capacity=ceiling,
        alignment=int(wanted["alignment"]),
        ownership="process",
        cache_limit=None if limit is None else parse_bytes(limit),
    )


class _Housekeeping(PeriodicCallback):
    """Tidies a region between tasks. A worker stops it when it closes, and with it goes what is out."""

    def __init__(self, buffer: RegionBuffer) -> None:
        super().__init__(buffer.store.tidy, _TIDY)
        self._buffer = buffer

    def stop(self) -> None:
        """End."""
        super().stop()
        self._buffer.close()
