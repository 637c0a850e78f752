"""Questions on pictures, answered by a model that `dinokit instruct` trained on these features.

The pictures are those of dinokit.data.scenes.captioned, drawn when they are asked for. Every answer is
compared as a whole. Next to the right picture, each question is asked with the picture of another question
(shuffled) and with a grey one (blank): what is still right there was known without looking. A group is two
pictures times two questions with four answers, of which a model that reads only the question, or only the
picture, can have two right at most (as in VQA v2, arXiv 1612.00837); it counts where all four are.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dinokit.config.registry import check_at_least
from dinokit.data.scenes.captioned import CaptionedWorld
from dinokit.data.scenes.sentences import FAMILIES, quad
from dinokit.data.talks import MARK, Talk
from dinokit.data.talks.captioned import Captioned
from dinokit.data.talks.captioned import Config as Talks
from dinokit.features import device_of, fingerprint
from dinokit.language.answer import Asker, question
from dinokit.language.model import ABOUT, folder_of, open_model, without_bars
from dinokit.models import Backbone
from dinokit.runtime.distributed import gather_objects, rank, world_size
from dinokit.runtime.log import watch

LONGEST = 16  # tokens of an answer


@dataclass
class Config:
    model: str = ""  # a model of dinokit instruct, or the folder of its run
    blind: str = ""  # another that was trained on grey pictures (stages.NAME.blank=true): text-only
    families: tuple[str, ...] = ()  # of questions; none: all
    count: int = 200  # questions of a family, on test pictures and on novel pairs
    groups: int = 100  # of a family
    size: int = 64  # pixels: the side of the pictures
    seed: int = 0  # of the pictures
    batch: int = 64  # questions that are computed at a time

    def __post_init__(self) -> None:
        check_at_least(self, count=1, groups=0, size=32, seed=0, batch=1)


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
        ' text-only' and ' text-only group'. 'questions' and 'groups' of a family.

    Raises:
        ValueError, LookupError: if there is no model, or it stands on another backbone.
    """
    if not cfg.model:
        raise ValueError("model=RUN must be given: a model that `dinokit instruct` trained on this backbone.")
    families = cfg.families or FAMILIES
    asker = _asker(cfg.model, backbone)
    shown = {"": ("test", False), " shuffled": ("test", False), " blank": ("test", True)}
    rows: dict[str, list[float]] = {}
    for split, ways in (("test", [*shown]), ("novel", [" novel"])):
        items = list(items_of(cfg, families, split))
        for way in ways:
            images = [item.other if way == " shuffled" else item.image for item in items]
            right = _right(cfg, asker, items, images, blank=way == " blank", text=f"{split}{way}")
            _add(rows, way, items, right)
        if split == "test" and cfg.blind:
            blind = _asker(cfg.blind, backbone)
            images = [item.image for item in items]
            _add(rows, " text-only", items, _right(cfg, blind, items, images, True, "text-only"))
    if cfg.groups:
        _add_groups(rows, cfg, families, asker, False, " group")
        if cfg.blind:
            _add_groups(rows, cfg, families, _asker(cfg.blind, backbone), True, " text-only group")
    scores = {name: float(np.mean(values)) for name, values in rows.items()}
    return {**scores, "questions": cfg.count, "groups": cfg.groups}


def items_of(cfg: Config, families: Sequence[str], split: str) -> Iterator[Item]:
    """The questions of a split, family by family; the other picture is that of the next question."""
    for family in families:
        talks = Captioned(
            Talks(size=cfg.size, count=cfg.count, seed=cfg.seed, split=split, families=(family,))  # type: ignore[arg-type]
        )
        found = [talks[number] for number in range(cfg.count)]
        for number, talk in enumerate(found):
            text, answer = (turn.text for turn in talk.turns)
            image, other = (each.images[0] for each in (talk, found[(number + 1) % len(found)]))
            yield Item(family, text, np.asarray(image), np.asarray(other), answer)


def _asker(path: str, backbone: Backbone) -> Asker:
    """A model that stands on this backbone.

    Raises:
        ValueError, LookupError: if there is none, or it stands on another one.
    """
    without_bars()
    folder = folder_of(path)
    facts = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).is_file() else {}
    sizes = {"width": backbone.width, "patch": backbone.patch}  # raw patches have no tensors to compare
    other = any(facts.get(key, value) != value for key, value in sizes.items())
    if other or facts.get("fingerprint") != fingerprint(backbone):
        named = facts.get("backbone") or "nothing that its folder names"
        raise ValueError(
            f"{path} was trained on another backbone than the one that is evaluated: on {named}. Give that "
            f"one as weights= or backbone.name=."
        )
    return Asker(open_model(folder, device_of(backbone)), LONGEST)


def _right(
    cfg: Config, asker: Asker, items: Sequence[Item], images: Sequence[np.ndarray], blank: bool, text: str
) -> list[float]:
    """1 for each item that is answered right, else 0; the processes share the work."""
    places = range(rank(), len(items), world_size())
    talks = [question([images[place]], items[place].text) for place in places]
    answers = _answers(cfg, asker, talks, blank, text)
    own = {place: float(items[place].answer == answer) for place, answer in zip(places, answers, strict=True)}
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
    world = CaptionedWorld(cfg.size, cfg.seed, "test")
    items, images = [], []
    for family in families:
        for number in range(cfg.groups):
            group = quad(world, family, number)
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
