"""The page and the picture that a benchmark makes: options, the facts that figures depend on, Markdown, saving."""

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
BUILD = Path(__file__).parent.parent / "build" / "results"  # the short forms, and all raw figures


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
    add_output(parser)
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = quick if options.quick else rounds
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    if not options.directory.is_dir():
        parser.error(f"--directory: {options.directory} is not a directory")
    options.stem = stem_of(options, name)
    return options


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where the page goes."""
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the page and the picture (default: benchmarks/results, of the short form build/results)",
    )


def stem_of(options: argparse.Namespace, name: str) -> Path:
    """Path of the page without its suffix."""
    folder = options.output or (BUILD if options.quick else RESULTS)
    return Path(folder) / (f"{name}-quick" if options.quick else name)


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
    """Write the parts and a link to the picture, and the raw figures as JSON below build; returns the page."""
    text = "\n\n".join([*parts, f"![the figures as a picture]({stem.name}.png)"]) + "\n"
    for folder in (stem.parent, BUILD):
        folder.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(text)
    (BUILD / f"{stem.name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    return text


@contextmanager
def picture(stem: Path, rows: int, columns: int, inches: tuple[float, float]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield a figure and its panels to draw on, then save it as a PNG with a palette, which is small."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    figure, panels = pyplot.subplots(rows, columns, figsize=inches, dpi=90, layout="constrained", squeeze=False)
    yield figure, list(panels.flat)
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.canvas.draw()
    canvas = figure.canvas
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
    image.convert("RGB").quantize(256).save(stem.with_suffix(".png"), optimize=True)
    pyplot.close(figure)


def grouped_bars(panel: Any, places: Sequence[str], heights: dict[str, Sequence[float]]) -> None:
    """Draw a group of bars at each place, a bar for each name."""
    width = 0.8 / len(heights)
    for i, (name, row) in enumerate(heights.items()):
        shift = (i - (len(heights) - 1) / 2) * width
        panel.bar([x + shift for x in range(len(places))], row, width=width, label=name)
    panel.set_xticks(range(len(places)), places)
    panel.grid(axis="y", alpha=0.3)
