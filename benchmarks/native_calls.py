"""What one call costs from C, C++, numba and Python, beside the same call through cffi.

    python benchmarks/native_calls.py [--quick] [--directory DIR] [--output DIR]

All callers work on one region in one process and take turns, round by round. Needs gcc, g++ and numba.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from pages import bullets, empty_directory, environment, grouped_bars, parse, picture, save, table

import nodedb_mem
from nodedb_mem import OverflowRegion
from nodedb_mem import numba as spill
from nodedb_mem._core import ffi, lib

CALLS = 2000
SIZES = {64: "64 B", 4096: "4 KiB"}
VERBS = {
    "write": "write a value into a slot (warm space)",
    "copy": "read_into: copy a value out",
    "view": "read and release: see a value in place",
}

Loop = Callable[[OverflowRegion, "Data"], None]


class Data:
    """A value, room for one, and the slots."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.value = np.frombuffer(random.Random(size).randbytes(size), np.uint8)
        self.bytes = self.value.tobytes()
        self.room = np.zeros(size, np.uint8)
        self.slots = np.zeros(CALLS, np.int64)


def compiled(compiler: list[str], directory: Path) -> ctypes.CDLL:
    """Compile calls.c."""
    target = directory / f"{compiler[0]}.so"
    (libraries,) = nodedb_mem.get_library_dirs()
    flags = ["-O2", "-shared", "-fPIC", f"-I{nodedb_mem.get_include()}", f"-L{libraries}", "-o", str(target)]
    source = Path(__file__).parent / "native" / "calls.c"
    subprocess.run([*compiler, str(source), *flags, *(f"-l{name}" for name in nodedb_mem.get_libraries())], check=True)
    return ctypes.CDLL(str(target))


def native_loop(library: ctypes.CDLL, verb: str, how: str) -> Loop:
    function = library[f"{verb}_{how}"]
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p]

    def loop(region: OverflowRegion, data: Data) -> None:
        array = data.value if verb == "write" else data.room
        spill.check(function(region.handle, array.ctypes.data, data.size, CALLS, data.slots.ctypes.data))

    return loop


@numba.njit
def _numba_write(handle, value, slots):
    for i in range(len(slots)):
        slots[i] = spill.write(handle, value, 0)
        if slots[i] < 0:
            return slots[i]
    return 0


@numba.njit
def _numba_copy(handle, room, slots):
    for i in range(len(slots)):
        status = spill.read_into(handle, slots[i], room)
        if status < 0:
            return status
    return 0


@numba.njit
def _numba_view(handle, room, slots):
    for i in range(len(slots)):
        size, data = spill.pin(handle, slots[i])
        if size < 0:
            return size
        room[0] += data[0]
        spill.unpin(data)
    return 0


def numba_loop(verb: str) -> Loop:
    function = {"write": _numba_write, "copy": _numba_copy, "view": _numba_view}[verb]

    def loop(region: OverflowRegion, data: Data) -> None:
        array = data.value if verb == "write" else data.room
        spill.check(int(function(region.handle, array, data.slots)))

    return loop


def cffi_loop(verb: str) -> Loop:
    def write(region: OverflowRegion, data: Data) -> None:
        pointer, value, size, call = region._handle, data.bytes, data.size, lib.ndm_region_write
        data.slots[:] = [call(pointer, value, size, 0) for _ in range(CALLS)]

    def copy(region: OverflowRegion, data: Data) -> None:
        pointer, room, size, call = region._handle, ffi.from_buffer(data.room), data.size, lib.ndm_region_read_into
        for slot in data.slots.tolist():
            call(pointer, slot, room, size)

    def view(region: OverflowRegion, data: Data) -> None:
        pointer, size, read, release = region._handle, ffi.new("uint64_t *"), lib.ndm_region_read, lib.ndm_view_release
        for slot in data.slots.tolist():
            release(read(pointer, slot, size))

    return {"write": write, "copy": copy, "view": view}[verb]


def python_loop(verb: str) -> Loop:
    def write(region: OverflowRegion, data: Data) -> None:
        value, call = data.bytes, region.write
        data.slots[:] = [call(value, 0) for _ in range(CALLS)]

    def copy(region: OverflowRegion, data: Data) -> None:
        room, call = data.room, region.read_into
        for slot in data.slots.tolist():
            call(slot, room)

    def view(region: OverflowRegion, data: Data) -> None:
        call = region.read
        for slot in data.slots.tolist():
            call(slot)

    return {"write": write, "copy": copy, "view": view}[verb]


