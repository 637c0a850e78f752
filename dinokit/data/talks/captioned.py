"""Built-in questions on pictures of a few things (dinokit.data.scenes.captioned), one question a picture.

Several questions about one picture would answer each other: after "where is the red star" nobody has to look
for the colour of the star. Families come by turns, and a share of the talks asks for a description instead.
The families `ground` and `point` ask for the box of a thing, and for the thing in a box.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from dinokit.config.registry import check_at_least
from dinokit.data.scenes.captioned import Board, CaptionedWorld
from dinokit.data.scenes.regions import REGIONS, group_of, question_of
from dinokit.data.scenes.sentences import FAMILIES, describe
from dinokit.data.talks import MARK, Talk, Turn
from dinokit.runtime.launch import digest

REQUEST = "describe the picture"  # of a talk whose answer names all things
ATTEMPTS = 1_000  # boards that are tried for a question of a family
_STREAM = 97  # of random numbers, beside those of the world
_SPLITS = ("train", "test", "novel")


@dataclass
class Config:
    size: int = 64  # pixels: the side of the pictures
    count: int = 1_000_000  # talks; nothing is stored
    seed: int = 0
    # novel: with pairs of colour and outline that are never in the other two
    split: Literal["train", "test", "novel"] = "train"
    things: tuple[int, int] = (1, 4)  # least and most in a picture
    # of questions: colour, shape, count, where, exist, relation, ground, point; none: all but the last two,
    # whose answers and questions are boxes
    families: tuple[str, ...] = ()
    captions: float = 0.0  # share of talks that ask for a description
    # share of the questions that come from groups of two pictures with exchanged things: only who sees which
    # colour belongs to which outline answers them
    groups: float = 0.0
    # show the colour, outline and size of each cell as black and white squares in place of the picture, to
    # see what a model answers that sees all: size must be a multiple of 18
    truth: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, size=32, count=1, seed=0, captions=0, groups=0)
        for key, share in {"captions": self.captions, "groups": self.groups}.items():
            if share > 1:
                raise ValueError(f"{key}={share}: it is a share, from 0 to 1.")
        if self.groups and self.things[1] < 2:
            raise ValueError(f"groups={self.groups} needs pictures of two things, and things={self.things}.")


class Captioned:
    """Talks by number: each is a function of the settings and its number."""

    def __init__(self, cfg: Config) -> None:
        """Check the families.

        Raises:
            ValueError: if there is no such family, or things are out of range.
        """
        self.cfg, self.families = cfg, cfg.families or FAMILIES
        have = (*FAMILIES, *REGIONS)
        unknown = [family for family in self.families if family not in have]
        if unknown:
            raise ValueError(f"families has '{unknown[0]}'; there is: {', '.join(have)}.")
        things = cfg.things[0], cfg.things[1]
        self.world = CaptionedWorld(cfg.size, cfg.seed, cfg.split, things, cfg.truth)
        self[0]

    def __len__(self) -> int:
        return self.cfg.count

    def fingerprint(self) -> str:
        """A hash of the settings, of which all talks are a function."""
        settings = asdict(self.cfg)
        if not settings["truth"]:
            del settings["truth"]  # runs that began before there was this key go on
        return digest(settings)

    def __getitem__(self, index: int) -> Talk:
        cfg = self.cfg
        rng = np.random.Generator(np.random.PCG64((cfg.seed, _STREAM, _SPLITS.index(cfg.split), index)))
        key = f"captioned, {cfg.split} {index}"
        if rng.random() < cfg.captions:
            board = self.world.board(index)
            return self._talk(key, board, REQUEST, describe(board), "caption")
        family = self.families[index % len(self.families)]
        if cfg.groups and rng.random() < cfg.groups:
            group = group_of(self.world, family, index)
            one, which = int(rng.integers(2)), int(rng.integers(2))
            text, right = group.questions[which], group.answers[one][which]
            return self._talk(key, group.boards[one], text, right, family)
        of_all = bool(rng.random() < 0.5)  # a count: few boards have one of a colour, which would be rare
        for attempt in range(ATTEMPTS):
            board = self.world.board(index + attempt * cfg.count)
            question = question_of(self.world, board, family, rng)
            if question is not None and (family != "count" or (len(question.meaning) == 1) == of_all):
                return self._talk(key, board, question.text, question.answer, family)
        raise ValueError(
            f"families={family}: no board of {cfg.things[0]} to {cfg.things[1]} things has such a question. "
            f"Give more things."
        )

    def _talk(self, key: str, board: Board, text: str, answer: str, family: str) -> Talk:
        turns = Turn("user", f"{MARK} {text}"), Turn("assistant", answer)
        return Talk(key, (self.world.draw(board).image,), turns, family)


build = Captioned
