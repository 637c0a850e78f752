"""Images with captions as talks: a request, and a caption as the answer, as in the first stage of LLaVA.

The images are those of any source of captions: `folder`, `coco`, `tar` (WebDataset) or the built-in ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dinokit.config import registry
from dinokit.config.registry import check_at_least
from dinokit.data.captions import CaptionSource
from dinokit.data.talks import MARK, Talk, Turn, check_turns
from dinokit.runtime.launch import digest


@dataclass
class Config:
    # images with captions: source.name=tar source.path=..., as in dinokit align
    source: dict[str, Any] | None = field(default=None, metadata={"registry": "data.captions"})
    requests: tuple[str, ...] = ("describe the picture",)  # what is asked; several come by turns
    each: int = 1  # talks of an image: each takes the next of its captions, and begins again after the last

    def __post_init__(self) -> None:
        check_at_least(self, each=1)
        if not self.requests or not all(text.strip() for text in self.requests):
            raise ValueError(f"requests={[*self.requests]}: give one text or more.")


class Captions:
    """Talks by number: first one of each image, then the second of each."""

    def __init__(self, cfg: Config) -> None:
        """Open the source.

        Raises:
            ValueError, LookupError: if there is none, it cannot be opened, or a request has a mark.
        """
        for request in cfg.requests:
            check_turns("requests", self._turns(request, "-"), 1)
        if not cfg.source:
            have = ", ".join(registry.names("data.captions"))
            raise ValueError(f"source.name must be given, images with captions; there is: {have}.")
        self.cfg = cfg
        self.source: CaptionSource = registry.build("data.captions", cfg.source)

    def __len__(self) -> int:
        return len(self.source) * self.cfg.each

    def fingerprint(self) -> str:
        """A hash of the settings and of all captions; pixels are not compared."""
        numbers = range(len(self.source))
        said = [(self.source.name(number), self._captions(number)) for number in numbers]
        return digest([self.cfg.requests, self.cfg.each, said])

    def answers(self) -> Iterator[tuple[str, str]]:
        """Key and text of every answer."""
        for number in range(len(self.source)):
            for caption in self._captions(number)[: self.cfg.each]:
                yield self.source.name(number), caption

    def __getitem__(self, index: int) -> Talk:
        turn, number = divmod(index, len(self.source))
        captions, request = self._captions(number), self.cfg.requests[index % len(self.cfg.requests)]
        turns, key = self._turns(request, captions[turn % len(captions)]), self.source.name(number)
        check_turns(key, turns, 1)
        return Talk(key, (self.source[number][0],), turns, "caption")

    @staticmethod
    def _turns(request: str, caption: str) -> tuple[Turn, ...]:
        return Turn("user", f"{MARK}\n{request}"), Turn("assistant", caption)

    def _captions(self, number: int) -> Sequence[str]:
        """Those of the whole image."""
        return self.source.captions(number)[0]


build = Captions
