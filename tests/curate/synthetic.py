"""Embeddings with a truth: clusters, planted copies, evaluation images that lie in the pool, seeds.

    python tests/curate/synthetic.py OUT [N] [WIDTH]     writes OUT/pool.npy, seeds.npy, test.npy, truth.npz

Of N rows, a tenth are copies of others (similarity 0.9 or more), 1 in 100 copies an evaluation row. What is
no copy has a similarity of at most about 0.6 to anything else (clusters are wide). Written a piece at a time.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

PIECE = 65_536
SPREAD, COPY = 1.1, 0.3  # length of the noise around a cluster's centre, and around an original


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def around(rng, centres, noise):
    width = centres.shape[1]
    return unit(centres + noise * rng.standard_normal(centres.shape).astype(np.float32) / np.sqrt(width))


def make(out: Path, n: int, width: int = 384, seeds: int = 1000, tests: int = 1000) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    classes = max(int(np.sqrt(n)), 10)
    centres = unit(rng.standard_normal((classes, width)).astype(np.float32))
    share = 1 / np.arange(1, classes + 1)  # Zipf: few classes are frequent
    share /= share.sum()
    test = around(rng, centres[rng.choice(classes, tests)], SPREAD)
    seed_classes = rng.choice(classes, max(classes // 10, 1), replace=False)
    seed_class = rng.choice(seed_classes, seeds)
    np.save(out / "test.npy", test.astype(np.float16))
    np.save(out / "seeds.npy", around(rng, centres[seed_class], SPREAD).astype(np.float16))
    pool = open_memmap(out / "pool.npy", "w+", np.float16, (n, width))
    label, copy_of, shows = np.empty(n, np.int32), np.full(n, -1), np.full(n, -1)
    for start in range(0, n, PIECE):
        count = min(PIECE, n - start)
        own = rng.choice(classes, count, p=share)
        x = around(rng, centres[own], SPREAD)
        originals, copies = np.split(rng.permutation(count), [count - count // 10])
        source = rng.choice(originals, len(copies))
        leak = rng.choice(originals, count // 100, replace=False)
        shows[start + leak] = rng.choice(tests, len(leak))
        x[leak] = around(rng, test[shows[start + leak]], COPY)
        x[copies] = around(rng, x[source], COPY)
        copy_of[start + copies], own[copies] = start + source, own[source]
        pool[start : start + count], label[start : start + count] = x, own
    pool.flush()
    np.savez(out / "truth.npz", label=label, copy_of=copy_of, shows=shows, seed_class=seed_class)


if __name__ == "__main__":
    make(Path(sys.argv[1]), *map(int, sys.argv[2:]))
