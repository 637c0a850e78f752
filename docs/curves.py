"""Draw docs/recipes/RECIPE.svg for each recipe in curves.csv there: `python docs/curves.py [FOLDER]`."""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

TABLE = Path(__file__).parent / "recipes/curves.csv"


def main(folder: str = str(TABLE.parent)) -> None:
    """Write a picture for each recipe; the same table gives the same bytes."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dinokit", "font.family": "sans-serif"})
    curves: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    with TABLE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            curves[row["recipe"]][row["variant"]].append((int(row["images"]), float(row["knn_top1"])))
    for recipe, variants in curves.items():
        figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        for variant, points in variants.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=variant)
        axes.set(xlabel="images seen", ylabel="k-NN accuracy (k = 20)", title=recipe)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(Path(folder) / f"{recipe}.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