def callers(directory: Path) -> dict[str, Callable[[str], Loop]]:
    c, cpp = compiled(["gcc", "-std=c11"], directory), compiled(["g++", "-std=c++17", "-x", "c++"], directory)
    return {
        "C": lambda verb: native_loop(c, verb, "direct"),
        "C by handle": lambda verb: native_loop(c, verb, "by_handle"),
        "C++": lambda verb: native_loop(cpp, verb, "direct"),
        "C++ by handle": lambda verb: native_loop(cpp, verb, "by_handle"),
        "numba": numba_loop,
        "cffi": cffi_loop,
        "Python": python_loop,
    }


def measure(rounds: int, directory: Path) -> list[dict[str, Any]]:
    """Nanoseconds a call, for each verb, size and caller a figure a round."""
    makers = callers(directory)
    cells = []
    with OverflowRegion.open(directory / "region", initial_capacity=64 << 20) as region:
        for size in SIZES:
            data = Data(size)
            figures: dict[str, dict[str, list[float]]] = {verb: {name: [] for name in makers} for verb in VERBS}
            loops = {(verb, name): make(verb) for verb in VERBS for name, make in makers.items()}
            for number in range(-2, rounds):  # two to warm up
                names = list(makers)
                random.Random(number).shuffle(names)
                for name in names:
                    for verb in VERBS:  # write comes first: the others read what it wrote
                        start = time.perf_counter_ns()
                        loops[verb, name](region, data)
                        taken = time.perf_counter_ns() - start
                        if number >= 0:
                            figures[verb][name].append(taken / CALLS)
                    if region.read(int(data.slots[number])) != data.bytes:
                        raise RuntimeError(f"{name} wrote something else")
                    region.free_many(data.slots)
            for verb, by_name in figures.items():
                cells.append(
                    {
                        "verb": verb,
                        "bytes": size,
                        "ns_per_call": {name: round(statistics.median(taken), 1) for name, taken in by_name.items()},
                        "rounds_ns_per_call": {n: [round(ns, 1) for ns in taken] for n, taken in by_name.items()},
                    }
                )
    return cells


def page(cells: list[dict[str, Any]], facts: dict[str, str], rounds: int) -> list[str]:
    """Lay everything out in Markdown."""
    rows = [
        ["call", *cells[0]["ns_per_call"]],
        *(
            [f"{cell['verb']}, {SIZES[cell['bytes']]}", *(f"{figure:.0f}" for figure in cell["ns_per_call"].values())]
            for cell in cells
        ),
    ]
    notes = VERBS | {
        "by handle": "`ndm_h_*`, which check that the region still lives; numba always does; the others have a pointer",
        "cffi": "the same C functions from a Python loop; Python: the methods of `OverflowRegion`",
    }
    return [
        "# Calls from native code and from Python",
        f"Nanoseconds a call: medians of {rounds} interleaved rounds of {CALLS} calls each.",
        bullets(facts),
        table(rows),
        bullets(notes),
    ]


def plot(cells: list[dict[str, Any]], stem: Path) -> None:
    """Draw a bar for each caller, a panel for each size."""
    with picture(stem, 1, len(SIZES), (11, 4)) as (figure, panels):
        for panel, (size, label) in zip(panels, SIZES.items(), strict=True):
            mine = {cell["verb"]: cell["ns_per_call"] for cell in cells if cell["bytes"] == size}
            grouped_bars(panel, list(mine), {name: [mine[verb][name] for verb in mine] for name in mine["write"]})
            panel.set_title(f"values of {label}")
        panels[0].set_ylabel("ns a call")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
        figure.suptitle("What a call costs; lower is better")


def main() -> int:
    parser = argparse.ArgumentParser(description="What one call costs from C, C++, numba, cffi and Python.")
    options = parse(parser, "native-calls", rounds=31, quick=7)
    with empty_directory(options.directory) as directory:
        facts = environment(directory)
        cells = measure(options.rounds, directory)
    figures = {"environment": facts, "rounds": options.rounds, "calls_per_round": CALLS, "cells": cells}
    print(save(options.stem, page(cells, facts, options.rounds), figures))
    plot(cells, options.stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
