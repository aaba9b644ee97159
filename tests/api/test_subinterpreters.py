"""One interpreter of a process has the package: another is refused, and changes nothing for the first."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from kit import RunPython

SCRIPT = """
import importlib, sys
from pathlib import Path
from nodedb_mem import InvalidSlotError, OverflowRegion, RegionClosedError

where = Path(sys.argv[1])
code = f'''
import sys
sys.path[:] = {sys.path!r}
try:
    import nodedb_mem
except ImportError as error:
    text = str(error)
else:
    text = "imported"
open({str(where / "said")!r}, "w").write(text)
'''
region = OverflowRegion.open(where / "r", initial_capacity=1 << 20)
try:
    import _testcapi
    assert _testcapi.run_in_subinterp(code) == 0
except ImportError:
    import _xxsubinterpreters
    other = _xxsubinterpreters.create(isolated=False)
    _xxsubinterpreters.run_string(other, code)
    _xxsubinterpreters.destroy(other)
print((where / "said").read_text())
try:
    region.read(7)
except InvalidSlotError as error:
    print(error.slot)
region.close()
try:
    region.write(b"x", 0)
except RegionClosedError:
    print("closed")
before = sys.modules.pop("nodedb_mem._memory")
assert importlib.import_module("nodedb_mem._memory").write is before.write
"""


@pytest.mark.skipif(
    not (importlib.util.find_spec("_testcapi") or importlib.util.find_spec("_xxsubinterpreters")),
    reason=f"Python {sys.version_info.major}.{sys.version_info.minor} has no way here to make another interpreter",
)
def test_another_interpreter_is_refused_and_changes_nothing(run_python: RunPython, tmp_path: Path) -> None:
    said, slot, closed = run_python(SCRIPT, tmp_path).splitlines()
    assert said.startswith("nodedb_mem serves one interpreter")
    assert (slot, closed) == ("7", "closed")
