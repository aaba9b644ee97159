"""The command ``nodedb-mem``: arguments, progress bar, table, exit status.

Status 0: everything came back equal, or was shown. 1: something did not come back equal. 2: a bad argument or path,
or no room; one line on standard error says which. 130: interrupted. 141: whoever read standard output has gone. What
cannot be read inside a folder is named on standard error, counted there, and left out; it does not change the status.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from nodedb_mem.errors import MemError
from nodedb_mem.tools.shown import shown

if TYPE_CHECKING:  # rich is an extra: --help works without them
    from rich.console import Console, RenderableType

    from nodedb_mem.tools.inspect import Snapshot
    from nodedb_mem.tools.spill import Piece, Report


class _Seen(Protocol):
    def as_json(self) -> dict[str, Any]: ...


_Shot = TypeVar("_Shot", bound=_Seen)
_UNITS: dict[str, int] = {"": 1} | {
    letter + ending: base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
_FOLDERS = {
    "includedir": "nodedb_mem.h, nodedb_mem_governor.h",
    "libdir": "the libraries",
    "cmakedir": "nodedb_mem-config.cmake (cmake -Dnodedb_mem_DIR=...)",
    "pkgconfigdir": "nodedb_mem.pc (PKG_CONFIG_PATH=...)",
}
_MAX_THREADS = 1024
_MAX_READERS = 64  # each is a process
_REFRESH = 1.0  # seconds
_EXTRAS = {"rich": "cli", "matplotlib": "plot"}


def parse_size(text: str) -> int:
    """Read a size in bytes: a whole number, perhaps with a unit, in any case.

    K, M, G, T and KiB, MiB, GiB, TiB are powers of 1024; KB, MB, GB, TB are powers of 1000.

    Raises
    ------
    argparse.ArgumentTypeError
        `text` is no size, or a negative one.
    """
    match = re.fullmatch(r"([0-9]{1,18})\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (like 4096, 64K, 256MiB, 1GB)")
    return int(match[1]) * _UNITS[match[2]]


def _chunk_size(text: str) -> int:
    if (size := parse_size(text)) == 0:
        raise argparse.ArgumentTypeError(f"must be more than 0: {text!r}")
    return size


def _count(text: str, most: int) -> int:
    if not (re.fullmatch("[0-9]{1,9}", text) and 1 <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"not a number from 1 to {most}: {text!r}")
    return int(text)


def _thread_count(text: str) -> int:
    return _count(text, _MAX_THREADS)


def _reader_count(text: str) -> int:
    return _count(text, _MAX_READERS)


def _picture_path(text: str) -> str:
    suffix = os.path.splitext(text)[1]
    if suffix.lower() not in ("", ".png"):
        raise argparse.ArgumentTypeError(f"the picture is a PNG: {text!r} must end in .png, not in {suffix}")
    return text


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {os.fsdecode(error.filename)!r}"
    return shown(" ".join(str(error).split())) or type(error).__name__


def _console(*, stderr: bool = False) -> Console:
    """Make the only kind of console that the command prints with: what it is given is text, not markup or emoji."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))  # for main(), not an exit of its own

    return Plain(stderr=stderr, markup=False, emoji=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"nodedb-mem: {shown(message)}\n")


