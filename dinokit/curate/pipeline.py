"""A curation from beginning to end; each stage leaves files, and is done once."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.curate import choose
from dinokit.curate.copies import Fate, find_copies, what_went
from dinokit.curate.dedup import dedup, overlap, read_edges, write_edges
from dinokit.curate.embedding import Embedded, Embedder, embed, embedded
from dinokit.curate.index import Searcher, build
from dinokit.curate.manifest import write_manifest
from dinokit.curate.recall import measure, recall_above
from dinokit.curate.report import Shown, write_report
from dinokit.curate.seeds import Config as Seeds
from dinokit.curate.sets import ImageSet
from dinokit.curate.settings import STAGES, Config
from dinokit.curate.stages import Done, Share, Stages, Work, digest

Sections = Mapping[str, tuple[Mapping[str, Any] | None, str]]  # by label: a source's section, embeddings


def curate(cfg: Config, sections: Sections, rules: Mapping[str, Seeds], stages: Stages) -> dict[str, Any]:
    """Do what is left to do.

    Args:
        cfg: the settings.
        sections: of 'pool', 'seeds.NAME' and 'against.NAME': where images and embeddings are.
        rules: how each set of seeds retrieves, by its name.
        stages: where files go, and what to do of it.

    Returns:
        The figures of the last stage that was done.

    Raises:
        ValueError, LookupError, OSError: for what cannot be done; what was done stays.
    """
    run = Curation(cfg, sections, rules, stages)
    order = (
        run.hash, run.embed, run.index, run.neighbours, run.dedup, run.overlap, run.clusters, run.survivors,
        run.search, run.retrieve, run.manifest, run.report,
    )  # fmt: skip
    for name, stage in zip(STAGES, order, strict=True):
        stage()
        if name == stages.until:
            break
    return {"stage": name, **run.done[name].figures}


class Curation:
    """One curation; each method is a stage, which needs those above it done."""

    def __init__(self, cfg: Config, sections: Sections, rules: Mapping[str, Seeds], stages: Stages) -> None:
        self.cfg, self.stages, self.rules, self.token = cfg, stages, rules, cfg.embed.token
        self.sets = {label: ImageSet(label, *section, self.token) for label, section in sections.items()}
        self.pool = self.sets["pool"]
        self.against = [one for label, one in self.sets.items() if label.startswith("against.")]
        self.seeds = {name: self.sets[f"seeds.{name}"] for name in rules}
        self.stamps = {label: one.stamp() for label, one in self.sets.items()}
        bare = any(one.given is None for one in self.sets.values())
        weights = {"": cfg.weights, ".copies": cfg.dedup.weights}
        self.embedders = {role: Embedder(name, cfg.embed) for role, name in weights.items() if bare and name}
        index = {key: v for key, v in asdict(cfg.index).items() if key not in ("threads", "gpu")}
        self.index_inputs = {**index, "seed": cfg.seed}
        self.done: dict[str, Done] = {}

    def hash(self) -> None:
        """Unreadable images, exact and near-exact copies."""
        labels = ["pool", *(one.label for one in self.against)]
        keep, bits = self.cfg.dedup.keep, self.cfg.hash.bits
        inputs = {"sets": [self.stamps[label] for label in labels], "bits": bits, "keep": keep}

        def work(folder: Path, share: Share) -> dict[str, Any]:
            return find_copies(self.cfg, self.pool, self.against, folder, share)

        self._do("hash", inputs, work)

    def embed(self) -> None:
        """Embeddings of what is left of the pool, of the seeds, and of evaluation images."""
        fate = np.load(self._folder("hash") / "fate.npz")["fate"]
        self.places = {label: np.arange(len(one)) for label, one in self.sets.items()}
        self.places["pool"] = np.flatnonzero(fate == Fate.KEPT)
        stamps = {role: one.stamp() for role, one in self.embedders.items()}
        inputs = {"sets": self.stamps, "pool": digest(self.places["pool"]), "token": self.token, **stamps}

        def work(folder: Path, share: Share) -> dict[str, Any]:
            lost = {}
            for label, one in self.sets.items():
                for role in self._roles(label):
                    where = folder / f"{label}{role}"
                    lost[label] = embed(self.embedders.get(role), one, self.places[label], where, share)
            rows = {label: len(self.places[label]) - lost[label] for label in self.sets}
            bare = [label for label, one in self.sets.items() if one.given is None]
            computed = sum(len(self.places[label]) * len(self._roles(label)) for label in bare)
            return {"computed": computed, "without_embedding": sum(lost.values()), "rows": rows}

        self._do("embed", inputs, work)

    def index(self) -> None:
        """The index of the pool, for finding copies."""

        def work(folder: Path, share: Share) -> dict[str, Any]:
            searcher = self._build(self.embedded("pool", ".copies").vectors, folder)
            return measure(searcher, self.cfg.dedup.k + 1, self.cfg.seed, folder)

        self._do("index", {**self._after("embed"), **self.index_inputs, "k": self.cfg.dedup.k}, work)

    def neighbours(self) -> None:
        """All pairs of the pool that are alike."""
        cut = self.cfg.dedup

        def work(folder: Path, share: Share) -> dict[str, Any]:
            rows = self.embedded("pool", ".copies").vectors
            searcher = Searcher(rows, self._folder("index"), self.cfg.index)
            write_edges(searcher, cut.k, cut.similarity, folder, share)
            if share.of > 1:
                return {}
            edges = sum(len(part) for part in read_edges(folder, len(rows)))
            return {"edges": edges, **recall_above(self._folder("index"), cut.similarity)}

        self._do("neighbours", {**self._after("index"), "k": cut.k, "similarity": cut.similarity}, work)

    def dedup(self) -> None:
        """Groups of copies, and the one of each that stays."""
        largest = self.cfg.dedup.keep == "largest"

        def work(folder: Path, share: Share) -> dict[str, Any]:
            rows, asked = self.embedded("pool", ".copies"), self.places["pool"]
            hashed, edges = self._folder("hash"), self._folder("neighbours")
            return dedup(rows, asked, hashed, edges, largest, self.cfg.dedup.similarity, folder)

        self._do("dedup", {**self._after("hash", "neighbours"), "largest": largest}, work)

    def overlap(self) -> None:
        """Groups that show an evaluation image go."""
        above = self.cfg.dedup.against

        def work(folder: Path, share: Share) -> dict[str, Any]:
            seen = np.load(self._folder("hash") / "fate.npz")["seen"]
            others = {}
            for number, one in enumerate(self.against):
                rows = self.embedded(one.label, ".copies")
                others[one.label] = self._build(rows.vectors, folder / f"index{number}"), rows.images
            pool = self.embedded("pool", ".copies")
            return overlap(pool, others, above, self.cfg.seed, self._folder("dedup"), seen, folder)

        self._do("overlap", {**self._after("dedup"), "above": above, "sets": len(self.against)}, work)
        self.fate = np.load(self._folder("overlap") / "fate.npz")["fate"]
        self.left = self.embedded("pool").only(self.fate == Fate.KEPT)
        if not len(self.left.images):
            raise ValueError(f"Nothing of the pool is left: {what_went(self.fate)}.")

    def clusters(self) -> None:
        """Clusters of what is left."""
        inputs = {**asdict(self.cfg.clusters), "seed": self.cfg.seed}

        def work(folder: Path, share: Share) -> dict[str, Any]:
            return choose.clusters(self.cfg, self.embedded("pool"), self.left, len(self.pool), folder)

        self._do("clusters", {**self._after("overlap"), **inputs}, work)

    def survivors(self) -> None:
        """The index of what is left, for retrieval; none if no seeds search it."""
        wide = max((r.k * r.reserve for r in self.rules.values() if r.rule == "sample"), default=0)

        def work(folder: Path, share: Share) -> dict[str, Any]:
            if not wide:
                return {"images": len(self.left.images)}
            trained = self._folder("index") if ".copies" not in self._roles("pool") else None
            searcher = self._build(self.left.vectors, folder, trained)
            return {"images": len(self.left.images), **measure(searcher, wide, self.cfg.seed, folder)}

        self._do("survivors", {**self._after("overlap"), **self.index_inputs, "wide": wide}, work)

    def search(self) -> None:
        """The candidates of every seed with rule=sample."""
        wide = {name: r.k * r.reserve for name, r in self.rules.items() if r.rule == "sample"}

        def work(folder: Path, share: Share) -> dict[str, Any]:
            searcher = Searcher(self.left.vectors, self._folder("survivors"), self.cfg.index)
            for name, k in wide.items():
                choose.search(searcher, self.embedded(f"seeds.{name}").vectors, k, folder / name, share)
            return {"seeds": sum(len(self.seeds[name]) for name in wide)}

        self._do("search", {**self._after("survivors"), "wide": wide}, work)

    def retrieve(self) -> None:
        """Which images the seeds bring, or balance draws, and why."""
        rules = {name: asdict(rule) for name, rule in self.rules.items()}
        inputs = {"rules": rules, "balance": asdict(self.cfg.balance), "seed": self.cfg.seed}

        def work(folder: Path, share: Share) -> dict[str, Any]:
            seeds = {name: self.embedded(f"seeds.{name}") for name in self.rules}
            with np.load(self._folder("clusters") / "clusters.npz") as said:
                clusters = said["cluster"], said["centres"]
            known = choose.Known(self.left, self.fate, *clusters, self._folder("search"))
            return choose.choose(self.cfg, self.rules, seeds, known, folder, self.stages.told)

        self._do("retrieve", {**self._after("clusters", "search"), **inputs}, work)

    def manifest(self) -> None:
        """manifest.csv."""

        def work(folder: Path, share: Share) -> dict[str, Any]:
            kept = {n: self.embedded(f"seeds.{n}").images for n, rule in self.rules.items() if rule.keep}
            picks, origins = np.load(self._folder("retrieve") / "picks.npy"), choose.origins(self.rules)
            return write_manifest(self.stages.out, picks, origins, self.pool, self.seeds, kept, self.rules)

        self._do("manifest", self._after("retrieve"), work, self.stages.out / "manifest.csv")

    def report(self) -> None:
        """report.html."""
        path = self.stages.out / "report.html"
        figures = {name: one.figures for name, one in self.done.items()}
        folders = {name: one.folder for name, one in self.done.items()}

        def work(folder: Path, share: Share) -> dict[str, Any]:
            return write_report(
                path, Shown(self.cfg, self.sets, choose.origins(self.rules), figures, folders)
            )

        self._do("report", {**self._after("manifest"), "gallery": self.cfg.gallery}, work, path)

    def embedded(self, label: str, role: str = "") -> Embedded:
        """The embeddings of a set, for retrieval, or for finding copies (role '.copies')."""
        role = role if role in self._roles(label) else ""
        return embedded(
            self.sets[label], self.places[label], self._folder("embed") / f"{label}{role}", self.token
        )

    def _roles(self, label: str) -> list[str]:
        """Retrieval, and copy detection where it has a backbone of its own."""
        both = ".copies" in self.embedders and self.sets[label].given is None
        return ["", ".copies"] if both and not label.startswith("seeds.") else [""]

    def _build(self, vectors: Any, folder: Path, trained: Path | None = None) -> Searcher:
        return build(vectors, folder, self.cfg.index, self.cfg.seed, trained)

    def _do(self, name: str, inputs: dict[str, Any], work: Work, makes: Path | None = None) -> None:
        self.done[name] = self.stages.do(name, inputs, work, makes)

    def _after(self, *names: str) -> dict[str, Any]:
        return {f"after {name}": self.done[name].key for name in names}

    def _folder(self, name: str) -> Path:
        return self.done[name].folder
