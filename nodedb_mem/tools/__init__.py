"""The command ``nodedb-mem``."""
