"""The page that a benchmark writes: its options, the facts that its figures depend on, Markdown, and saving."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


# ---- options -----------------------------------------------------------------------------------------------------


def parse(parser: argparse.ArgumentParser, name: str, rounds: int, quick: int) -> argparse.Namespace:
    """Add the options that the timed benchmarks share, and parse; `stem` is where the page goes, without suffix."""
    parser.add_argument("--quick", action="store_true", help=f"the short form; rounds: {quick} instead of {rounds}")
    parser.add_argument("--rounds", type=int, help="rounds to take the medians of")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(),
        help="where the files are made: its file system is what is measured (default: the current directory)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the page, the figures and the plots")
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = quick if options.quick else rounds
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    if not options.directory.is_dir():
        parser.error(f"--directory: {options.directory} is not a directory")
    options.stem = options.output / (f"{name}-quick" if options.quick else name)
    return options


@contextmanager
def empty_directory(parent: Path) -> Iterator[Path]:
    """Make a directory on the file system to measure; it goes in the end."""
    with tempfile.TemporaryDirectory(dir=parent.resolve(), prefix=".bench-") as path:
        yield Path(path)


# ---- what the figures depend on ----------------------------------------------------------------------------------


def kernel() -> str:
    return f"{platform.system()} {platform.release()}"


def environment(directory: Path) -> dict[str, str]:
    return {
        "kernel": kernel(),
        "file system": _file_system(directory),
        "CPU": f"{_processor()}, {len(os.sched_getaffinity(0))} usable",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": versions("nodedb-mem", "cffi"),
    }


def versions(*packages: str) -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in packages)


def _file_system(directory: Path) -> str:
    """Type of the file system that holds a directory."""
    best = ("", "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        where, _, what = line.partition(" - ")
        point = where.split()[4]
        if directory.resolve().is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, what.split()[0])
    return best[1]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


# ---- figures -----------------------------------------------------------------------------------------------------


def median_ratio(above: Iterable[float], below: Iterable[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def digits(figure: float) -> str:
    """Three digits, or all before the point."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"


def hundredths(ratio: float) -> str:
    """Two digits after the point, or none from 10 on."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def verdict(text: str, goal: object, met: bool) -> str:
    """A figure, its goal, and whether it was missed."""
    return f"{text} (goal {goal}{'' if met else ', MISSED'})"


# ---- Markdown ----------------------------------------------------------------------------------------------------


def bullets(facts: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def table(rows: Sequence[Sequence[str]], left: tuple[int, ...] = (0,)) -> str:
    """Lay rows out, the first one as header; figures to the right, the columns `left` to the left."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def save(stem: Path, parts: Iterable[str], figures: dict[str, Any]) -> str:
    """Write the parts, a blank line between them, and the figures as JSON; returns the page."""
    text = "\n\n".join(parts) + "\n"
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    return text
