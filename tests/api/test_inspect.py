"""The command ``nodedb-mem inspect``: a region from outside, with its owner at work, closed, or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit import Run, Terminal
from nodedb_mem import EngineId, OverflowReader, OverflowRegion
from nodedb_mem.tools import inspect

OWNER = """
    import sys
    from nodedb_mem import EngineId, OverflowRegion
    region = OverflowRegion(sys.argv[1])
    for size in (1000, 2000, 3000):
        region.write(bytes(size), EngineId.WAL)
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module", autouse=True)
def _fonts_are_open() -> None:
    """Matplotlib keeps the font file open that it draws with first: no leak of ours."""
    with suppress(ImportError):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure()
        figure.text(0, 0, "x")
        FigureCanvasAgg(figure).draw()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "region"


def fill(region: OverflowRegion) -> list[int]:
    """Three engines, one of them unknown, and a hole of 100000 bytes."""
    slots = [region.write(bytes(100_000), engine) for engine in (EngineId.VECTOR, EngineId.CRDT, EngineId.CRDT, 77)]
    region.free(slots.pop(1))
    return slots


def assert_refused(result: tuple[int, str, str], said: str) -> None:
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("nodedb-mem: ") and err.count("\n") == 1
    assert said in err


# What is told.


def test_json_tells_what_the_owner_knows(run: Run, path: Path) -> None:
    with OverflowRegion(path, initial_capacity=1 << 20, max_capacity=8 << 20) as region:
        fill(region)
        stats = region.stats()
        status, out, err = run("inspect", path, "--json")
    got = json.loads(out)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert (got["path"], got["owner"], got["alignment"]) == (str(path), os.getpid(), 64)
    for name in ("capacity", "max_capacity", "used_bytes", "live_bytes", "live_slots", "slot_count"):
        assert got[name] == getattr(stats, name)
    assert got["engines"] == {
        "vector": {"live_bytes": 100_000, "live_slots": 1},
        "crdt": {"live_bytes": 100_000, "live_slots": 1},
        "77": {"live_bytes": 100_000, "live_slots": 1},
    }
    assert abs(got["free_bytes"] - 100_000) <= 3 * 64
    assert got["resident_bytes"] >= 300_000
    assert (got["pinned_bytes"], got["leases"], got["leased_bytes"]) == (0, 0, 0)


def test_free_pinned_and_leased_bytes_are_told_apart(run: Run, path: Path) -> None:
    def told(*names: str) -> list[int]:
        got = json.loads(run("inspect", path, "--json")[1])
        assert got["live_bytes"] + got["pinned_bytes"] + got["free_bytes"] <= got["used_bytes"]
        return [got[name] for name in names]

    names = ("pinned_bytes", "leased_bytes", "leases")
    with OverflowRegion(path, initial_capacity=1 << 20) as region, OverflowReader(path) as reader:
        freed, live, viewed = (region.write(bytes(64_000), EngineId.WAL) for _ in range(3))
        region.share(live)
        leases = [reader.lease(live), reader.lease(freed), reader.lease(freed)]
        assert told(*names) == [0, 128_000, 3]
        view = region.read(viewed)
        region.free(viewed)
        assert told(*names) == [64_000, 128_000, 3]
        region.free(freed)
        assert told(*names, "free_bytes") == [128_000, 128_000, 3, 0]
        out = run("inspect", path)[1]
        assert "###" in out and "# freed but leased" in out and "128.0 kB in 3 leases" in out
        shot = inspect.look(str(path))
        assert shot.kept == [(0, 64_000)] and sum(cell.kept_bytes for cell in shot.cells(77)) == 64_000
        del view
        leases.pop(1).release()
        region.slot_count  # noqa: B018  (the owner's next call notices)
        assert told(*names, "free_bytes") == [64_000, 128_000, 2, 64_000]
        leases.pop().release()
        region.slot_count  # noqa: B018
        assert told(*names, "free_bytes") == [0, 64_000, 1, 128_000]
        leases.clear()


