"""Collectors for Prometheus: the figures of governors and of regions. Needs the extra ``metrics``.

::

    from prometheus_client import REGISTRY
    from nodedb_mem.metrics import GovernorCollector

    REGISTRY.register(GovernorCollector(governor))
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nodedb_mem.stats import RegionStats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nodedb_mem.governor import MemoryGovernor
    from nodedb_mem.region import OverflowRegion

__all__ = ["GovernorCollector", "RegionCollector"]

_COUNTED = {"growths", "moved_bytes", "written_back_bytes"}  # figures of a region that only grow


class GovernorCollector(Collector):
    """The figures of one governor, by engine and by process; sizes in bytes.

    Parameters
    ----------
    governor
        Any thread may collect it.
    name
        The label ``governor`` of every figure.
    """

    def __init__(self, governor: MemoryGovernor, name: str = "default") -> None:
        self._governor, self._name = governor, name

    def describe(self) -> list[Metric]:
        """Say nothing of what is to come: the registry does not collect in advance."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Take a snapshot."""
        shot = self._governor.snapshot()
        for figure, help_text in (
            ("ceiling", "Bytes that all engines may reserve"),
            ("headroom", "Bytes that spillable engines leave to the others"),
            ("allocated", "Bytes that are reserved"),
            ("peak", "Most bytes that were reserved"),
            ("overcommitted", "Bytes above the ceiling"),
            ("unmanaged", "Bytes of RAM that nobody reserved"),
        ):
            metric = GaugeMetricFamily(f"nodedb_mem_governor_{figure}_bytes", help_text, labels=["governor"])
            metric.add_metric([self._name], getattr(shot, figure))
            yield metric
        for figure, help_text, value in (
            ("waiting", "Reservations that stand in line", shot.waiting),
            ("pressure", "0 normal, 1 warning, 2 critical, 3 emergency", int(shot.pressure)),
        ):
            metric = GaugeMetricFamily(f"nodedb_mem_governor_{figure}", help_text, labels=["governor"])
            metric.add_metric([self._name], value)
            yield metric
        labels = ["governor", "engine"]
        for figure, help_text in (
            ("limit", "May be reserved"),
            ("allocated", "Are reserved"),
            ("peak", "Were at most"),
        ):
            metric = GaugeMetricFamily(f"nodedb_mem_engine_{figure}_bytes", f"Bytes: {help_text}", labels=labels)
            for engine, budget in shot.engines.items():
                metric.add_metric([self._name, str(engine)], getattr(budget, figure))
            yield metric
        for figure, of_what in (("rejections", ""), ("waits", ""), ("reclaimed", "_bytes")):
            counter = CounterMetricFamily(f"nodedb_mem_engine_{figure}{of_what}", f"{figure} so far", labels=labels)
            for engine, budget in shot.engines.items():
                counter.add_metric([self._name, str(engine)], getattr(budget, figure))
            yield counter
        metric = GaugeMetricFamily(
            "nodedb_mem_process_allocated_bytes", "Bytes that a process has reserved", labels=["governor", "pid"]
        )
        for process in shot.processes:
            metric.add_metric([self._name, str(process.pid)], process.allocated)
        yield metric


class RegionCollector(Collector):
    """The figures of one region. They are its owner's to ask for: call `update` on the owner's thread.

    Parameters
    ----------
    region
        Looked at once, by the constructor, and with each `update`.
    name
        The label ``region`` of every figure; by default the file's path.
    """

    def __init__(self, region: OverflowRegion, name: str | None = None) -> None:
        self._region = region
        self._name = name if name is not None else region.path or "temporary"
        self.update()

    def update(self) -> None:
        """Have the figures of this moment collected from now on. On the thread that owns the region."""
        self._stats = self._region.stats()

    def describe(self) -> list[Metric]:
        """Say nothing of what is to come: the registry does not collect in advance."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Give the figures of the last `update`."""
        stats = self._stats
        for field in fields(RegionStats):
            value = getattr(stats, field.name)
            if field.name == "engines":
                continue
            kind = CounterMetricFamily if field.name in _COUNTED else GaugeMetricFamily
            metric = kind(f"nodedb_mem_region_{field.name}", f"`{field.name}` of RegionStats", labels=["region"])
            metric.add_metric([self._name], value)
            yield metric
        metric = GaugeMetricFamily(
            "nodedb_mem_region_engine_live_bytes", "Bytes of live values", labels=["region", "engine"]
        )
        for engine, usage in stats.engines.items():
            metric.add_metric([self._name, str(engine)], usage.live_bytes)
        yield metric
