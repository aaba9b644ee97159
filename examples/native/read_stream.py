"""Read the records of spill_stream while it runs, zero-copy.

    spill_stream PATH COUNT < /dev/null | python read_stream.py PATH COUNT

The writer tells which slots to look at. It frees none, but if it did, leaving the `with` block would raise.
"""

from __future__ import annotations

import sys
import zlib

from nodedb_mem import OverflowReader


def main() -> None:
    """Check the CRC of each record in place."""
    path, count = sys.argv[1], int(sys.argv[2])
    total = 0
    lines = (sys.stdin.readline().split() for _ in range(count))
    reader = None
    for slot, _offset, size, crc in (map(int, line) for line in lines):
        reader = reader or OverflowReader(path)  # by now the region exists
        with reader.borrow(slot) as record:
            if len(record) != size or zlib.crc32(record) != crc:
                sys.exit(f"slot {slot} differs")
        total += size
    print(f"{count} records, {total} bytes: all as written")


if __name__ == "__main__":
    main()
