"""dinokit ask MODEL IMAGE... "QUESTION": ask a model of dinokit instruct about images.

MODEL is a run of dinokit instruct, or a folder that it or transformers wrote. The last word is the question;
<image> in it says where an image stands, else all stand before it. A video, or a folder of its frames, is
shown as `frames` images; its place is <video>. questions=FILE out=FILE answers a JSONL file of LLaVA's
evaluation, one {"question_id", "image" or "video", "text"} a line, in batches; paths begin in images=FOLDER
or that of the file. Answers are {"question_id", "prompt", "text", "model_id"}, in the same order.

dinokit ask runs/chat photo.jpg "what colour is the disc"
dinokit ask runs/chat clip.mp4 "what moves" frames=8
dinokit ask runs/chat questions=questions.jsonl images=PHOTOS out=answers.jsonl batch=32
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.commands import Command, key_lines
from dinokit.config.load import checked_values, parse_overrides
from dinokit.config.registry import check_at_least, only_if

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dinokit.data.talks import Talk


@dataclass
class Config:
    questions: str = ""  # a .jsonl file of questions, in place of an image and a question
    images: str = only_if("", questions=True)  # folder that their paths begin in; empty: that of the file
    out: str = only_if("", questions=True)  # the .jsonl file of answers
    batch: int = only_if(16, questions=True)  # questions that are computed at a time
    most: int = 64  # tokens of an answer
    frames: int = 8  # of a video that are shown, at even steps from its first to its last
    device: str = "auto"  # cpu, cuda, cuda:1 ...; auto: a GPU if there is one

    def __post_init__(self) -> None:
        check_at_least(self, batch=1, most=1, frames=1)


def run(command: Command) -> dict[str, Any]:
    cfg = Config(**checked_values(Config, parse_overrides(command.settings)))
    if not command.words:
        raise ValueError('Which model? dinokit ask MODEL IMAGE "QUESTION"')
    model, *rest = command.words
    if cfg.questions:
        if rest:
            raise ValueError(f"'{rest[0]}': with questions= the images and questions are those of the file.")
        if not cfg.out:
            raise ValueError("out=FILE.jsonl must be given: the answers to questions= are written there.")
    elif len(rest) < 1 or " " not in rest[-1].strip():
        last = f", and '{rest[-1]}' is none" if rest else ""
        raise ValueError(f'The last word is the question{last}: dinokit ask {model} IMAGE "what is there"')
    from dinokit.language.model import without_bars

    without_bars()
    return _file(cfg, model) if cfg.questions else _one(cfg, model, rest[:-1], rest[-1])


def _one(cfg: Config, model: str, images: "Sequence[str]", text: str) -> dict[str, Any]:
    from dinokit.language.answer import Asker
    from dinokit.language.model import open_model
    from dinokit.runtime.device import pick_device

    asked = _talk({"images": images, "text": text}, Path(), cfg.frames, "the question")
    asker = Asker(open_model(model, pick_device(cfg.device)), cfg.most)
    (answer,) = asker.answers([asked])
    print(answer)
    return {"answer": answer}


def _file(cfg: Config, model: str) -> dict[str, Any]:
    from dinokit.data.files import existing
    from dinokit.language.answer import Asker
    from dinokit.language.model import open_model
    from dinokit.runtime.device import pick_device
    from dinokit.runtime.files import read_regular, write_text
    from dinokit.runtime.log import watch

    file = existing(cfg.questions)
    root = existing(cfg.images) if cfg.images else file.parent
    lines = enumerate(read_regular(file).decode("utf-8").splitlines(), 1)
    records = [_record(file, number, line, root, cfg.frames) for number, line in lines if line.strip()]
    if not records:
        raise ValueError(f"questions={file} has no question.")
    asker = Asker(open_model(model, pick_device(cfg.device)), cfg.most)
    written: list[str] = []
    starts = range(0, len(records), cfg.batch)
    for first in watch(starts, len(starts), "batches of questions"):
        part = records[first : first + cfg.batch]
        talks = [_talk(record, root, cfg.frames, f"question {record['question_id']}") for record in part]
        answers = asker.answers(talks, cfg.batch)
        for record, answer in zip(part, answers, strict=True):
            line = {"question_id": record["question_id"], "prompt": record["text"], "text": answer}
            written.append(json.dumps({**line, "model_id": Path(model).name}, ensure_ascii=False) + "\n")
        write_text(Path(cfg.out), "".join(written))  # what is answered stays after Ctrl-C
    print(cfg.out)
    return {"answers": len(written), "out": cfg.out}


def _record(file: Path, number: int, line: str, root: Path, frames: int) -> dict[str, Any]:
    from dinokit.data.clip_files import clip_at
    from dinokit.language.answer import question

    try:
        value = json.loads(line)
        record = {"question_id": value.get("question_id", number), "text": str(value["text"])}
        given, video = value.get("image") or [], value.get("video") or []
    except (ValueError, KeyError, AttributeError):
        raise ValueError(
            f"{file}, line {number}: it is no question. One is {{'question_id': 1, 'image': 'a.jpg', 'text': "
            f"'what is there ?'}}."
        ) from None
    if given and video:
        raise ValueError(f"{file}, line {number}: it has an image and a video; a question has one of them.")
    if video and "<video>" not in record["text"]:  # some files write <image> for a video too
        record["text"] = record["text"].replace("<image>", "<video>", 1)
    paths = given or video
    names = [str(name) for name in (paths if isinstance(paths, list) else [paths])]
    missing = [name for name in names if not (root / name).is_file() and clip_at(root / name) is None]
    if missing:
        what = "video or folder of frames" if video else "image"
        raise ValueError(
            f"{file}, line {number}: there is no {what} {root / missing[0]}. images= is their folder."
        )
    shown = sum(frames if _is_clip(root / name) else 1 for name in names)
    question([None] * shown, _marked(record["text"], frames), f"{file}, line {number}")  # checks the marks
    return {**record, "images": names}


def _talk(record: dict[str, Any], root: Path, frames: int, key: str) -> "Talk":
    """The question with its images, and the frames of its videos as images."""
    from dinokit.data.clip_files import clip_frames
    from dinokit.data.decode import as_image
    from dinokit.language.answer import question

    shown: list[Any] = []
    for path in (root / name for name in record["images"]):
        shown += clip_frames(path, frames) if _is_clip(path) else [as_image(path, 3)]
    return question(shown, _marked(record["text"], frames), key)


def _is_clip(path: Path) -> bool:
    from dinokit.data.video import is_video

    return path.is_dir() or is_video(path)


def _marked(text: str, frames: int) -> str:
    from dinokit.data.talks import MARK, VIDEO

    return text.replace(VIDEO, MARK * frames)


def describe(words: "Sequence[str]") -> str:
    return "\n".join(["keys:", *key_lines("commands", "ask")])
