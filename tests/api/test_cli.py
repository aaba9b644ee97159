"""The command ``nodedb-mem spill``: figures, exit status, and what a person reads."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kit import Run, Terminal
from nodedb_mem import ObjectRef, RegionIOError, SpillMapping
from nodedb_mem.tools import cli, spill

CHUNK = 64 * 1024
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * 1024 * 1024, 5 * 1024 * 1024 + 13)
TOTAL = sum(SIZES)
CHUNKS = sum(-(-size // CHUNK) for size in SIZES)
KEYS = {
    "bytes_in",
    "bytes_spilled",
    "chunks",
    "evictions",
    "writes_saved",
    "pressure",
    "write_bytes_per_s",
    "read_bytes_per_s",
    "peak_rss_bytes",
    "verified_chunks",
    "mismatched_chunks",
    "seconds",
}

Figures = dict[str, Any]


class WatchedMapping(SpillMapping[int, bytes]):
    """Stands in for SpillMapping where a test needs a fault, or to see the calls."""

    opened: ClassVar[list[WatchedMapping]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.opened.append(self)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of files of SIZES, some of them in nested folders."""
    root = tmp_path / "tree"
    source = random.Random(2)
    for number, size in enumerate(SIZES):
        folder = root / ("deep/er" if number % 2 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.bin").write_bytes(source.randbytes(size))
    return root


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[WatchedMapping]], list[WatchedMapping]]:
    """Put a stand-in where the job takes its mapping from; gives the list of those it will open."""

    def put(kind: type[WatchedMapping]) -> list[WatchedMapping]:
        monkeypatch.setattr(kind, "opened", [])
        monkeypatch.setattr(spill, "SpillMapping", kind)
        return kind.opened

    return put


