"""Connected components by a disjoint-set forest over one array, edges taken in batches."""

import numpy as np


class Components:
    """n points, joined by edges; a component is named by its smallest point."""

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n)  # of each point one no larger; roots are their own

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Edges between points a (m,) and b (m,).

        In each round every edge hangs its larger root below the smallest root that it was joined to; edges
        within a tree drop out. A root only ever moves below a smaller one, so there is no circle.
        """
        while len(a):
            a, b = self._root(a), self._root(b)
            apart = a != b
            a, b = a[apart], b[apart]
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)

    def labels(self) -> np.ndarray:
        """(n,) int64: the smallest point of each point's component."""
        self._parent = self._root(np.arange(len(self._parent)))
        return self._parent

    def _root(self, points: np.ndarray) -> np.ndarray:
        """Their roots. Every point met on the way is hung below its grandparent, so paths halve."""
        parent, here = self._parent, points
        while True:
            up = parent[here]
            above = parent[up]
            if np.array_equal(up, above):
                return parent[points]
            parent[here] = above
            parent[up] = parent[above]


def groups(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points sorted by label, smallest first within each, and where each group of two or more begins.

    Returns:
        (m,) points of such groups, group after group; (g + 1,) offsets into them.
    """
    order = np.argsort(labels, kind="stable")
    _, sizes = np.unique(labels, return_counts=True)
    many = np.repeat(sizes > 1, sizes)
    return order[many], np.cumsum([0, *sizes[sizes > 1]])
