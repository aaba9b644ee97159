#!/usr/bin/env bash
# Make the sdist and the wheel in dist/, with SOURCE_DATE_EPOCH from the caller: the same bytes each time.
# Usage: dist.sh PYTHON   (an interpreter that has build, auditwheel and wheel)
#
# The wheel gets the manylinux tag that auditwheel reads from its symbols: the tag and nothing else. `auditwheel repair`
# brings in libraries from outside the wheel, and there are none: the core is inside, found by $ORIGIN/lib. Where
# auditwheel knows no policy for this machine's libc, the wheel keeps its linux tag, which says "built here".
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1

umask 022
rm -rf dist
"$python" -m build --outdir dist .
for wheel in dist/*-linux_*.whl; do
    tag=$("$python" -m auditwheel show --json "$wheel" |
        "$python" -c 'import json, sys; print(json.load(sys.stdin)["overall_tag"])') || tag=
    case "$tag" in
    manylinux_*) "$python" -m wheel tags --remove --platform-tag "$tag" "$wheel" ;;
    *) echo "dist: no manylinux policy fits $wheel" ;;
    esac
done