def start(*arguments: object, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run the command the way a person does."""
    command = [sys.executable, "-m", "nodedb_mem", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)


def figures(output: str, *more: str) -> Figures:
    values = json.loads(output)
    assert set(values) == KEYS | set(more)
    return dict(values)


def assert_one_line(stderr: str) -> None:
    assert stderr.startswith("nodedb-mem: ")
    assert stderr.count("\n") == 1


# What comes out when all is well.


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("budget", [0, 1, CHUNK, 1024 * 1024, 1 << 40])
def test_every_buffer_comes_back_equal(run: Run, tree: Path, tmp_path: Path, budget: int, threads: int) -> None:
    directory = tmp_path / "regions"
    directory.mkdir()
    status, out, err = run(
        *("spill", tree, "--json", "--budget", budget, "--chunk", CHUNK),
        *("--threads", threads, "--directory", directory),
    )
    got = figures(out)
    assert (status, err) == (0, "")
    assert (got["bytes_in"], got["chunks"]) == (TOTAL, CHUNKS)
    assert (got["verified_chunks"], got["mismatched_chunks"]) == (CHUNKS, 0)
    assert max(0, TOTAL - budget) <= got["bytes_spilled"] <= (0 if budget > TOTAL else TOTAL)
    assert (got["write_bytes_per_s"] > 0) == (got["evictions"] > 0) == (got["bytes_spilled"] > 0)
    assert got["pressure"] == ("normal" if budget > TOTAL else "emergency")
    assert min(got["read_bytes_per_s"], got["seconds"]) > 0
    assert got["peak_rss_bytes"] > TOTAL  # in bytes, not KiB: Python alone has that much
    assert list(directory.iterdir()) == []


def test_no_more_is_spilled_than_the_budget_demands(run: Run, tree: Path) -> None:
    budget = 3 * 1024 * 1024
    got = figures(run("spill", tree, "--json", "--budget", budget, "--chunk", CHUNK)[1])
    held = TOTAL - got["bytes_spilled"]
    assert budget - CHUNK < held <= budget


@pytest.mark.skipif("NODEDB_MEM_SANITIZE" in os.environ, reason="sanitizers keep freed memory for a while")
def test_spilled_bytes_leave_ram(tmp_path: Path) -> None:
    budget, total = 8 << 20, 80 << 20
    peaks = []
    for name, size in (("little", CHUNK), ("much", total)):
        (tmp_path / name).write_bytes(random.Random(3).randbytes(1 << 20) * (size >> 20) or b"little")
        command = ("spill", tmp_path / name, "--json", "--budget", budget, "--chunk", CHUNK, "--directory", tmp_path)
        peaks.append(figures(start(*command).stdout)["peak_rss_bytes"])
    assert peaks[1] - peaks[0] < 2 * budget + (24 << 20)  # the budget in buffers, as much of the file, bookkeeping


def test_what_came_back_and_went_out_again_was_not_written_twice(
    run: Run, tree: Path, fake: Callable[[type[WatchedMapping]], list[WatchedMapping]]
) -> None:
    class Counting(WatchedMapping):
        def close(self) -> None:
            if not self.closed:
                self.last = self.stats()
            super().close()

    opened = fake(Counting)
    got = figures(run("spill", tree, "--json", "--budget", "1M", "--chunk", CHUNK, "--threads", 3)[1])
    (mapping,) = opened
    assert mapping.closed and got["evictions"] - got["writes_saved"] <= CHUNKS < got["evictions"]
    assert mapping.last.bytes_written <= TOTAL + 100 * CHUNKS
    assert mapping.last.misses >= got["bytes_spilled"] / CHUNK


def test_module_prints_a_table_and_nothing_on_stderr_that_is_no_terminal(tree: Path) -> None:
    done = start("spill", tree, "--budget", "1MiB")
    assert (done.returncode, done.stderr) == (0, "")
    labels = ("bytes in", "spilled", "chunks", "went out", "writes saved", "pressure reached")
    for label in (*labels, "write throughput", "read throughput", "peak RSS", "verified", "mismatched", "seconds"):
        assert label in done.stdout
    assert "\x1b" not in done.stdout


def test_progress_bar_is_shown_on_a_terminal(terminal: Terminal, tree: Path) -> None:
    with terminal() as (writable, shown):
        done = start("spill", tree, "--json", stderr=writable)
    assert done.returncode == 0
    assert b"spill" in shown
    assert b"verify" in shown
    figures(done.stdout)


def test_several_paths_are_added_up(run: Run, tree: Path) -> None:
    status, out, _ = run("spill", tree / "0.bin", tree / "2.bin", tree / "deep", "--json")
    deep = sum(size for number, size in enumerate(SIZES) if number % 2)
    assert (status, figures(out)["bytes_in"]) == (0, SIZES[0] + SIZES[2] + deep)


def test_nothing_to_do_is_no_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    status, out, _ = run("spill", tmp_path, "--json", "--budget", 0, "--threads", 4)
    got = figures(out)
    assert status == 0
    assert (got["bytes_in"], got["chunks"], got["evictions"], got["read_bytes_per_s"]) == (0, 0, 0, 0)


def test_a_chunk_larger_than_every_file_takes_no_more_memory_than_the_file(run: Run, tree: Path) -> None:
    status, out, _ = run("spill", tree, "--json", "--chunk", "100T")
    assert (status, figures(out)["chunks"]) == (0, sum(size > 0 for size in SIZES))


# Readers: other processes that check the buffers.


@pytest.fixture(scope="module", autouse=True)
def _tracker_is_running() -> None:
    """It is started with the first spawned process, and keeps a pipe until this one ends."""
    resource_tracker.ensure_running()


@pytest.mark.parametrize(("threads", "readers", "budget"), [(1, 1, "0"), (3, 2, "1G")])
def test_readers_verify_every_buffer(run: Run, tree: Path, threads: int, readers: int, budget: str) -> None:
    status, out, err = run(
        *("spill", tree, "--json", "--budget", budget, "--chunk", CHUNK, "--threads", threads, "--readers", readers)
    )
    got = figures(out, "verified_by_readers")
    assert (status, err) == (0, "")
    assert got["verified_by_readers"] == got["verified_chunks"] == got["chunks"] == CHUNKS
    assert got["bytes_spilled"] == (TOTAL if budget == "0" else 0)
    assert multiprocessing.active_children() == []


def test_the_table_tells_of_readers_where_there_are_some(run: Run, tree: Path) -> None:
    assert "verified by readers" in run("spill", tree, "--readers", 2)[1]
    assert "verified by readers" not in run("spill", tree)[1]


def test_a_buffer_that_differs_for_a_reader_is_a_mismatch(
    run: Run, tree: Path, fake: Callable[[type[WatchedMapping]], list[WatchedMapping]]
) -> None:
    class TellingOfAnother(WatchedMapping):
        """Its readers get a reference to the first value instead of the third."""

        def share(self, key: int) -> ObjectRef:
            return super().share(0 if key == 2 else key)

    fake(TellingOfAnother)
    status, out, err = run("spill", tree, "--json", "--budget", 0, "--chunk", CHUNK, "--readers", 1)
    got = figures(out, "verified_by_readers")
    assert (status, got["mismatched_chunks"]) == (1, 1)
    assert got["verified_chunks"] == got["verified_by_readers"] == CHUNKS - 1
    assert_one_line(err)
    assert "mismatch: " in err


def test_readers_begin_while_the_threads_read(run: Run, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(spill._Job):
        def show(self, key: int, held: SpillMapping[int, bytes]) -> None:
            super().show(key, held)
            if len(self.sources) == 5:  # of many more
                assert all(check.result(60) for check in self.checks.values())

    monkeypatch.setattr(spill, "_Job", Waiting)
    status, out, _ = run("spill", tree, "--json", "--budget", 0, "--chunk", CHUNK, "--readers", 1)
    assert (status, figures(out, "verified_by_readers")["verified_by_readers"]) == (0, CHUNKS)


@pytest.mark.parametrize("at", [3, CHUNKS])
def test_a_reader_that_dies_is_status_2_and_one_line(
    run: Run, tree: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    class Killing(spill._Job):
        def show(self, key: int, held: SpillMapping[int, bytes]) -> None:
            super().show(key, held)
            if len(self.sources) == at:
                assert self.checks[key].result(60)
                for child in multiprocessing.active_children():
                    child.kill()
                    child.join()
                time.sleep(0.2)

    monkeypatch.setattr(spill, "_Job", Killing)
    status, out, err = run("spill", tree, "--json", "--budget", 0, "--chunk", CHUNK, "--readers", 1)
    if at == CHUNKS and status == 0:  # it had checked all of them already
        figures(out, "verified_by_readers")
        return
    assert (status, out) == (2, "")
    assert_one_line(err)
    assert "a reading process has died" in err


def test_ctrl_c_ends_the_readers_too(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.touch()
    os.truncate(big, 4 << 30)
    options = ("--budget", "0", "--chunk", "4K", "--readers", "2", "--directory", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-m", "nodedb_mem", "spill", str(big), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as spiller:
        while len(_alive_in_group(spiller.pid)) < 3:
            assert spiller.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)  # the readers are there, and at it
        assert spiller.poll() is None
        os.killpg(spiller.pid, signal.SIGINT)
        out, err = spiller.communicate(timeout=60)
        assert (spiller.returncode, out, err) == (130, "", "nodedb-mem: interrupted\n")
        until = time.monotonic() + 30
        while _alive_in_group(spiller.pid):
            assert time.monotonic() < until
            time.sleep(0.01)


def _alive_in_group(group: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(stat.parent.name)
    return found


# Links and odd files.


def test_links_in_a_folder_are_not_followed(run: Run, tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"outside")
    (tree / "loop").symlink_to(tree, target_is_directory=True)
    (tree / "deep" / "up").symlink_to("..", target_is_directory=True)
    (tree / "file").symlink_to(outside)
    (tree / "broken").symlink_to("nowhere")
    os.mkfifo(tree / "fifo")
    status, out, err = run("spill", tree, "--json")
    assert (status, figures(out)["bytes_in"], err) == (0, TOTAL, "")


def test_a_link_given_by_name_is_followed(run: Run, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree, target_is_directory=True)
    assert figures(run("spill", tmp_path / "link", "--json")[1])["bytes_in"] == TOTAL


def change_after_listing(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    find_files = spill.find_files

    def find_then_change(paths: list[str], watcher: spill.Watcher) -> list[spill.Piece]:
        found = find_files(paths, watcher)
        change()
        return found

    monkeypatch.setattr(spill, "find_files", find_then_change)


def test_a_file_that_vanishes_is_named_once_counted_and_left_out(
    run: Run, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_after_listing(monkeypatch, (tree / "6.bin").unlink)
    status, out, err = run("spill", tree, "--json", "--chunk", CHUNK, "--threads", 2)
    got = figures(out)
    assert (status, got["bytes_in"]) == (0, TOTAL - SIZES[6])
    assert got["verified_chunks"] == got["chunks"] == CHUNKS - -(-SIZES[6] // CHUNK)
    assert err.splitlines() == [
        f"nodedb-mem: skipped: No such file or directory: '{tree}/6.bin'",
        "nodedb-mem: files and folders skipped: 1",
    ]


def test_a_file_that_becomes_shorter_takes_part_with_what_is_left(
    run: Run, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_after_listing(monkeypatch, lambda: os.truncate(tree / "6.bin", CHUNK + 5))
    status, out, err = run("spill", tree, "--json", "--chunk", CHUNK, "--budget", 0)
    got = figures(out)
    assert (status, got["bytes_in"], got["mismatched_chunks"]) == (0, TOTAL - SIZES[6] + CHUNK + 5, 0)
    assert err.count("Shorter than when it was listed") == 1


def test_a_notice_stays_one_line_whatever_the_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/[red]a\nb\xff\x1b[31m"))
    odd.write_bytes(b"x")
    change_after_listing(monkeypatch, odd.unlink)
    status, _, err = run("spill", tmp_path, "--json")
    assert (status, err.count("\n")) == (0, 2)
    assert r"[red]a\nb\udcff\x1b[31m" in err


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Run as a user whom file modes bind, where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_unreadable_file_is_an_error_by_name_and_a_notice_inside_a_folder(
    run: Run, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("open")
    (home / "good").write_bytes(b"good")
    (home / "secret").write_bytes(b"secret")
    (home / "closed").mkdir()
    (home / "secret").chmod(0)
    (home / "closed").chmod(0)
    home.chmod(0o777)
    monkeypatch.chdir(home)  # the folders above admit their owner only
    with ordinary_user():
        by_name = run("spill", "secret", "--directory", ".")
        folder_by_name = run("spill", "closed", "--directory", ".")
        inside = run("spill", ".", "--json", "--directory", ".")
    (home / "closed").chmod(0o700)
    for status, _, err in (by_name, folder_by_name):
        assert status == 2
        assert "Permission denied" in err
        assert_one_line(err)
    status, out, err = inside
    assert (status, figures(out)["bytes_in"]) == (0, 4)
    assert "'./secret'" in err
    assert "'./closed'" in err
    assert err.endswith("skipped: 2\n")


# Faults: the exit status and one clear line.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "frobnicate"),
        (["spill"], "PATH"),
        (["spill", "missing"], "No such file or directory: 'missing'"),
        (["spill", "here", "missing"], "No such file or directory: 'missing'"),
        (["spill", "fifo"], "Neither a regular file nor a folder: 'fifo'"),
        (["spill", "here", "--directory", "missing"], "No such file or directory"),
        (["spill", "here", "--directory", "here"], "Not a directory"),
        (["spill", "here", "--budget", "much"], "--budget: not a size: 'much'"),
        (["spill", "here", "--budget=-1"], "not a size: '-1'"),
        (["spill", "here", "--budget", ""], "not a size"),
        (["spill", "here", "--chunk", "0"], "--chunk: must be more than 0"),
        (["spill", "here", "--chunk", "1.5M"], "not a size: '1.5M'"),
        (["spill", "here", "--chunk", "5X"], "not a size: '5X'"),
        (["spill", "here", "--threads", "0"], "--threads: not a number"),
        (["spill", "here", "--threads", "many"], "--threads: not a number"),
        (["spill", "here", "--readers", "0"], "--readers: not a number"),
        (["spill", "here", "--readers", "65"], "--readers: not a number from 1 to 64"),
    ],
)
def test_a_bad_argument_is_status_2_and_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    (tmp_path / "here").write_bytes(b"here")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert_one_line(err)
    assert said in err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("3k", 3 << 10),
        ("3KiB", 3 << 10),
        ("3KB", 3000),
        ("2M", 2 << 20),
        ("2 mib", 2 << 20),
        ("2Mb", 2_000_000),
        ("1G", 1 << 30),
        ("1GIB", 1 << 30),
        ("1gb", 10**9),
        ("5T", 5 << 40),
    ],
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    assert cli.parse_size(text) == size


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-1]])
def test_a_changed_buffer_is_status_1_and_named(
    run: Run,
    tree: Path,
    fake: Callable[[type[WatchedMapping]], list[WatchedMapping]],
    damage: Callable[[bytes], bytes],
) -> None:
    class Damaging(WatchedMapping):
        def __getitem__(self, key: int) -> bytes:
            data = super().__getitem__(key)
            return damage(data) if len(data) == 1 else data

    fake(Damaging)
    status, out, err = run("spill", tree, "--json", "--budget", 0, "--chunk", CHUNK)
    got = figures(out)
    # the file of one byte, and the last byte of the file of one chunk and one byte
    assert (status, got["mismatched_chunks"], got["verified_chunks"]) == (1, 2, CHUNKS - 2)
    assert got["chunks"] == CHUNKS
    assert f"mismatch: '{tree}/deep/er/1.bin', 1 bytes at 0\n" in err
    assert f"mismatch: '{tree}/4.bin', 1 bytes at {CHUNK}\n" in err


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A sparse file so large that a run over it ends only when something stops it."""
    path = tmp_path / "endless"
    path.touch()
    try:
        os.truncate(path, 1 << 40)
    except OSError as error:
        pytest.skip(f"no sparse file of 1 TiB here: {error}")
    return path


def assert_all_ended(opened: list[WatchedMapping]) -> None:
    # A thread that was about to start when the interrupt came is not waited for, and ends by itself.
    while any(thread.name.startswith("nodedb-mem-spill") for thread in threading.enumerate()):
        time.sleep(0.001)
    assert [mapping.closed for mapping in opened] == [True]


def test_an_error_in_one_thread_stops_the_others(
    run: Run, endless: Path, fake: Callable[[type[WatchedMapping]], list[WatchedMapping]]
) -> None:
    class Failing(WatchedMapping):
        def __setitem__(self, key: int, value: bytes) -> None:
            if key == 30:
                raise RegionIOError(errno.ENOSPC, os.strerror(errno.ENOSPC), "region")
            super().__setitem__(key, value)

    opened = fake(Failing)
    status, out, err = run("spill", endless, "--budget", 0, "--chunk", "4K", "--threads", 4)
    assert (status, out) == (2, "")
    assert_one_line(err)
    assert "No space left on device" in err
    assert_all_ended(opened)


def test_ctrl_c_stops_every_thread_with_status_130(
    run: Run, endless: Path, fake: Callable[[type[WatchedMapping]], list[WatchedMapping]]
) -> None:
    class Interrupting(WatchedMapping):
        def __setitem__(self, key: int, value: bytes) -> None:
            if key == 30:
                os.kill(os.getpid(), signal.SIGINT)
            super().__setitem__(key, b"")

    opened = fake(Interrupting)
    status, out, err = run("spill", endless, "--budget", 0, "--chunk", "4K", "--threads", 2)
    assert (status, out, err) == (130, "", "nodedb-mem: interrupted\n")
    assert_all_ended(opened)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_full_disk_is_status_2_and_one_line(tree: Path, mount: Callable[..., Path], threads: int) -> None:
    small = mount("tmpfs", 2)
    done = start("spill", tree, "--budget", 0, "--directory", small, "--threads", threads)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr)
    assert "No space left on device" in done.stderr
    assert list(small.iterdir()) == []


