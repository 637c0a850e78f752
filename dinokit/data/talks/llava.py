"""A JSON or JSONL list of conversations as LLaVA (arXiv 2304.08485) has them, with images in a folder.

A record is {"id", "image": a path or a list of them, absent for text alone, "conversations": [{"from":
"human" or "gpt", "value"}]}. `user`, `assistant` and `system` are read too. In place of "image" it may have
"video": the path of a video, or of a folder of its frames, for which <video> stands in the text. The model
is shown some of its frames as images, as in LLaVA-NeXT-Interleave (arXiv 2407.07895). All records are checked
when it is opened.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dinokit.config.registry import check_at_least
from dinokit.data.clip_files import clip_at, clip_frames
from dinokit.data.decode import decode
from dinokit.data.files import check_below, existing
from dinokit.data.talks import MARK, VIDEO, Talk, Turn, check_turns
from dinokit.runtime.files import read_regular
from dinokit.runtime.launch import digest

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class Config:
    path: str = "???"  # the .json or .jsonl file
    images: str = ""  # folder that the records' image paths begin in; empty: that of the file
    # a record with an image and no <image> in its text: refused, or one mark an image before the first turn
    marks: Literal["refuse", "prepend"] = "refuse"
    front: bool = False  # move the marks of a turn to its very front, with a line break after, as LLaVA does
    first: int = 0  # records that are read, from the first; 0: all
    frames: int = 8  # of a video that are shown, at even steps from its first to its last
    channels: int = 3

    def __post_init__(self) -> None:
        check_at_least(self, first=0, frames=1, channels=1)


@dataclass(frozen=True)
class Record:
    """A checked record: its key, the paths of its images, or of its video, and its turns."""

    key: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    video: str = ""


class Llava:
    """The conversations of one file."""

    def __init__(self, cfg: Config) -> None:
        """Read and check all records; images are looked for and not decoded.

        Raises:
            ValueError, LookupError: naming the record, what is wrong with it and how to go on.
        """
        file = existing(cfg.path)
        self._root = existing(cfg.images) if cfg.images else file.parent
        self._channels, self._frames = cfg.channels, cfg.frames
        self.records = [_record(cfg, number, value) for number, value in _values(file, cfg.first)]
        if not self.records:
            raise ValueError(f"path={cfg.path} has no record.")
        present: dict[str, bool] = {}
        for record in self.records:
            for name in filter(None, (*record.images, record.video)):
                if name not in present:
                    check_below(name, file)
                    found = self._root / name
                    present[name] = clip_at(found) is not None if name == record.video else found.is_file()
                if not present[name]:
                    what = "video or folder of frames" if name == record.video else "image"
                    raise ValueError(
                        f"{record.key}: there is no {what} {self._root / name}. images= is the folder that "
                        f"the paths in {file} begin in; repair it, or remove the record."
                    )

    def __len__(self) -> int:
        return len(self.records)

    def fingerprint(self) -> str:
        """Of the records, and of the sizes of their images and videos; pixels are not compared."""
        named = {name for record in self.records for name in (*record.images, record.video)} - {""}
        places = [self._root / name for name in sorted(named)]
        files = [
            file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place])
        ]
        sizes = [(str(file.relative_to(self._root)), file.stat().st_size) for file in files]
        return digest([self.records, sizes])

    def __getitem__(self, index: int) -> Talk:
        record = self.records[index]
        if record.video:
            frames = clip_frames(self._root / record.video, self._frames)
            return Talk(record.key, tuple(frames), record.turns)
        paths = [self._root / name for name in record.images]
        images = tuple(decode(read_regular(path), str(path), self._channels) for path in paths)
        return Talk(record.key, images, record.turns)


def _values(file: Path, first: int) -> Iterator[tuple[str, Any]]:
    """Name and value of each record."""
    text = read_regular(file).decode("utf-8")
    try:
        if file.suffix.lower() == ".jsonl":
            lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
            values = [(f"{file}, line {n}", json.loads(line)) for n, line in lines[: first or None]]
        else:
            listed = [*json.loads(text)]
            values = [(f"{file}, record {n}", value) for n, value in enumerate(listed[: first or None], 1)]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is no JSON list of conversations, and no .jsonl of one a line: {error}."
        ) from None
    return iter(values)


def _record(cfg: Config, place: str, value: Any) -> Record:
    if not isinstance(value, dict) or not isinstance(value.get("conversations"), list):
        raise ValueError(f"{place} has no list `conversations`. Repair or remove it.")
    key = f"{place} (id {value['id']})" if "id" in value else place
    given, video = value.get("image") or [], str(value.get("video") or "")
    images = tuple(map(str, given if isinstance(given, list) else [given]))
    if video and images:
        raise ValueError(f"{key} has an image and a video: a record has one of them. Repair or remove it.")
    if video and cfg.channels != 3:
        raise ValueError(f"{key} has a video, whose frames have 3 channels, and channels={cfg.channels}.")
    turns = []
    for said in value["conversations"]:
        role: Any = ROLES.get(str(said.get("from", said.get("role")))) if isinstance(said, dict) else None
        text = said.get("value", said.get("content")) if isinstance(said, dict) else None
        if role is None or not isinstance(text, str):
            raise ValueError(f"{key}: a turn is no {{'from': 'human' or 'gpt', 'value': text}} but {said}.")
        if video and role == "user":  # some files of LLaVA write <image> for a video too
            text = text.replace(VIDEO, MARK, 1).replace(MARK, MARK * cfg.frames, 1)
        turns.append(Turn(role, _front(text) if cfg.front and role == "user" else text))
    shown = cfg.frames if video else len(images)
    if cfg.marks == "prepend" and shown and not any(MARK in turn.text for turn in turns):
        first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            turns[first] = Turn("user", "\n".join([MARK] * shown + [turns[first].text]))
    check_turns(key, turns, shown)
    return Record(key, images, tuple(turns), video)


def _front(text: str) -> str:
    marks = text.count(MARK)
    rest = text.replace(MARK, "").strip()
    return "\n".join([MARK] * marks + [rest]) if marks else text


build = Llava