def _parser() -> _Parser:
    parser = _Parser(prog="nodedb-mem", description="Overflow regions and a memory governor for data engines.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    spill = commands.add_parser(
        "spill",
        help="spill real files and check that they come back equal",
        description="Cut files into buffers, hold a budget of them in RAM, spill the least recently used "
        "rest into an overflow region, then read all of them back in random order and compare digests.",
        epilog="SIZE is in bytes; K, M, G, T (or KiB, ...) multiply by powers of 1024, KB, MB, ... of 1000.",
    )
    add = spill.add_argument
    add("paths", nargs="+", metavar="PATH", help="file, or folder to walk (links inside are not followed)")
    add("--budget", type=parse_size, default="256MiB", metavar="SIZE", help="bytes held in RAM (%(default)s)")
    add("--chunk", type=_chunk_size, default="1MiB", metavar="SIZE", help="bytes of a buffer (%(default)s)")
    add("--directory", metavar="DIR", help="where the region's file goes (default: where temporary files go)")
    add("--threads", type=_thread_count, default=1, metavar="N", help="threads that read and check (%(default)s)")
    add("--readers", type=_reader_count, metavar="N", help="processes that check each buffer, meanwhile (none)")
    add("--json", action="store_true", help="print the figures as one JSON object")
    spill.set_defaults(command=_spill)
    config = commands.add_parser(
        "config",
        help="print what compilers and linkers need",
        description="Print flags and folders for native code that links the C core, in the order below, one a line.",
    )
    add = config.add_argument
    add("--cflags", action="store_true", help="flags for the compiler")
    add("--libs", action="store_true", help="flags for the linker; the program will find the library by itself")
    add("--static", action="store_true", help="--libs of the static library: for programs without Python")
    for name, what in _FOLDERS.items():
        add(f"--{name}", action="store_true", help=f"folder of {what}")
    config.set_defaults(command=_config, usage=config)
    inspect = commands.add_parser(
        "inspect",
        help="show a region, with or without a living owner",
        description="Show what is in a region's file: figures, bytes of each engine, a map. Reads only; the owner is "
        "not disturbed. In the map, what the owner still holds back for its views looks free.",
    )
    add = inspect.add_argument
    add("path", metavar="PATH", help="the region's file")
    add("--json", action="store_true", help="print the figures as one JSON object (with --watch: one a line)")
    add("--watch", action="store_true", help="refresh every second until Ctrl-C")
    add("--plot", type=_picture_path, metavar="OUT.png", help="draw it into a PNG file, too")
    inspect.set_defaults(command=_inspect)
    governor = commands.add_parser(
        "governor",
        help="show a shared memory governor",
        description="Show what engines and processes have reserved under a shared governor, from its file. Nothing is "
        "claimed there.",
    )
    add = governor.add_argument
    add("path", metavar="PATH", help="the governor's file")
    add("--json", action="store_true", help="print the figures as one JSON object (with --watch: one a line)")
    add("--watch", action="store_true", help="refresh every second until Ctrl-C")
    governor.set_defaults(command=_governor)
    return parser


def _config(arguments: argparse.Namespace) -> int:
    from nodedb_mem import native

    (libdir,) = native.get_library_dirs()
    if arguments.static:
        libs = [os.path.join(libdir, "libnodedb_mem.a"), "-pthread"]
    else:
        libs = [f"-L{libdir}", f"-Wl,-rpath,{libdir}", *(f"-l{name}" for name in native.get_libraries())]
    answers = {
        "cflags": [f"-I{native.get_include()}"],
        "libs": libs,
        "includedir": [native.get_include()],
        "libdir": [libdir],
        "cmakedir": [native.get_cmake_dir()],
        "pkgconfigdir": [native.get_pkgconfig_dir()],
    }
    asked = [name for name in answers if getattr(arguments, name)]
    if not asked:
        arguments.usage.error("config: say what to print (see nodedb-mem config --help)")
    for name in asked:  # flags are for a shell; a folder alone is printed as it is
        line = shlex.join(answers[name]) if name in ("cflags", "libs") else answers[name][0]
        if sys.stdout is not None:
            sys.stdout.buffer.write(os.fsencode(line) + b"\n")  # a path is bytes, whatever the encoding of the output
    return 0


def _spill(arguments: argparse.Namespace) -> int:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from nodedb_mem.tools import spill

    console = _console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn()
    bar = Progress(*columns, console=console, disable=not sys.stderr.isatty())
    tasks = {phase: bar.add_task(phase, total=None) for phase in ("spill", "verify")}
    left_out: list[OSError] = []

    class Display:
        def advance(self, phase: str, size: int) -> None:
            bar.advance(tasks[phase], size)

        def skipped(self, error: OSError) -> None:
            left_out.append(error)
            self.say(f"skipped: {_describe(error)}")

        def mismatched(self, piece: Piece) -> None:
            self.say(f"mismatch: {piece.path!r}, {piece.size} bytes at {piece.offset}")

        def say(self, line: str) -> None:
            console.print(f"nodedb-mem: {shown(line)}", highlight=False, soft_wrap=True)

    display = Display()
    options = spill.Options(
        arguments.budget, arguments.chunk, arguments.directory, arguments.threads, arguments.readers or 0
    )
    with bar:
        files = spill.find_files(arguments.paths, display)
        for task in tasks.values():
            bar.update(task, total=sum(file.size for file in files))
        report = spill.run(files, options, display)
    if left_out:
        display.say(f"files and folders skipped: {len(left_out)}")
    if arguments.json:
        print(json.dumps({key: value for key, value in asdict(report).items() if value is not None}))
    else:
        _print_table(report)
    return 1 if report.mismatched_chunks else 0