def test_what_leases_keep_of_a_dead_owners_is_pinned(
    run: Run, path: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    owner = start_python(
        """
        import sys
        from nodedb_mem import OverflowRegion
        region = OverflowRegion(sys.argv[1])
        slots = [region.write(bytes(64_000), 0) for _ in range(3)]
        region.share(0)
        view = region.read(2)
        print("ready", flush=True)
        sys.stdin.readline()
        region.free(1)
        region.free(2)
        print("freed", flush=True)
        sys.stdin.read()
        """,
        path,
    )
    assert owner.stdin and owner.stdout and owner.stdout.readline() == "ready\n"
    with OverflowReader(path) as reader, reader.lease(1):
        owner.stdin.write("free\n")
        owner.stdin.flush()
        owner.stdout.readline()
        assert json.loads(run("inspect", path, "--json")[1])["pinned_bytes"] == reader.stats().pinned_bytes == 128_000
        owner.kill()
        owner.wait()
        got = json.loads(run("inspect", path, "--json")[1])
        assert (got["owner"], got["pinned_bytes"], got["free_bytes"]) == (None, 64_000, 64_000)


def test_the_text_has_figures_bars_and_a_map(run: Run, path: Path) -> None:
    with OverflowRegion(path, initial_capacity=1 << 20) as region:
        fill(region)
        status, out, err = run("inspect", path)
    assert (status, err) == (0, "")
    for word in ("capacity", "used", "live", "free", "pinned", "leased", "resident", "vector", "crdt", "77", "map"):
        assert word in out
    assert f"alive, process {os.getpid()}" in out
    assert "v vector" in out and "x other engine" in out
    assert "\x1b" not in out  # no terminal


@pytest.mark.parametrize("size", [1, 0])
def test_a_region_of_no_values(run: Run, path: Path, size: int) -> None:
    OverflowRegion(path, initial_capacity=1, max_capacity=4096).close()
    os.truncate(path, size)
    pytest.importorskip("matplotlib")
    status, out, err = run("inspect", path, "--plot", path.with_suffix(".png"))
    assert (status, err) == (0, f"nodedb-mem: the picture is in '{path.with_suffix('.png')}'\n")
    assert "none: closed or dead" in out
    got = json.loads(run("inspect", path, "--json")[1])
    assert (got["capacity"], got["live_bytes"], got["engines"], got["owner"]) == (size, 0, {}, None)


def test_a_killed_owner_is_told_and_its_values_are_shown(
    run: Run, path: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    owner = start_python(OWNER, path)
    assert owner.stdout and owner.stdout.readline() == "ready\n"
    alive = json.loads(run("inspect", path, "--json")[1])
    owner.kill()
    owner.wait()
    dead = json.loads(run("inspect", path, "--json")[1])
    assert (alive["owner"], dead["owner"]) == (owner.pid, None)
    assert dead["engines"] == alive["engines"] == {"wal": {"live_bytes": 6000, "live_slots": 3}}
    assert "none: closed or dead" in run("inspect", path)[1]


def test_leases_of_living_processes_count(
    run: Run, path: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    def leases() -> Any:
        return json.loads(run("inspect", path, "--json")[1])["leases"]

    with OverflowRegion(path) as region, OverflowReader(path) as reader:
        slots = fill(region)
        ref = region.share(slots[0])
        assert leases() == 0
        held = [reader.lease(ref), reader.lease(slots[1])]
        other = start_python(
            """
            import sys
            from nodedb_mem import OverflowReader
            reader = OverflowReader(sys.argv[1])
            lease = reader.lease(int(sys.argv[2]))
            print("leased", flush=True)
            sys.stdin.read()
            """,
            *(path, slots[2]),
        )
        assert other.stdout and other.stdout.readline() == "leased\n"
        assert leases() == 3
        held[0].release()
        assert leases() == 2
        other.kill()
        other.wait()
        assert leases() == 1  # though nobody has reaped the entry yet
        held[1].release()
        assert leases() == 0


def test_inspecting_changes_nothing(run: Run, path: Path) -> None:
    pytest.importorskip("matplotlib")
    with OverflowRegion(path) as region:
        fill(region)
    files = sorted(path.parent.iterdir())
    before = [file.read_bytes() for file in files]
    for arguments in ([], ["--json"], ["--plot", path.with_suffix(".png")]):
        assert run("inspect", path, *arguments)[0] == 0
    path.with_suffix(".png").unlink()
    assert sorted(path.parent.iterdir()) == files
    assert [file.read_bytes() for file in files] == before


# The map.


@pytest.mark.parametrize("count", [1, 3, 64, 10_000])
def test_the_cells_cover_the_file_and_hold_every_live_byte(path: Path, count: int) -> None:
    with OverflowRegion(path, initial_capacity=1 << 20) as region:
        fill(region)
        shot = inspect.look(str(path))
    cells = shot.cells(count)
    assert 0 < len(cells) <= count
    assert sum(cell.size for cell in cells) == shot.capacity
    assert sum(sum(cell.engines.values()) for cell in cells) == shot.live_bytes == 300_000
    assert all(sum(cell.engines.values()) <= cell.size for cell in cells)
    if None not in (resident := [cell.resident_bytes for cell in cells]):
        assert 300_000 <= sum(size or 0 for size in resident) <= shot.capacity


def test_cells_are_used_by_the_engine_that_has_most_of_them(path: Path) -> None:
    with OverflowRegion(path, initial_capacity=1 << 20) as region:
        fill(region)
        cells = inspect.look(str(path)).cells(256)  # one a page
    engines = [cell.engine for cell in cells]
    assert engines[0] == engines[23] == EngineId.VECTOR
    assert engines[30] is None and cells[30].is_used  # the hole
    assert engines[60] == EngineId.CRDT
    assert engines[90] == 77
    assert engines[150] is None and not cells[150].is_used


def test_evicted_values_are_shown_as_such(run: Run, path: Path) -> None:
    with OverflowRegion(path, initial_capacity=1 << 20) as region:
        region.write(bytes(1 << 19), EngineId.VECTOR)
        before = inspect.look(str(path)).cells(16)
        if before[0].resident_bytes is None:
            pytest.skip("this kernel does not tell what is in RAM")
        assert "VVV" in run("inspect", path)[1]
        region.evict()
        after = inspect.look(str(path)).cells(16)
        if after[0].resident_bytes:
            pytest.skip("this file system keeps its files in RAM")
        assert before[0].is_resident and not after[0].is_resident
        out = run("inspect", path)[1]
    assert "vvv" in out and "VVV" not in out


def test_the_map_without_residency_says_so(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "_CACHESTAT", 10_000)  # no such call
    with OverflowRegion(path) as region:
        fill(region)
        out = run("inspect", path)[1]
    assert "needs Linux 6.5" in out and "capital" not in out


def test_what_is_in_ram_may_be_unknown(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = OverflowReader.stats
    monkeypatch.setattr(OverflowReader, "stats", lambda reader: replace(stats(reader), resident_bytes=None))
    pytest.importorskip("matplotlib")
    with OverflowRegion(path) as region:
        fill(region)
        out = run("inspect", path, "--plot", path.with_suffix(".png"))[1]
        assert any("resident" in line and "unknown" in line for line in out.splitlines())
        assert json.loads(run("inspect", path, "--json")[1])["resident_bytes"] is None


def test_one_is_no_plural_and_a_path_has_no_quotes(run: Run, path: Path) -> None:
    with OverflowRegion(path, initial_capacity=1 << 20) as region:
        ref = region.share(region.write(b"x", EngineId.WAL))
        with OverflowReader(ref) as reader, reader.lease(ref):
            out = run("inspect", path)[1]
    assert "1 byte in 1 slot " in out and "1 byte in 1 lease " in out and "1 slots" not in out
    assert path.name in out and f"{path.name}'" not in out


def test_lines_of_nothing_at_the_end_of_the_map_are_told_not_drawn(run: Run, path: Path) -> None:
    with OverflowRegion(path, initial_capacity=64 << 20) as region:
        region.write(bytes(100_000), EngineId.WAL)
        out = run("inspect", path)[1]
        panel = out[out.index("map: ") :].splitlines()[1:-1]
        assert len([line for line in panel if not line.strip("│|╭╮╰╯─ ")]) <= 1  # its lower edge
        assert "never used, and not drawn: the last " in out
        region.write(bytes(63 << 20), EngineId.WAL)
        assert "not drawn" not in run("inspect", path)[1]


@pytest.mark.parametrize("size", [1, 999, 1000, 1500, 999_949, 999_950, 123_456_789, 10**12, (1 << 63) - 1])
def test_sizes_are_legible(size: int) -> None:
    number, unit = inspect._decimal(size).split()
    scale = {"byte": 1, "bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "EB": 1e18}[unit]
    assert float(number) * scale == pytest.approx(size, rel=0.05, abs=0)
    assert float(number) < 1000


# The picture.


def test_plot_makes_a_png_beside_the_figures(run: Run, path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "pictures.of" / "a region"
    target.parent.mkdir()
    with OverflowRegion(path) as region:
        fill(region)
        status, out, err = run("inspect", path, "--json", "--plot", target)
    assert (status, json.loads(out)["live_bytes"]) == (0, 300_000)
    assert err == f"nodedb-mem: the picture is in '{target}'\n"
    assert target.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("name", ["a.pdf", "a.jpg", "a.png.txt"])
def test_plot_into_another_format_is_status_2(run: Run, path: Path, tmp_path: Path, name: str) -> None:
    OverflowRegion(path).close()
    assert_refused(run("inspect", path, "--plot", tmp_path / name), "must end in .png")
    assert not (tmp_path / name).exists()


def test_plot_into_nowhere_is_status_2(run: Run, path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    OverflowRegion(path).close()
    assert_refused(run("inspect", path, "--plot", tmp_path / "missing" / "a.png"), "No such file or directory")


@pytest.mark.parametrize(("library", "extra"), [("matplotlib", "plot"), ("rich", "cli")])
def test_a_missing_extra_is_named_with_its_remedy(path: Path, library: str, extra: str) -> None:
    OverflowRegion(path).close()
    program = f"import sys; sys.modules[{library!r}] = None; from nodedb_mem.tools.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", path, "--plot", path.with_suffix(".png")]
        if library == "matplotlib"
        else [sys.executable, "-c", program, "inspect", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused((done.returncode, done.stdout, done.stderr), f"needs {library}: pip install nodedb_mem[{extra}]")


def test_json_needs_no_extra(path: Path) -> None:
    OverflowRegion(path).close()
    program = (
        "import sys; sys.modules.update(rich=None, matplotlib=None); "
        "from nodedb_mem.tools.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "inspect", str(path), "--json"]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["owner"] is None


# Watching.


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nodedb_mem", "inspect", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_watch_follows_the_owner_until_ctrl_c(path: Path) -> None:
    with (
        OverflowRegion(path) as region,
        start(path, "--watch", "--json", stdout=subprocess.PIPE) as watcher,
    ):
        assert watcher.stdout and watcher.stderr
        assert json.loads(watcher.stdout.readline())["live_bytes"] == 0
        region.write(bytes(5000), EngineId.QUERY)
        while json.loads(watcher.stdout.readline())["live_bytes"] != 5000:
            pass
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait() == 0
        assert watcher.stderr.read() == ""


def test_watch_follows_a_region_that_is_opened_anew(path: Path) -> None:
    with OverflowRegion(path) as region:
        region.write(bytes(5000), EngineId.QUERY)
    with start(path, "--watch", "--json", stdout=subprocess.PIPE) as watcher:
        assert watcher.stdout
        first = json.loads(watcher.stdout.readline())
        with OverflowRegion(path):
            while (later := json.loads(watcher.stdout.readline()))["owner"] != os.getpid():
                pass
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait() == 0
    assert (first["owner"], first["live_bytes"], later["live_bytes"]) == (None, 5000, 0)
    assert later["incarnation"] != first["incarnation"]


def test_watch_ends_when_the_file_is_gone(path: Path) -> None:
    OverflowRegion(path).close()
    with start(path, "--watch", "--json", stdout=subprocess.PIPE) as watcher:
        assert watcher.stdout and watcher.stderr
        watcher.stdout.readline()
        path.unlink()
        assert watcher.wait() == 2
        assert "No such file or directory" in watcher.stderr.read()


def test_watch_draws_on_a_terminal(terminal: Terminal, path: Path) -> None:
    with terminal() as (writable, shown), OverflowRegion(path) as region:
        region.write(bytes(300_000), EngineId.BRIDGE)
        with start(path, "--watch", stdout=writable, env=os.environ | {"TERM": "xterm"}) as watcher:
            while b"resident" not in shown and watcher.poll() is None:
                time.sleep(0.01)
            first = len(shown)
            while len(shown) == first and watcher.poll() is None:  # it refreshes
                time.sleep(0.01)
            watcher.send_signal(signal.SIGINT)
            assert watcher.wait() == 0
    assert b"bridge" in shown and b"\x1b" in shown


# What is no region.


def test_paths_that_are_none_are_refused_in_one_line(run: Run, path: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"x" * 10_000)
    assert_refused(run("inspect", tmp_path / "missing"), f"No such file or directory: '{tmp_path}/missing'")
    assert_refused(run("inspect", tmp_path), "Not a regular file")
    assert_refused(run("inspect", plain), f"Not a region: it has no slot table beside it: '{plain}'")
    (tmp_path / "plain.slots").write_bytes(b"x" * 10_000)
    assert_refused(run("inspect", plain), f"'{plain}.slots'")
    (tmp_path / "plain.slots").write_bytes(b"")
    assert_refused(run("inspect", plain), "cut short")
    OverflowRegion(path).close()
    (tmp_path / "copy").write_bytes(path.read_bytes())
    (tmp_path / "copy.slots").write_bytes((tmp_path / "region.slots").read_bytes())
    assert_refused(run("inspect", tmp_path / "copy"), "copy")
    assert_refused(run("inspect", path, "frobnicate"), "frobnicate")
    assert_refused(run("inspect"), "PATH")


def test_help_names_every_option() -> None:
    with start("--help", stdout=subprocess.PIPE) as done:
        assert done.stdout
        told = done.stdout.read()
    for word in ("PATH", "--json", "--watch", "--plot"):
        assert word in told


# Names, pipes, and an owner that is opening


@pytest.mark.parametrize("name", [b"caf\xe9", b":smile:", b"[red]x", b"a\x1b[31mb", "\U0001f600 $x^$".encode()])
def test_odd_names_are_shown_as_they_are(run: Run, tmp_path: Path, name: bytes) -> None:
    pytest.importorskip("matplotlib")
    path, picture = os.fsdecode(os.fsencode(tmp_path) + b"/" + name), tmp_path / "out.png"
    OverflowRegion(path, initial_capacity=4096).close()
    status, out, err = run("inspect", path, "--plot", picture)
    assert (status, err) == (0, f"nodedb-mem: the picture is in {str(picture)!r}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    flat = "".join(out.split("┌")[0].split("\n")).replace(" ", "")  # a long title goes over lines
    expected = {b"caf\xe9": r"caf\udce9", b"a\x1b[31mb": r"a\x1b[31mb"}.get(name, name.decode(errors="replace"))
    assert expected.replace(" ", "") in flat
    assert json.loads(run("inspect", path, "--json")[1])["path"] == path
    assert str(tmp_path) in run("inspect", path + "none")[2]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_each_frame_reaches_a_pipe_and_its_end_is_no_error(path: Path, options: tuple[str, ...]) -> None:
    OverflowRegion(path, initial_capacity=4096).close()
    watcher = start(path, "--watch", *options, stdout=subprocess.PIPE)
    with watcher:
        assert watcher.stdout is not None and watcher.stderr is not None
        frames = 0
        while frames < 2:
            line = watcher.stdout.readline()
            assert line
            frames += "capacity" in line
        watcher.stdout.close()
        assert watcher.wait(60) == 128 + signal.SIGPIPE
        assert watcher.stderr.read() == ""


def test_a_region_that_is_being_opened_is_waited_for(
    path: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    owner = start_python(
        """
        import sys, time
        from nodedb_mem import OverflowRegion
        print("ready", flush=True)
        for _ in range(2):  # a look waits longer than a burst lasts, and a rest lasts longer than a look takes
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                OverflowRegion(sys.argv[1], initial_capacity=1 << 30).close()
            time.sleep(0.8)
        """,
        path,
    )
    assert owner.stdout and owner.stdout.readline() == "ready\n"
    while not path.exists():
        time.sleep(0.001)
    while owner.poll() is None:
        inspect.look(str(path))


def test_a_table_that_stays_half_made_is_an_error_in_the_end(
    run: Run, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "_PAUSE", 0.001)
    OverflowRegion(path, initial_capacity=4096).close()
    os.truncate(f"{path}.slots", 0)
    assert_refused(run("inspect", path), "slot table")
    os.unlink(f"{path}.slots")
    assert_refused(run("inspect", path), "no slot table")
