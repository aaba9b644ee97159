"""Read the records of spill_stream while it runs, zero-copy.

    spill_stream PATH COUNT < /dev/null | python read_stream.py PATH COUNT

The records are seen through a read-only mapping of the region's file, at the places that the writer tells. That is safe
because the writer frees no slot before this program has ended: nothing else keeps the bytes there.
"""

from __future__ import annotations

import mmap
import sys
import zlib


def main() -> None:
    """Check the CRC of each record in place."""
    path, count = sys.argv[1], int(sys.argv[2])
    total = 0
    with open(path, "rb") as file:
        mapping = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        for _ in range(count):
            slot, offset, size, crc = map(int, sys.stdin.readline().split())
            if offset + size > len(mapping):  # the region has grown
                mapping = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            record = mapping[offset : offset + size]
            if zlib.crc32(record) != crc:
                sys.exit(f"slot {slot} differs")
            total += size
    print(f"{count} records, {total} bytes: all as written")


if __name__ == "__main__":
    main()