def _print_table(report: Report) -> None:
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("figure", "value", show_header=False)
    table.columns[1].justify = "right"
    for label, value in (
        ("bytes in", decimal(report.bytes_in)),
        ("spilled", decimal(report.bytes_spilled)),
        ("chunks", str(report.chunks)),
        ("went out", str(report.evictions)),
        ("writes saved", str(report.writes_saved)),
        ("pressure reached", report.pressure),
        ("write throughput", f"{decimal(int(report.write_bytes_per_s))}/s"),
        ("read throughput", f"{decimal(int(report.read_bytes_per_s))}/s"),
        ("peak RSS", decimal(report.peak_rss_bytes)),
        ("verified", str(report.verified_chunks)),
        ("mismatched", str(report.mismatched_chunks)),
        ("verified by readers", None if report.verified_by_readers is None else str(report.verified_by_readers)),
        ("seconds", f"{report.seconds:.2f}"),
    ):
        if value is not None:
            table.add_row(label, value)
    _console().print(table)


def _inspect(arguments: argparse.Namespace) -> int:
    from nodedb_mem.tools import inspect

    told = False

    def look() -> Snapshot:
        nonlocal told
        shot = inspect.look(arguments.path)
        if arguments.plot is not None:
            inspect.plot(shot, arguments.plot)
            if not told:
                print(f"nodedb-mem: the picture is in {arguments.plot!r}", file=sys.stderr)
            told = True
        return shot

    def draw(shot: Snapshot, console: Console) -> RenderableType:
        height = max(4, min(16, console.height - 24)) if arguments.watch else 16
        return inspect.picture(shot, console.width, height)

    return _show(arguments, look, draw)


def _governor(arguments: argparse.Namespace) -> int:
    from nodedb_mem.governor import MemoryGovernor
    from nodedb_mem.tools import govern

    governor = MemoryGovernor.look(arguments.path)
    return _show(arguments, governor.snapshot, lambda shot, console: govern.picture(shot, console.width))


def _show(
    arguments: argparse.Namespace, look: Callable[[], _Shot], draw: Callable[[_Shot, Console], RenderableType]
) -> int:
    """Print what is seen: as JSON, once, or again and again."""
    if arguments.json:
        print(json.dumps(look().as_json()), flush=True)
        with suppress(KeyboardInterrupt):
            while arguments.watch:
                time.sleep(_REFRESH)
                print(json.dumps(look().as_json()), flush=True)
        return 0

    from rich.live import Live

    console = _console()

    def show() -> RenderableType:
        return draw(look(), console)

    if not arguments.watch:
        console.print(show())
        return 0
    if not console.is_terminal:  # nothing is drawn over there: a frame follows the other
        with suppress(KeyboardInterrupt):
            while True:
                console.print(show())
                time.sleep(_REFRESH)
        return 0
    with Live(show(), console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            time.sleep(_REFRESH)
            live.update(show(), refresh=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default ``sys.argv[1:]``) and return the exit status.

    Raises
    ------
    SystemExit
        Help was asked for (status 0), or the arguments are wrong (status 2).
    """
    try:
        try:
            arguments = _parser().parse_args(argv)
            status: int = arguments.command(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here an error is one of the command's, at exit it would be a traceback
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        line, status = f"this command needs {missing}: pip install nodedb_mem[{_EXTRAS[missing]}]", 2
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except (MemError, OSError) as error:
        line, status = _describe(error), 2
        _drop_output()
    except MemoryError:
        line, status = "out of memory", 2
    except KeyboardInterrupt:
        line, status = "interrupted", 130
    else:
        return status
    print(f"nodedb-mem: {line}", file=sys.stderr)
    return status


def _drop_output() -> None:
    """Send what is still in the buffer of standard output nowhere, if it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
