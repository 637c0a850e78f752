"""Questions on pictures, answered by a model that `dinokit instruct` trained on these features.

The pictures are those of dinokit.data.scenes.captioned, drawn when they are asked for. Every answer is
compared as a whole; a box is right if its overlap (IoU) with the true one is above 0.5. Next to the right
picture, each question is asked with the picture of another question (shuffled) and with a grey one (blank):
what is still right there was known without looking. A group is two pictures times two questions with four
answers, of which a model that reads only the question, or only the picture, can have two right at most (as in
VQA v2, arXiv 1612.00837); it counts where all four are. Models on other backbones (untrained, raw pixels)
answer the same questions in columns of their own.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dinokit.config.registry import check_at_least
from dinokit.data.boxes import Box, box_in, box_iou
from dinokit.data.scenes.captioned import CaptionedWorld
from dinokit.data.scenes.regions import group_of
from dinokit.data.scenes.sentences import FAMILIES
from dinokit.data.talks import MARK, Talk
from dinokit.data.talks.captioned import Captioned
from dinokit.data.talks.captioned import Config as Talks
from dinokit.features import device_of, fingerprint
from dinokit.language.answer import Asker, question
from dinokit.language.model import ABOUT, folder_of, open_model, without_bars
from dinokit.models import Backbone
from dinokit.runtime.distributed import gather_objects, rank, world_size
from dinokit.runtime.log import watch

LONGEST, OF_BOX = 16, 40  # tokens of an answer; of a box, where a word is in parts
OVERLAP = 0.5  # IoU above which a box is right, as RefCOCO counts


@dataclass
class Config:
    model: str = ""  # a model of dinokit instruct, or the folder of its run
    blind: str = ""  # another that was trained on grey pictures (stages.NAME.blank=true): text-only
    beside: dict[str, str] = field(default_factory=dict)  # by name: models on other backbones, each a column
    families: tuple[str, ...] = ()  # of questions; none: all but ground and point, which are about boxes
    count: int = 200  # questions of a family, on test pictures and on novel pairs
    groups: int = 100  # of a family
    size: int = 64  # pixels: the side of the pictures
    truth: bool = False  # show codes in place of pictures, as data.truth of a model that was trained on them
    seed: int = 0  # of the pictures
    batch: int = 64  # questions that are computed at a time

    def __post_init__(self) -> None:
        check_at_least(self, count=1, groups=0, size=32, seed=0, batch=1)
        taken = sorted({"shuffled", "blank", "novel", "group", "text-only", "centre"} & set(self.beside))
        if taken:
            raise ValueError(f"beside.{taken[0]}: there is a column '{taken[0]}'. Give it another name.")


@dataclass
class Item:
    """A question, its picture, the picture of another question, and the answer."""

    family: str
    text: str
    image: np.ndarray  # (S, S, 3) uint8
    other: np.ndarray
    answer: str


def evaluate(cfg: Config, backbone: Backbone) -> dict[str, float]:
    """The share of right answers.

    Returns:
        'all' and each family, the first over all families; each also with ' shuffled', ' blank', ' novel' (a
        pair of colour and outline that training never shows) and, with groups, ' group'; with `blind`
        ' text-only' and ' text-only group', and with `beside` the same of each name. 'ground centre' is a box
        of mean size in the middle of every picture. 'questions' and 'groups' of a family.

    Raises:
        ValueError, LookupError: if there is no model, or it stands on another backbone.
    """
    if not cfg.model:
        raise ValueError("model=RUN must be given: a model that `dinokit instruct` trained on this backbone.")
    families, rows = cfg.families or FAMILIES, dict[str, list[float]]()
    for path in filter(None, (cfg.blind, *cfg.beside.values())):
        folder_of(path)
    asker = _asker(cfg, cfg.model, backbone)
    items, novel = ([*items_of(cfg, families, split)] for split in ("test", "novel"))
    images = [item.image for item in items]
    others = [item.other for item in items]
    for way, shown in {"": images, " shuffled": others, " blank": images}.items():
        _add(rows, way, items, _right(cfg, asker, items, shown, way == " blank", f"test{way}"))
    _add(rows, " novel", novel, _right(cfg, asker, novel, [item.image for item in novel], False, "novel"))
    _add_groups(rows, cfg, families, asker, False, " group")
    more = {"text-only": (cfg.blind, True)} if cfg.blind else {}
    more |= {name: (path, False) for name, path in cfg.beside.items()}
    for name, (path, blank) in more.items():
        asker = _asker(cfg, path, backbone, same=blank)
        _add(rows, f" {name}", items, _right(cfg, asker, items, images, blank, name))
        _add_groups(rows, cfg, families, asker, blank, f" {name} group")
    rows |= _centre([item.answer for item in items if item.family == "ground"])
    scores = {name: float(np.mean(values)) for name, values in rows.items()}
    return {**scores, "questions": cfg.count, "groups": cfg.groups}


def is_right(answer: str, said: str) -> bool:
    """Whether what was said is the answer: the same text, or a box that overlaps that of the answer."""
    box, found = box_in(answer), box_in(said)
    return answer == said if box is None else found is not None and box_iou(box, found) > OVERLAP


def _centre(answers: Sequence[str]) -> dict[str, list[float]]:
    """What a box in the middle has, of the mean size of all; nothing without boxes."""
    boxes = [box for box in map(box_in, answers) if box]
    if not boxes:
        return {}
    left, top, right, bottom = np.mean(boxes, axis=0).tolist()
    across, down = (right - left) / 2, (bottom - top) / 2
    middle: Box = (0.5 - across, 0.5 - down, 0.5 + across, 0.5 + down)
    return {"ground centre": [float(box_iou(box, middle) > OVERLAP) for box in boxes]}


def items_of(cfg: Config, families: Sequence[str], split: str) -> Iterator[Item]:
    """The questions of a split, family by family; the other picture is that of the next question."""
    for family in families:
        settings = {"size": cfg.size, "count": cfg.count, "seed": cfg.seed, "truth": cfg.truth}
        talks = Captioned(Talks(split=split, families=(family,), **settings))  # type: ignore[arg-type]
        found = [talks[number] for number in range(cfg.count)]
        for number, talk in enumerate(found):
            text, answer = (turn.text for turn in talk.turns)
            image, other = (each.images[0] for each in (talk, found[(number + 1) % len(found)]))
            yield Item(family, text, np.asarray(image), np.asarray(other), answer)


def _asker(cfg: Config, path: str, backbone: Backbone, same: bool = True) -> Asker:
    """A model; with `same` one that stands on this backbone.

    Raises:
        ValueError, LookupError: if there is none, or it stands on another one.
    """
    without_bars()
    folder = folder_of(path)
    facts = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).is_file() else {}
    sizes = {"width": backbone.width, "patch": backbone.patch}  # raw patches have no tensors to compare
    other = any(facts.get(key, value) != value for key, value in sizes.items())
    if same and (other or facts.get("fingerprint") != fingerprint(backbone)):
        named = facts.get("backbone") or "nothing that its folder names"
        raise ValueError(
            f"{path} was trained on another backbone than the one that is evaluated: on {named}. Give that "
            f"one as weights= or backbone.name=."
        )
    longest = OF_BOX if "ground" in cfg.families else LONGEST
    return Asker(open_model(folder, device_of(backbone)), longest)


def _right(
    cfg: Config, asker: Asker, items: Sequence[Item], images: Sequence[np.ndarray], blank: bool, text: str
) -> list[float]:
    """1 for each item that is answered right, else 0; the processes share the work."""
    places = range(rank(), len(items), world_size())
    key = f"a question of '{text}'"
    talks = [question([images[place]], items[place].text, key) for place in places]
    answers = _answers(cfg, asker, talks, blank, text)
    own = {
        place: float(is_right(items[place].answer, answer))
        for place, answer in zip(places, answers, strict=True)
    }
    together = {place: value for each in gather_objects(own) for place, value in each.items()}
    return [together[place] for place in range(len(items))]


def _answers(cfg: Config, asker: Asker, talks: Sequence[Talk], blank: bool, text: str) -> list[str]:
    starts = range(0, len(talks), cfg.batch)
    found: list[str] = []
    for first in watch(starts, len(starts), f"batches, {text}"):
        found += asker.answers(talks[first : first + cfg.batch], cfg.batch, blank)
    return found


def _add(rows: dict[str, list[float]], way: str, items: Sequence[Item], right: Sequence[float]) -> None:
    for item, value in zip(items, right, strict=True):
        rows.setdefault(f"all{way}", []).append(value)
        rows.setdefault(f"{item.family}{way}", []).append(value)


def _add_groups(
    rows: dict[str, list[float]], cfg: Config, families: Sequence[str], asker: Asker, blank: bool, way: str
) -> None:
    """The share of groups with four right answers."""
    world = CaptionedWorld(cfg.size, cfg.seed, "test", truth=cfg.truth)
    items, images = [], []
    for family in families:
        for number in range(cfg.groups):
            group = group_of(world, family, number)
            for board, answers in zip(group.boards, group.answers, strict=True):
                image = world.draw(board).image
                for text, answer in zip(group.questions, answers, strict=True):
                    items.append(Item(family, f"{MARK} {text}", image, image, answer))
                    images.append(image)
    right = _right(cfg, asker, items, images, blank, way.strip())
    for first in range(0, len(items), 4):
        value = float(all(right[first : first + 4]))
        rows.setdefault(f"all{way}", []).append(value)
        rows.setdefault(f"{items[first].family}{way}", []).append(value)
