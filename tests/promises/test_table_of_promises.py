"""The table of promises in tests/README.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def rows() -> list[list[tuple[str, str]]]:
    table = (TESTS / "README.md").read_text(encoding="utf-8").partition("## Promises")[2]
    return [found for line in table.splitlines() if (found := re.findall(r"`([\w/]+\.(?:py|c))::(\w+)`", line))]


def test_every_test_that_proves_a_promise_exists() -> None:
    assert len(rows()) > 50
    for path, name in [pair for row in rows() for pair in row]:
        assert re.search(rf"\b(def|class|int|void) {name}\b", (TESTS / path).read_text(encoding="utf-8")), (path, name)
