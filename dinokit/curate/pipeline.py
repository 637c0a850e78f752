"""A whole curation, from a pool of images to manifest.csv and report.html, in twelve stages."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate import retrieve
from dinokit.curate.dedup import (
    Status,
    dedup,
    load_status,
    read_edges,
    remove_overlap,
    removed_in_words,
    write_edges,
)
from dinokit.curate.hashing import hash_pool
from dinokit.curate.image_sets import Embedder, Embeddings, ImageSet, read_embeddings, write_embeddings
from dinokit.curate.index import Searcher, build_index, measure_recall, recall_of_pairs
from dinokit.curate.report import ReportData, write_manifest, write_report
from dinokit.curate.settings import STAGES, Config, Seeds
from dinokit.curate.stages import Compute, Share, StageResult, Stages, hash_of_array

Sections = Mapping[str, tuple[Mapping[str, Any] | None, str]]  # by label: a source's section, embeddings
COPIES = ".copies"  # ends the name of embeddings by dedup.weights


def curate(cfg: Config, sections: Sections, rules: Mapping[str, Seeds], stages: Stages) -> dict[str, Any]:
    """Run the stages that are not finished.

    Args:
        cfg: the settings.
        sections: of 'pool', 'seeds.NAME' and 'against.NAME': where images and embeddings are.
        rules: how each set of seeds retrieves, by its name.
        stages: where the files are, and which stages to run.

    Returns:
        The figures of the last stage that was run.

    Raises:
        ValueError, LookupError, OSError: if a stage cannot be run; the files of the stages before it stay.
    """
    run = Curation(cfg, sections, rules, stages)
    order = (
        run.hash, run.embed, run.index, run.neighbours, run.dedup, run.overlap, run.clusters, run.clean_index,
        run.search, run.retrieve, run.manifest, run.report,
    )  # fmt: skip
    for name, stage in zip(STAGES, order, strict=True):
        stage()
        if name == stages.until:
            break
    return {"stage": name, **run.results[name].figures}


class Curation:
    """One curation. Each method is a stage, which needs the stages before it."""

    def __init__(self, cfg: Config, sections: Sections, rules: Mapping[str, Seeds], stages: Stages) -> None:
        self.cfg, self.stages, self.rules, self.token = cfg, stages, rules, cfg.embed.token
        self.sets = {label: ImageSet(label, *section, self.token) for label, section in sections.items()}
        self.pool = self.sets["pool"]
        self.against = [one for label, one in self.sets.items() if label.startswith("against.")]
        self.seeds = {name: self.sets[f"seeds.{name}"] for name in rules}
        self.stamps = {label: one.stamp() for label, one in self.sets.items()}
        computes = any(one.embeddings is None for one in self.sets.values())
        weights = {"": cfg.weights, COPIES: cfg.dedup.weights}
        self.embedders = {
            role: Embedder(name, cfg.embed) for role, name in weights.items() if computes and name
        }
        index = {key: value for key, value in asdict(cfg.index).items() if key not in ("threads", "gpu")}
        self.index_inputs = {**index, "seed": cfg.seed}
        self.results: dict[str, StageResult] = {}

    def hash(self) -> None:
        """Unreadable images, exact and near duplicates."""
        labels = ["pool", *(one.label for one in self.against)]
        keep, bits = self.cfg.dedup.keep, self.cfg.hash.bits
        inputs = {"sets": [self.stamps[label] for label in labels], "bits": bits, "keep": keep}

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            return hash_pool(self.cfg, self.pool, self.against, folder, share)

        self._run("hash", inputs, compute)

    def embed(self) -> None:
        """Embeddings of the images of the pool that are left, of the seeds, and of evaluation images."""
        status = load_status(self._folder("hash"))["status"]
        self.images = {label: np.arange(len(one)) for label, one in self.sets.items()}  # to embed
        self.images["pool"] = np.flatnonzero(status == Status.KEPT)
        stamps = {role: one.stamp() for role, one in self.embedders.items()}
        pool = hash_of_array(self.images["pool"])
        inputs = {"sets": self.stamps, "pool": pool, "token": self.token, **stamps}

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            without = {}
            for label, one in self.sets.items():
                for role in self._roles(label):
                    target = folder / f"{label}{role}"
                    embedder = self.embedders.get(role)
                    without[label] = write_embeddings(embedder, one, self.images[label], target, share)
            rows = {label: len(self.images[label]) - without[label] for label in self.sets}
            computed = [label for label, one in self.sets.items() if one.embeddings is None]
            count = sum(len(self.images[label]) * len(self._roles(label)) for label in computed)
            return {"computed": count, "without_embedding": sum(without.values()), "rows": rows}

        self._run("embed", inputs, compute)

    def index(self) -> None:
        """An index of the pool, for finding duplicates."""

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            searcher = self._build_index(self.embeddings("pool", COPIES).vectors, folder)
            return measure_recall(searcher, self.cfg.dedup.k + 1, self.cfg.seed, folder)

        self._run("index", {**self._after("embed"), **self.index_inputs, "k": self.cfg.dedup.k}, compute)

    def neighbours(self) -> None:
        """All pairs of similar images of the pool."""
        cfg = self.cfg.dedup

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            rows = self.embeddings("pool", COPIES).vectors
            searcher = Searcher(rows, self._folder("index"), self.cfg.index)
            write_edges(searcher, cfg.k, cfg.similarity, folder, share)
            if share.of > 1:
                return {}
            edges = sum(len(some) for some in read_edges(folder, len(rows)))
            return {"edges": edges, **recall_of_pairs(self._folder("index"), cfg.similarity)}

        self._run("neighbours", {**self._after("index"), "k": cfg.k, "similarity": cfg.similarity}, compute)

    def dedup(self) -> None:
        """Groups of duplicates, and the image of each that is kept."""
        largest = self.cfg.dedup.keep == "largest"

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            rows, images = self.embeddings("pool", COPIES), self.images["pool"]
            hashes, edges = self._folder("hash"), self._folder("neighbours")
            return dedup(rows, images, hashes, edges, largest, self.cfg.dedup.similarity, folder)

        self._run("dedup", {**self._after("hash", "neighbours"), "largest": largest}, compute)

    def overlap(self) -> None:
        """Groups of duplicates that show an evaluation image are removed."""
        above = self.cfg.dedup.against

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            by_hash = load_status(self._folder("hash"))["seen"]
            others = {}
            for number, one in enumerate(self.against):
                rows = self.embeddings(one.label, COPIES)
                others[one.label] = self._build_index(rows.vectors, folder / f"index{number}"), rows.images
            pool = self.embeddings("pool", COPIES)
            groups = self._folder("dedup")
            return remove_overlap(pool, others, above, self.cfg.seed, groups, by_hash, folder)

        self._run("overlap", {**self._after("dedup"), "above": above, "sets": len(self.against)}, compute)
        self.status = load_status(self._folder("overlap"))["status"]
        self.clean = self.embeddings("pool").only(self.status == Status.KEPT)
        if not len(self.clean.images):
            raise ValueError(f"No image of the pool is left: {removed_in_words(self.status)}.")

    def clusters(self) -> None:
        """Clusters of the clean pool."""
        inputs = {**asdict(self.cfg.clusters), "seed": self.cfg.seed}

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            pool = self.embeddings("pool")
            return retrieve.cluster_pool(self.cfg, pool, self.clean, len(self.pool), folder)

        self._run("clusters", {**self._after("overlap"), **inputs}, compute)

    def clean_index(self) -> None:
        """An index of the clean pool, for retrieval; none if no seeds search it."""
        candidates = max((r.k * r.reserve for r in self.rules.values() if r.rule == "sample"), default=0)

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            images = {"images": len(self.clean.images)}
            if not candidates:
                return images
            trained = self._folder("index") if COPIES not in self._roles("pool") else None
            searcher = self._build_index(self.clean.vectors, folder, trained)
            return {**images, **measure_recall(searcher, candidates, self.cfg.seed, folder)}

        inputs = {**self._after("overlap"), **self.index_inputs, "candidates": candidates}
        self._run("clean_index", inputs, compute)

    def search(self) -> None:
        """The candidates of every seed with rule=sample."""
        candidates = {name: r.k * r.reserve for name, r in self.rules.items() if r.rule == "sample"}

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            searcher = Searcher(self.clean.vectors, self._folder("clean_index"), self.cfg.index)
            for name, k in candidates.items():
                seeds = self.embeddings(f"seeds.{name}").vectors
                retrieve.search_candidates(searcher, seeds, k, folder / name, share)
            return {"seeds": sum(len(self.seeds[name]) for name in candidates)}

        self._run("search", {**self._after("clean_index"), "candidates": candidates}, compute)

    def retrieve(self) -> None:
        """The images that seeds retrieve, or balance draws, and why."""
        rules = {name: asdict(rule) for name, rule in self.rules.items()}
        inputs = {"rules": rules, "balance": asdict(self.cfg.balance), "seed": self.cfg.seed}

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            seeds = {name: self.embeddings(f"seeds.{name}") for name in self.rules}
            with np.load(self._folder("clusters") / "clusters.npz") as arrays:
                clusters = arrays["cluster"], arrays["centres"]
            pool = retrieve.CleanPool(self.clean, self.status, *clusters, self._folder("search"))
            return retrieve.select_images(self.cfg, self.rules, seeds, pool, folder, self.stages.log)

        self._run("retrieve", {**self._after("clusters", "search"), **inputs}, compute)

    def manifest(self) -> None:
        """manifest.csv."""

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            kept = {n: self.embeddings(f"seeds.{n}").images for n, rule in self.rules.items() if rule.keep}
            selected = np.load(self._folder("retrieve") / "selection.npy")
            origins = retrieve.origins(self.rules)
            return write_manifest(self.stages.out, selected, origins, self.pool, self.seeds, kept, self.rules)

        self._run("manifest", self._after("retrieve"), compute, self.stages.out / "manifest.csv")

    def report(self) -> None:
        """report.html."""
        path = self.stages.out / "report.html"
        figures = {name: result.figures for name, result in self.results.items()}
        folders = {name: result.folder for name, result in self.results.items()}
        data = ReportData(self.cfg, self.sets, retrieve.origins(self.rules), figures, folders)

        def compute(folder: Path, share: Share) -> dict[str, Any]:
            return write_report(path, data)

        self._run("report", {**self._after("manifest"), "gallery": self.cfg.gallery}, compute, path)

    def embeddings(self, label: str, role: str = "") -> Embeddings:
        """The embeddings of a set, for retrieval, or for finding duplicates (role COPIES)."""
        role = role if role in self._roles(label) else ""
        folder = self._folder("embed") / f"{label}{role}"
        return read_embeddings(self.sets[label], self.images[label], folder, self.token)

    def _roles(self, label: str) -> list[str]:
        """Retrieval, and finding duplicates if that has a backbone of its own."""
        both = COPIES in self.embedders and self.sets[label].embeddings is None
        return ["", COPIES] if both and not label.startswith("seeds.") else [""]

    def _build_index(self, vectors: Any, folder: Path, trained: Path | None = None) -> Searcher:
        return build_index(vectors, folder, self.cfg.index, self.cfg.seed, trained)

    def _run(self, name: str, inputs: dict[str, Any], compute: Compute, output: Path | None = None) -> None:
        self.results[name] = self.stages.run(name, inputs, compute, output)

    def _after(self, *names: str) -> dict[str, Any]:
        """The keys of earlier stages, as inputs."""
        return {f"after {name}": self.results[name].key for name in names}

    def _folder(self, name: str) -> Path:
        return self.results[name].folder
