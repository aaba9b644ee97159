"""``python -m nodedb_mem``: the same as the command ``nodedb-mem``."""

import sys

from nodedb_mem.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
