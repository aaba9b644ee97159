"""Objects by reference: what other processes get without its being sent."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import NewRegion, RunPython
from nodedb_mem import ObjectRef, OverflowMap, RegionIOError, SpillMapping, StaleSlotError, UndecodableError


def large(seed: int = 1) -> dict[str, Any]:
    return {"data": np.random.default_rng(seed).integers(0, 9, 300_000), "name": "ä"}


def is_large(value: dict[str, Any], seed: int = 1) -> bool:
    return bool((value["data"] == large(seed)["data"]).all()) and value["name"] == "ä"


def test_a_reference_gives_the_object(new_region: NewRegion) -> None:
    mapping: OverflowMap[str, Any] = OverflowMap(new_region())
    for key, value in {
        "large": large(),
        "small": {"a": [1, 2]},
        "bytes": b"x" * 100_000,
        "text": "t" * 100_000,
    }.items():
        mapping[key] = value
        ref = pickle.loads(pickle.dumps(mapping.share(key)))
        assert type(ref) is ObjectRef and ref == mapping.share(key) == copy.copy(ref)
        found = ref.get()
        assert type(found) is type(value) and (is_large(found) if key == "large" else found == value)
        del found
    assert len(pickle.dumps(mapping.share("small"), 5)) < 150 + len(mapping.region.path or "")


def test_it_is_read_only_or_copy_on_write(new_region: NewRegion) -> None:
    for size in (1000, 300_000):
        mapping: OverflowMap[str, Any] = OverflowMap(new_region(str(size)))
        mapping["a"] = np.zeros(size)
        ref = mapping.share("a")
        shown, mine, other = ref.get(), ref.get(writable=True), ref.get(writable=True)
        assert not shown.flags.writeable and mine.flags.writeable
        mine[[0, -1]] = 5
        assert shown.sum() == other.sum() == mapping["a"].sum() == 0 and mine.sum() == 10
        assert all(array.ctypes.data % 64 == 0 for array in (mine, other)) and shown.flags.aligned


def test_what_was_given_stays_whatever_the_owner_does(new_region: NewRegion) -> None:
    region = new_region()
    mapping: OverflowMap[str, Any] = OverflowMap(region)
    mapping["hole"] = bytes(100_000)
    mapping["a"] = large()
    ref = mapping.share("a")
    shown, mine = ref.get()["data"][5:], ref.get(writable=True)
    del mapping["hole"]
    region.compact()
    mapping["a"] = 1
    for seed in range(3):
        mapping[seed] = large(seed + 5)  # type: ignore[index]
    region.compact()
    region.trim()
    assert (shown == large()["data"][5:]).all() and is_large(mine)
    with pytest.raises(StaleSlotError):
        ref.get()
    assert region.stats().pinned_bytes > 0
    del shown, mine
    gc.collect()
    assert region.stats().pinned_bytes == 0


def test_nothing_stays_open_when_nothing_is_in_use(new_region: NewRegion) -> None:
    mapping: OverflowMap[str, Any] = OverflowMap(new_region())
    mapping["a"] = large()
    ref = mapping.share("a")
    ref.get()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert is_large(ref.get()) and is_large(ref.get(writable=True))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_object_is_a_typed_error(new_region: NewRegion) -> None:
    region = new_region()
    for data in (b"no object", bytes(100_000)):
        ref = region.share_object(region.write(data, 0))
        with pytest.raises(UndecodableError):
            ref.get()


# Of a mapping that spills


def test_a_spilling_mapping_shares_what_is_in_ram_and_what_is_out(tmp_path: Path) -> None:
    with SpillMapping[str, Any](1 << 30, tmp_path) as mapping:
        mapping["a"], mapping["b"] = large(1), large(2)
        mapping.evict(["b"])
        first, second = mapping.share("a"), mapping.share("b")
        assert is_large(first.get(), 1) and is_large(second.get(), 2)
        assert mapping.share("a") == first and mapping.stats().keys_in_ram == 1
        mapping.evict()
        assert mapping.stats().bytes_written < 5_000_000 and is_large(first.get(), 1)  # it was not written twice
        mapping["a"]["data"][0] = 55
        assert first.get()["data"][0] != 55
        third = mapping.share("a")
        assert third.get()["data"][0] == 55
        with pytest.raises(StaleSlotError):
            first.get()
        mapping.evict()
        assert third.get()["data"][0] == mapping["a"]["data"][0] == 55
        mapping["a"]["data"][0] = 56
        mapping.evict()
        assert mapping["a"]["data"][0] == 56
        with pytest.raises(StaleSlotError):
            third.get()
        with pytest.raises(KeyError):
            mapping.share("c")


def test_what_values_share_in_this_process_is_sent_along(tmp_path: Path) -> None:
    with SpillMapping[int, Any](0, tmp_path) as mapping:
        config = {"depth": 3}
        for number in range(3):
            mapping[number] = {"config": config, "data": np.arange(50_000)}
        mapping.evict()
        mapping.evict()
        assert mapping.stats().keys_in_ram == 0
        ref = mapping.share(1)
        assert ref.get()["config"] == {"depth": 3} and ref.get()["data"].sum() == sum(range(50_000))
        config["depth"] = 4
        assert mapping[1]["config"] is config


def test_an_owner_that_has_ended_is_a_typed_error(tmp_path: Path) -> None:
    mapping = SpillMapping[str, Any](0, tmp_path)
    mapping["a"] = large()
    ref = mapping.share("a")
    value = ref.get()
    mapping.close()
    assert is_large(value)
    del value
    with pytest.raises((RegionIOError, StaleSlotError)):
        ref.get()


# Through what sends things to other processes

_SCRIPT = """
    import multiprocessing, os, sys
    import numpy as np
    from nodedb_mem import SpillMapping, StaleSlotError

    def total(ref, start):
        data = ref.get()["data"]
        assert not data.flags.writeable
        return int(data[start : start + 1000].sum()), os.getpid()

    def change(ref):
        data = ref.get(writable=True)["data"]
        data[:] = 7
        return int(data.sum())

    def main(mapping, submit_all):
        data = np.arange(500_000)
        mapping["a"] = {"data": data}
        ref = mapping.share("a")
        found = submit_all(total, [(ref, start) for start in range(0, 500_000, 50_000)])
        assert [each[0] for each in found] == [int(data[i : i + 1000].sum()) for i in range(0, 500_000, 50_000)]
        assert os.getpid() not in {each[1] for each in found}
        assert submit_all(change, [(ref,), (ref,)]) == [7 * 500_000] * 2
        assert (mapping["a"]["data"] == data).all() and (ref.get()["data"] == data).all()
        del mapping["a"]
        try:
            submit_all(change, [(ref,)])
        except StaleSlotError:
            print("done")

    if __name__ == "__main__":
        with SpillMapping(1 << 20, sys.argv[1]) as mapping:
            %s
    """


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_by_multiprocessing(run_python: RunPython, tmp_path: Path, method: str) -> None:
    path = tmp_path / "main.py"
    path.write_text(
        _plain(f"""
            with multiprocessing.get_context("{method}").Pool(2) as pool:
                main(mapping, pool.starmap)
                pool.close()
                pool.join()
        """)
    )
    assert _run(run_python, path, tmp_path) == "done\n"


def test_by_concurrent_futures(run_python: RunPython, tmp_path: Path) -> None:
    path = tmp_path / "main.py"
    path.write_text(
        _plain("""
            from concurrent.futures import ProcessPoolExecutor
            with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
                main(mapping, lambda function, tasks: list(pool.map(function, *zip(*tasks))))
        """)
    )
    assert _run(run_python, path, tmp_path) == "done\n"


def test_by_joblib(run_python: RunPython, tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    path = tmp_path / "main.py"
    path.write_text(
        _plain("""
            import joblib
            with joblib.Parallel(n_jobs=2) as parallel:
                main(mapping, lambda function, tasks: parallel(joblib.delayed(function)(*each) for each in tasks))
            from joblib.externals.loky import get_reusable_executor
            get_reusable_executor().shutdown()
        """)
    )
    assert _run(run_python, path, tmp_path) == "done\n"


@pytest.mark.system
def test_by_dask(run_python: RunPython, tmp_path: Path) -> None:
    pytest.importorskip("dask")
    path = tmp_path / "main.py"
    path.write_text(
        _plain("""
            import dask
            def submit_all(function, tasks):
                return list(dask.compute(*(dask.delayed(function)(*each) for each in tasks), scheduler="processes",
                                         num_workers=2))
            main(mapping, submit_all)
        """)
    )
    assert _run(run_python, path, tmp_path) == "done\n"


def _plain(last: str) -> str:
    """The script, which ends with `last`."""
    import textwrap

    body = textwrap.indent(textwrap.dedent(last).strip(), "        ")
    return textwrap.dedent(_SCRIPT) % body.lstrip()


def _run(run_python: RunPython, path: Path, folder: Path) -> str:
    (folder / "spilled").mkdir(exist_ok=True)
    return run_python(
        "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)",
        path,
        folder / "spilled",
    )
