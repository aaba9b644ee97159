#!/usr/bin/env bash
# Install one wheel into a fresh environment of each CPython 3.11, 3.12 and 3.13 that this machine has, and run
# tests/smoke.py there. An interpreter that is not here is skipped; none at all is a failure.
# Usage: wheel_smoke.sh WHEEL
set -euo pipefail

wheel=$(realpath "$1")
smoke=$(realpath "$(dirname "$0")/../tests/smoke.py")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Print a working, ordinary (not free-threaded) CPython of the given version. A name on PATH may be a stub of a
# version manager that fails when run, so each candidate is tried.
interpreter() {
    local version=$1 candidate
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python3; do
        if "$candidate" - "$version" 2>/dev/null <<'PYTHON'
import sys, sysconfig
ok = sys.implementation.name == "cpython" and "%d.%d" % sys.version_info[:2] == sys.argv[1]
sys.exit(not ok or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
PYTHON
        then
            echo "$candidate"
            return
        fi
    done
    return 1
}

tried=0
for version in 3.11 3.12 3.13; do
    if ! python=$(interpreter "$version"); then
        echo "wheel-smoke: CPython $version: not on this machine"
        continue
    fi
    "$python" -m venv "$scratch/$version"
    "$scratch/$version/bin/python" -m pip --disable-pip-version-check --quiet install "$wheel"
    # -I and a foreign folder: nothing but the installed wheel can be imported.
    (cd "$scratch" && "$scratch/$version/bin/python" -I "$smoke")
    echo "wheel-smoke: CPython $version: ok ($("$scratch/$version/bin/python" -V))"
    tried=$((tried + 1))
done
[ "$tried" -gt 0 ] || { echo "wheel-smoke: no CPython 3.11, 3.12 or 3.13 found" >&2; exit 1; }
