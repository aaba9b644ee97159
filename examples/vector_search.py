"""The k nearest neighbours among vectors that do not fit into the budget, by blocks.

    pip install nodedb-mem numpy
    python examples/vector_search.py [--vectors N] [--budget BYTES]

Blocks of vectors are values of a mapping that spills. A search goes through all blocks and keeps the k best of what it
has seen. The blocks do not change, so that none is written twice.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

import numpy as np

from nodedb_mem import EngineId, SpillMapping

BLOCK = 4096  # vectors


class Index:
    """Vectors in blocks, found by the inner product."""

    def __init__(self, dimension: int, budget: int, directory: str) -> None:
        self.blocks: SpillMapping[int, np.ndarray] = SpillMapping(budget, directory, engine=EngineId.VECTOR)
        self.dimension = dimension
        self.count = 0

    def add(self, vectors: np.ndarray) -> None:
        """Append a block of vectors, one a row."""
        self.blocks[self.count] = np.ascontiguousarray(vectors, "f4")
        self.count += len(vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers and the scores of the best k for each query, the best first."""
        scores = np.empty((len(queries), 0), "f4")
        numbers = np.empty((len(queries), 0), np.int64)
        for first in self.blocks:
            block = self.blocks[first]
            scores = np.hstack([scores, queries @ block.T])
            numbers = np.hstack([numbers, np.tile(np.arange(first, first + len(block)), (len(queries), 1))])
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, numbers = np.take_along_axis(scores, best, 1), np.take_along_axis(numbers, best, 1)
        return numbers, scores


def random_vectors(count: int, dimension: int, seed: int) -> np.ndarray:
    """Make vectors of length 1."""
    vectors = np.random.default_rng(seed).standard_normal((count, dimension), "f4")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> int:
    """Search, and compare with a search in RAM."""
    parser = argparse.ArgumentParser(description="Nearest neighbours among vectors that do not fit.")
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--budget", type=int, default=8 << 20, help="bytes of vectors in RAM")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where vectors are spilled to")
    options = parser.parse_args()
    index = Index(options.dimension, options.budget, options.directory)
    with index.blocks:
        for start in range(0, options.vectors, BLOCK):
            index.add(random_vectors(min(BLOCK, options.vectors - start), options.dimension, start))
        queries = random_vectors(10, options.dimension, 12345)
        begin = time.perf_counter()
        numbers, scores = index.search(queries, 10)
        seconds = time.perf_counter() - begin
        everything = np.concatenate(list(index.blocks.values())) @ queries.T
        assert np.allclose(scores, -np.sort(-everything.T, axis=1)[:, :10], atol=1e-5)
        assert np.allclose(np.take_along_axis(everything.T, numbers, 1), scores, atol=1e-5)
        print(f"{options.vectors:,} vectors, {everything.shape[0] * options.dimension * 4:,} bytes")
        print(f"10 queries in {seconds:.3f} s; {index.blocks.stats()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
