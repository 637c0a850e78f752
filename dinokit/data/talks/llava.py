"""A JSON or JSONL list of conversations as LLaVA (arXiv 2304.08485) has them, with images in a folder.

A record is {"id", "image": a path or a list of them, absent for text alone, "conversations": [{"from":
"human" or "gpt", "value"}]}. `user`, `assistant` and `system` are read too. In place of "image" it may have
"video": the path of a video, or of a folder of its frames, for which <video> stands in the text. The model
is shown some of its frames as images, as in LLaVA-NeXT-Interleave (arXiv 2407.07895). All records are checked
when it is opened.

A box in a text, [left, top, right, bottom], is learnt in parts of the image's sides, as the image is shown:
whole, without a border. LLaVA-1.5's own file has parts of the image with a border that makes it square:
boxes=padded turns them into parts of the image.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dinokit.config.registry import check_at_least
from dinokit.data.boxes import Box, boxes_in, with_boxes
from dinokit.data.clip_files import clip_at, clip_frames
from dinokit.data.decode import ImageLike, decode
from dinokit.data.files import check_below, existing
from dinokit.data.talks import MARK, VIDEO, Talk, Turn, check_turns
from dinokit.data.transforms import size_of
from dinokit.runtime.files import read_regular
from dinokit.runtime.launch import digest

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
BEYOND = 0.1  # parts of a side: boxes of photos may go out of the image a little


@dataclass
class Config:
    path: str = "???"  # the .json or .jsonl file
    images: str = ""  # folder that the records' image paths begin in; empty: that of the file
    # a record with an image and no <image> in its text: refused, or one mark an image before the first turn
    marks: Literal["refuse", "prepend"] = "refuse"
    front: bool = False  # move the marks of a turn to its very front, with a line break after, as LLaVA does
    first: int = 0  # records that are read, from the first; 0: all
    # boxes in the texts are in parts of the image, padded: of the square that it makes with a border on two
    # sides, as LLaVA-1.5's file has them; pixels: in pixels of the upright image
    boxes: Literal["parts", "padded", "pixels"] = "parts"
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
        self._channels, self._frames, self._boxes = cfg.channels, cfg.frames, cfg.boxes
        self.records = [_record(cfg, number, value) for number, value in _values(file, cfg.first)]
        if not self.records:
            raise ValueError(f"path={cfg.path} has no record.")
        if cfg.boxes != "parts":
            self._check_boxes(cfg.boxes)
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

    def _check_boxes(self, unit: str) -> None:
        """Refuse a file without a box in this unit, and a box whose image is not known."""
        with_box = [
            record
            for record in self.records
            if any(_is_in(unit, box) for turn in record.turns for box in boxes_in(turn.text))
        ]
        shown = [record for record in with_box if record.images or record.video]
        for record in shown:
            for box in (box for turn in record.turns for box in boxes_in(turn.text)):
                if _is_in(unit, box) and (box[0] > box[2] or box[1] > box[3]):
                    raise ValueError(
                        f"{record.key} has the box {[*box]}, which ends before it begins: boxes={unit} reads "
                        f"[left, top, right, bottom]. If yours are [left, top, width, height], write them "
                        f"so, or remove the record."
                    )
        several = next((record for record in shown if len(record.images) != 1), None)
        if several:
            raise ValueError(
                f"{several.key} has a box, and boxes={unit} needs the one image that it is in: there are "
                f"{len(several.images)} images{' and a video' * bool(several.video)}. Write its boxes in "
                f"parts of their image, and leave out boxes=."
            )
        if not shown:
            what = "from 0 to 1" if unit == "padded" else "in pixels"
            raise ValueError(
                f"boxes={unit}, and no text about an image has a box [left, top, right, bottom] {what}. "
                f"Leave out boxes=, or set boxes={'pixels' if unit == 'padded' else 'padded'}."
            )

    def __len__(self) -> int:
        return len(self.records)

    def fingerprint(self) -> str:
        """A hash of the records, and of the sizes of their images and videos; pixels are not compared."""
        named = {name for record in self.records for name in (*record.images, record.video)} - {""}
        places = [self._root / name for name in sorted(named)]
        files = [
            file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place])
        ]
        sizes = [(str(file.relative_to(self._root)), file.stat().st_size) for file in files]
        return digest([self.records, sizes] + [self._boxes] * (self._boxes != "parts"))

    def answers(self) -> Iterator[tuple[str, str]]:
        """Key and text of every answer, without those with boxes that are learnt in another unit."""
        for record in self.records:
            for text in (turn.text for turn in record.turns if turn.role == "assistant"):
                if self._boxes == "parts" or not boxes_in(text):
                    yield record.key, text

    def __getitem__(self, index: int) -> Talk:
        record = self.records[index]
        if record.video:
            frames = clip_frames(self._root / record.video, self._frames)
            return Talk(record.key, tuple(frames), record.turns)
        paths = [self._root / name for name in record.images]
        images = tuple(decode(read_regular(path), str(path), self._channels) for path in paths)
        return Talk(record.key, images, self._turns(record, images))

    def _turns(self, record: Record, images: Sequence[ImageLike]) -> tuple[Turn, ...]:
        """The turns with their boxes in parts of the image.

        Raises:
            ValueError: if a box has nothing of the image, as those in another unit.
        """
        if self._boxes == "parts" or len(images) != 1:
            return record.turns
        sides = size_of(images[0])
        unit = max(sides) if self._boxes == "padded" else 1
        border = [(max(sides) - side) / 2 if self._boxes == "padded" else 0.0 for side in sides]
        slack = max(sides) / 100  # pixels: two decimals of the square

        def part(box: Box) -> Box | None:
            if not _is_in(self._boxes, box):
                return None
            pixels = [edge * unit - border[n % 2] for n, edge in enumerate(box)]
            if any(pixels[n + 2] < -slack or pixels[n] > side + slack for n, side in enumerate(sides)):
                raise ValueError(
                    f"{record.key} has the box {[*box]}, which lies outside of its image of {sides[0]} x "
                    f"{sides[1]} pixels if boxes={self._boxes}. Set boxes= to the unit of the file, repair "
                    f"the record or remove it."
                )
            left, top, right, bottom = (
                min(max(0.0, edge / sides[n % 2]), 1.0) for n, edge in enumerate(pixels)
            )
            return left, top, right, bottom

        return tuple(replace(turn, text=with_boxes(turn.text, part)) for turn in record.turns)


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


def _is_in(unit: str, box: Box) -> bool:
    """Whether four numbers are a box in the unit that `boxes` names, and not another list of a text."""
    return all(-BEYOND <= edge <= 1 + BEYOND for edge in box) == (unit == "padded")


def _front(text: str) -> str:
    marks = text.count(MARK)
    rest = text.replace(MARK, "").strip()
    return "\n".join([MARK] * marks + [rest]) if marks else text


build = Llava
