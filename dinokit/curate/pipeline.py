"""A whole curation, from a pool of images to manifest.csv and report.html, in twelve stages.

Every file is written atomically, so it is complete or absent, and a stage computes only the files that are
absent. `done.json` is written last and marks the stage as finished: it is never run again.

    OUT/stages/NAME.KEY/...          the files of a stage
    OUT/stages/NAME.KEY/done.json    its inputs and figures

KEY is a hash of the settings and inputs that the result depends on, with the keys of the stages before it. So
changed settings start a new folder for this stage and the stages that depend on it, and for no other.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinokit.curate import retrieve
from dinokit.curate.browse import write_clusters
from dinokit.curate.dedup import (
    Status,
    group_duplicates,
    load_status,
    read_edges,
    remove_overlap,
    removed_in_words,
    write_edges,
)
from dinokit.curate.hashing import hash_pool
from dinokit.curate.image_sets import (
    Embedder,
    Embeddings,
    ImageSet,
    key_of,
    read_embeddings,
    write_embeddings,
)
from dinokit.curate.index import Searcher, build_index, measure_recall, recall_of_pairs
from dinokit.curate.report import ReportData, in_words, write_manifest, write_report
from dinokit.curate.settings import OLD_STAGES, STAGES, WHOLE, Config, Seeds, Share
from dinokit.runtime.files import TEMPORARY, remove, write_text

Sections = Mapping[str, tuple[Mapping[str, Any] | None, str]]  # by label: a source's section, embeddings
Figures = dict[str, Any]  # of a stage; a sentence under the key `note` is printed on a line of its own
COPIES = ".copies"  # ends the name of embeddings by dedup.weights


class Stage(NamedTuple):
    """A stage that can be run."""

    name: str
    compute: Callable[[Path], Figures]  # writes the files of this process's share into the folder
    inputs: Mapping[str, Any]  # everything that the result depends on, as JSON
    output: Path | None = None  # a file outside of the folder; without it the stage is not finished


def curate(
    cfg: Config,
    sections: Sections,
    rules: Mapping[str, Seeds],
    log: Callable[[str], None],
    until: str = STAGES[-1],
    share: Share = WHOLE,
) -> Figures:
    """Run the stages that are not finished.

    Args:
        cfg: the settings.
        sections: of 'pool', 'seeds.NAME' and 'against.NAME': where images and embeddings are.
        rules: how each set of seeds retrieves, by its name.
        log: takes lines for the screen.
        until: the last stage to run.
        share: the share of that stage to compute; the stages before it must be finished.

    Returns:
        The figures of the last stage that was run.

    Raises:
        ValueError, LookupError, OSError: if a stage cannot be run; the files of the stages before it stay.
    """
    run = Curation(cfg, sections, rules, log, share)
    for stage in run.stages():
        if share.of > 1 and stage.name != until and not run.is_finished(stage):
            raise ValueError(
                f"part= of the stage '{until}' needs the stage '{stage.name}', which is not finished. First "
                f"run the same command with stage={stage.name} and without part."
            )
        run.finish(stage)
        if stage.name == until:
            break
    return {"stage": stage.name, **run.figures[stage.name]}


class Curation:
    """One curation: its sets of images, and the folder, key and figures of each stage that was run."""

    def __init__(
        self,
        cfg: Config,
        sections: Sections,
        rules: Mapping[str, Seeds],
        log: Callable[[str], None],
        share: Share,
    ) -> None:
        self.cfg, self.rules, self.log, self.share = cfg, rules, log, share
        self.out = Path(cfg.out)
        self.sets = {label: ImageSet(label, *section, cfg.embed.token) for label, section in sections.items()}
        self.pool = self.sets["pool"]
        self.against = [one for label, one in self.sets.items() if label.startswith("against.")]
        self.seeds = {name: self.sets[f"seeds.{name}"] for name in rules}
        computes = any(one.embeddings is None for one in self.sets.values())
        weights = {"": cfg.weights, COPIES: cfg.dedup.weights}
        self.embedders = {
            role: Embedder(name, cfg.embed) for role, name in weights.items() if computes and name
        }
        # The number of candidates of each seed, for the sets of seeds with rule=sample.
        self.candidates = {name: r.k * r.reserve for name, r in rules.items() if r.rule == "sample"}
        self.folders: dict[str, Path] = {}
        self.keys: dict[str, str] = {}
        self.figures: dict[str, Figures] = {}

    def stages(self) -> Iterator[Stage]:
        """The stages in the order of STAGES. Each needs those before it to be finished."""
        cfg, seed, after = self.cfg, {"seed": self.cfg.seed}, self._keys_of
        index = {key: value for key, value in asdict(cfg.index).items() if key not in ("threads", "gpu")}
        stamps = {label: one.stamp() for label, one in self.sets.items()}
        hashed = [stamps[one.label] for one in (self.pool, *self.against)]
        yield Stage("hash", self.hash, {"sets": hashed, "bits": cfg.hash.bits, "keep": cfg.dedup.keep})
        self.images = {label: np.arange(len(one)) for label, one in self.sets.items()}  # to embed
        self.images["pool"] = np.flatnonzero(load_status(self.folders["hash"])["status"] == Status.CLEAN)
        pool = sha256(self.images["pool"].data).hexdigest()[:16]
        embedders = {role: one.stamp() for role, one in self.embedders.items()}
        yield Stage(
            "embed", self.embed, {"sets": stamps, "pool": pool, "token": cfg.embed.token, **embedders}
        )
        yield Stage("index", self.index, {**after("embed"), **index, **seed, "k": cfg.dedup.k})
        pairs = {"k": cfg.dedup.k, "similarity": cfg.dedup.similarity}
        yield Stage("neighbours", self.neighbours, {**after("index"), **pairs})
        largest = {"largest": cfg.dedup.keep == "largest"}
        yield Stage("dedup", self.dedup, {**after("hash", "neighbours"), **largest})
        shown = {"above": cfg.dedup.against, "sets": len(self.against)}
        yield Stage("overlap", self.overlap, {**after("dedup"), **shown})
        self.status = load_status(self.folders["overlap"])["status"]
        self.clean = self.embeddings("pool").only(self.status == Status.CLEAN)
        if not len(self.clean.images):
            raise ValueError(f"No image of the pool is left: {removed_in_words(self.status)}.")
        yield Stage("clusters", self.clusters, {**after("overlap"), **asdict(cfg.clusters), **seed})
        most = {"candidates": max(self.candidates.values(), default=0)}
        yield Stage("clean_index", self.clean_index, {**after("overlap"), **index, **seed, **most})
        yield Stage("search", self.search, {**after("clean_index"), "candidates": self.candidates})
        rules = {name: asdict(rule) for name, rule in self.rules.items()}
        selection = {"rules": rules, "balance": asdict(cfg.balance), **seed}
        yield Stage("retrieve", self.retrieve, {**after("clusters", "search"), **selection})
        yield Stage("manifest", self.manifest, after("retrieve"), self.out / "manifest.csv")
        gallery = {"gallery": cfg.gallery}
        yield Stage("report", self.report, {**after("manifest"), **gallery}, self.out / "report.html")

    def hash(self, folder: Path) -> Figures:
        """Unreadable images, exact and near duplicates."""
        return hash_pool(self.cfg, self.pool, self.against, folder, self.share)

    def embed(self, folder: Path) -> Figures:
        """Embeddings of the images of the pool that are left, of the seeds, and of evaluation images."""
        rows, computed, without_embedding = {}, 0, 0
        for label, one in self.sets.items():
            for role in self._roles(label):
                embedder, target = self.embedders.get(role), folder / f"{label}{role}"
                without = write_embeddings(embedder, one, self.images[label], target, self.share)
                computed += len(self.images[label]) * (one.embeddings is None)
            rows[label] = len(self.images[label]) - without
            without_embedding += without
        return {"computed": computed, "without_embedding": without_embedding, "rows": rows}

    def index(self, folder: Path) -> Figures:
        """An index of the pool, for finding duplicates."""
        vectors = self.embeddings("pool", COPIES).vectors
        searcher = build_index(vectors, folder, self.cfg.index, self.cfg.seed)
        return measure_recall(searcher, self.cfg.dedup.k + 1, self.cfg.seed, folder)

    def neighbours(self, folder: Path) -> Figures:
        """All pairs of similar images of the pool."""
        cfg, vectors = self.cfg.dedup, self.embeddings("pool", COPIES).vectors
        searcher = Searcher(vectors, self.folders["index"], self.cfg.index)
        write_edges(searcher, cfg.k, cfg.similarity, folder, self.share)
        if self.share.of > 1:
            return {}
        edges = sum(len(some) for some in read_edges(folder, len(vectors)))
        return {"edges": edges, **recall_of_pairs(self.folders["index"], cfg.similarity)}

    def dedup(self, folder: Path) -> Figures:
        """Groups of duplicates, and the image of each that stays."""
        pool, hashes = self.embeddings("pool", COPIES), load_status(self.folders["hash"])
        edges = read_edges(self.folders["neighbours"], len(pool.images))
        return group_duplicates(pool, self.images["pool"], hashes, edges, self.cfg.dedup, folder)

    def overlap(self, folder: Path) -> Figures:
        """Groups of duplicates that show an evaluation image are removed."""
        others = {}
        for number, one in enumerate(self.against):
            rows = self.embeddings(one.label, COPIES)
            index = build_index(rows.vectors, folder / f"index{number}", self.cfg.index, self.cfg.seed)
            others[one.label] = index, rows.images
        pool, by_hash = self.embeddings("pool", COPIES), load_status(self.folders["hash"])["seen"]
        groups = load_status(self.folders["dedup"], "groups.npz")
        return remove_overlap(pool, others, self.cfg.dedup.against, self.cfg.seed, groups, by_hash, folder)

    def clusters(self, folder: Path) -> Figures:
        """Clusters of the clean pool."""
        return retrieve.cluster_pool(self.cfg, self.embeddings("pool"), self.clean, len(self.pool), folder)

    def clean_index(self, folder: Path) -> Figures:
        """An index of the clean pool, for retrieval; none if no seeds search it."""
        images = {"images": len(self.clean.images)}
        if not self.candidates:
            return images
        trained = self.folders["index"] if COPIES not in self._roles("pool") else None
        searcher = build_index(self.clean.vectors, folder, self.cfg.index, self.cfg.seed, trained)
        most = max(self.candidates.values())
        return {**images, **measure_recall(searcher, most, self.cfg.seed, folder)}

    def search(self, folder: Path) -> Figures:
        """The candidates of every seed with rule=sample."""
        searcher = Searcher(self.clean.vectors, self.folders["clean_index"], self.cfg.index)
        for name, k in self.candidates.items():
            seeds = self.embeddings(f"seeds.{name}").vectors
            retrieve.write_candidates(searcher, seeds, k, folder / name, self.share)
        return {"seeds": sum(len(self.seeds[name]) for name in self.candidates)}

    def retrieve(self, folder: Path) -> Figures:
        """The images that seeds retrieve, or balance draws, and why."""
        seeds = {name: self.embeddings(f"seeds.{name}") for name in self.rules}
        with np.load(self.folders["clusters"] / "clusters.npz") as arrays:
            clusters = arrays["cluster"], arrays["centres"]
        pool = retrieve.CleanPool(self.clean, self.status, *clusters, self.folders["search"])
        return retrieve.select_images(self.cfg, self.rules, seeds, pool, folder, self.log)

    def manifest(self, folder: Path) -> Figures:
        """manifest.csv."""
        included = {n: self.embeddings(f"seeds.{n}").images for n, rule in self.rules.items() if rule.keep}
        selected = np.load(self.folders["retrieve"] / "selection.npy")
        return write_manifest(self.out, selected, self.pool, self.seeds, included, self.rules)

    def report(self, folder: Path) -> Figures:
        """report.html, clusters.csv and the sheets of clusters."""
        data = ReportData(self.cfg, self.sets, retrieve.origins(self.rules), self.figures, self.folders)
        cluster = np.load(self.folders["clusters"] / "clusters.npz")["cluster"]
        selected = np.load(self.folders["retrieve"] / "selection.npy")["image"]
        embedded = self.embeddings("pool")
        search = len(embedded.images) <= self.cfg.index.exact_below
        sheets = write_clusters(self.out, self.pool, embedded, self.status, cluster, selected, search)
        return {**write_report(self.out / "report.html", data), **sheets}

    def embeddings(self, label: str, role: str = "") -> Embeddings:
        """The embeddings of a set, for retrieval, or for finding duplicates (role COPIES)."""
        role = role if role in self._roles(label) else ""
        folder = self.folders["embed"] / f"{label}{role}"
        return read_embeddings(self.sets[label], self.images[label], folder, self.cfg.embed.token)

    def _roles(self, label: str) -> list[str]:
        """Retrieval, and finding duplicates if that has a backbone of its own."""
        both = COPIES in self.embedders and self.sets[label].embeddings is None
        return ["", COPIES] if both and not label.startswith("seeds.") else [""]

    def _keys_of(self, *names: str) -> dict[str, str]:
        """The keys of earlier stages, as inputs."""
        return {f"after {name}": self.keys[name] for name in names}

    def is_finished(self, stage: Stage) -> bool:
        """Whether the stage has nothing left to compute."""
        marker = self._folder(stage) / "done.json"
        return marker.exists() and (stage.output is None or stage.output.exists())

    def finish(self, stage: Stage) -> None:
        """Compute the stage unless it is finished, and note its folder, key and figures."""
        folder = self._folder(stage)
        marker, self.folders[stage.name], self.keys[stage.name] = (
            folder / "done.json",
            folder,
            folder.suffix[1:],
        )
        if not self.is_finished(stage):
            share = f"part {self.share.number} of {self.share.of}" if self.share.of > 1 else ""
            start = time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            if stage.output is not None:  # it is replaced: no other settings may pass for finished by it
                self._remove_old(stage.name, folder)
            self.log(f"{stage.name} ... {share}")
            figures = stage.compute(folder)
            if share:
                self.figures[stage.name] = {"part": share}
                return
            figures = {**figures, "seconds": round(time.monotonic() - start, 2)}
            content = {"inputs": stage.inputs, "figures": figures}
            write_text(marker, json.dumps(content, indent=1, default=str) + "\n")
            self._remove_old(stage.name, folder)
        figures = self.figures[stage.name] = json.loads(marker.read_text(encoding="utf-8"))["figures"]
        self.log(f"{stage.name}: {in_words({key: figures[key] for key in figures if key != 'note'})}")
        if "note" in figures:
            self.log(f"    {figures['note']}")

    def _folder(self, stage: Stage) -> Path:
        return self.out / "stages" / f"{stage.name}.{key_of(stage.inputs)}"

    def _remove_old(self, name: str, current: Path) -> None:
        """Remove the stage's results of other settings, and temporary files of processes that were killed."""
        for each in (name, *(old for old, new in OLD_STAGES.items() if new == name)):
            for folder in current.parent.glob(f"{each}.*"):
                if folder != current:
                    remove(folder)
        for temporary in (*current.parent.glob(TEMPORARY), *current.rglob(TEMPORARY)):
            remove(temporary)
