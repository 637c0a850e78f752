"""Clips in a list: a CSV file with columns path and label, and if wanted start and end (seconds) and split.

Paths are relative to the list. A path is a video file, or a folder of images, which takes no start or end.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dinokit.config.registry import suggest
from dinokit.data.clip_files import VideoClip, clip_at
from dinokit.data.clips import Clip, Clips, natural, split_of

SPLITS = ("train", "test")
COLUMNS = ("path", "label", "start", "end", "split")


@dataclass
class Config:
    path: str = "???"  # a CSV file with a line of column names: path, label, and if wanted start, end, split
    # auto: that of the section train or test, elsewhere test; all: whatever the column split says; without
    # such a column, all clips are in both
    split: Literal["auto", "all", "train", "test"] = "auto"


def build(cfg: Config) -> Clips:
    """The clips of a split, in the order of the list. Classes are those of the whole list.

    Raises:
        ValueError: if there is no such list, or a line of it is wrong; the message has its number.
    """
    path = Path(cfg.path).expanduser()
    if not path.is_file():
        raise ValueError(f"path={cfg.path} is not a file (looked from {Path.cwd()}).")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        _check_columns(path, columns)
        rows = []
        for row in reader:
            _check_row(path, reader.line_num, row)
            rows.append((reader.line_num, row))
    split = split_of(cfg.split)
    classes = sorted({str(row["label"]).strip() for _, row in rows}, key=natural)
    clips = [
        _clip(path, line, row, classes)
        for line, row in rows
        if split == "all" or "split" not in columns or str(row["split"]).strip() == split
    ]
    if not clips:
        splits = sorted({str(row.get("split")).strip() for _, row in rows})
        raise ValueError(
            f"{path} has {len(rows)} clips, none of the split '{split}'"
            + (f"; its splits are: {', '.join(splits)}." if splits and "split" in columns else ".")
        )
    return Clips(tuple(classes), clips)


def _check_columns(path: Path, columns: list[str]) -> None:
    unknown = [name for name in columns if name not in COLUMNS]
    missing = [name for name in ("path", "label") if name not in columns]
    if unknown or missing:
        what = f"no column '{missing[0]}'" if missing else f"a column '{unknown[0]}'"
        near = suggest(unknown[0], list(COLUMNS)) if unknown else ""
        raise ValueError(
            f"{path} has {what}: its first line is {','.join(columns) or 'empty'}, and should be "
            f"path,label, then if wanted start,end,split.{near}"
        )


def _check_row(path: Path, line: int, row: dict[str, str | None]) -> None:
    if None in row:  # where csv puts what is beyond the columns
        raise ValueError(f"{path}, line {line}: it has more values than the first line has names.")
    for key in ("path", "label"):
        if not str(row[key] or "").strip():
            raise ValueError(f"{path}, line {line}: it has no {key}.")
    split = str(row.get("split") or "").strip()
    if "split" in row and split not in SPLITS:
        raise ValueError(
            f"{path}, line {line}: split='{split}' is not one of {', '.join(SPLITS)}, so the clip would be "
            f"in neither.{suggest(split, list(SPLITS))} Give one of them in each line, or no column split."
        )


def _clip(path: Path, line: int, row: dict[str, str | None], classes: list[str]) -> Clip:
    """The clip of a line."""
    name, label = (str(row[key]).strip() for key in ("path", "label"))
    place = path.parent / Path(name).expanduser()
    clip = clip_at(place, classes.index(label))
    if clip is None:
        what = "is neither a video file nor a folder with images" if place.exists() else "does not exist"
        raise ValueError(f"{path}, line {line}: {place} {what}.")
    times = [_time(path, line, key, row.get(key)) for key in ("start", "end")]
    if times == [None, None]:
        return clip
    if not isinstance(clip, VideoClip):
        raise ValueError(f"{path}, line {line}: {place} is a folder of images, which has no start and end.")
    start, end = times[0] or 0.0, float("inf") if times[1] is None else times[1]
    if end < start:
        raise ValueError(f"{path}, line {line}: end={end:g} is before start={start:g}.")
    return VideoClip(clip.path, clip.label, start, end)


def _time(path: Path, line: int, key: str, text: str | None) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{path}, line {line}: {key}='{text}' is no number of seconds from 0 on.")
    return seconds