def test_a_missing_extra_is_named_with_its_remedy(tree: Path) -> None:
    program = "import sys; sys.modules['rich'] = None; from nodedb_mem.tools.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "spill", str(tree)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr)
    assert "needs rich: pip install nodedb_mem[cli]" in done.stderr


def test_help_names_every_option() -> None:
    done = start("spill", "--help")
    assert done.returncode == 0
    for word in ("PATH", "--budget", "--chunk", "--directory", "--threads", "--readers", "--json"):
        assert word in done.stdout


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_the_readers_end_with_a_killed_command(tmp_path: Path, number: signal.Signals) -> None:
    big = tmp_path / "big"
    big.touch()
    os.truncate(big, 4 << 30)
    options = ("--budget", "0", "--chunk", "4K", "--readers", "2", "--directory", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-m", "nodedb_mem", "spill", str(big), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: (
            signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        ),  # nohup ignores it
    ) as spiller:
        until = time.monotonic() + 60
        while len(_alive_in_group(spiller.pid)) < 4:  # itself, two readers, Python's tracker of resources
            assert time.monotonic() < until and spiller.poll() is None
            time.sleep(0.01)
        time.sleep(1)  # the readers are at it
        spiller.send_signal(number)
        assert spiller.wait(60) == -number
        until = time.monotonic() + 60
        while _alive_in_group(spiller.pid):
            assert time.monotonic() < until
            time.sleep(0.01)


# Standard output that is not there any more

#: argparse says nothing of an error that it meets while it writes the help itself.
BUFFERED = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("config", "--cflags", "--libs"),
        ("spill", "TREE"),
        ("spill", "TREE", "--json"),
    ],
)
def test_a_reader_of_the_output_that_has_gone_is_no_error(tree: Path, arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "nodedb_mem", *(str(tree) if word == "TREE" else word for word in arguments)]
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("arguments", [("--help",), ("config", "--cflags"), ("spill", "TREE", "--json")])
def test_output_that_cannot_be_written_is_one_line(tree: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "nodedb_mem", *(str(tree) if word == "TREE" else word for word in arguments)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED)
    assert done.returncode == 2
    assert_one_line(done.stderr)
    assert "No space left" in done.stderr


def test_a_name_of_control_characters_reaches_no_terminal(tmp_path: Path, run: Run) -> None:
    status, _, err = run("spill", tmp_path / "\x1b[31mred", "--budget", "1")
    assert status == 2 and "\x1b" not in err
    status, _, err = run("spill", "--\x1b[31mred")
    assert status == 2 and "\x1b" not in err
