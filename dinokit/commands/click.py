"""dinokit click [IMAGE|FOLDER] weights=FILE_OR_RUN [head=RUN] [port=7860]: segment by clicks in a browser.

A page on this machine shows IMAGE, an image of FOLDER, or one that is uploaded there. A click is a point on
the object, a point beside it, or a corner of a box around it: two opposite corners make the box. The page
shows the mask with the IoU that the head expects of it, and gives it as PNG, white on the object.

head is promptable or unified; without it, weights is a folder of Hugging Face with a released SAM. Each click
corrects the last mask, as in training; or all points are asked at once, as in dinokit segment points=. Only
this machine can open the page, and nothing leaves it. Ctrl-C ends it. Needs gradio: the extra `page`.

dinokit click photo.jpg weights=runs/demo head=runs/head
dinokit click PHOTOS weights=sam-vit-base port=8000
"""

import json
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, NamedTuple

from dinokit.commands import Command, image_files, key_lines
from dinokit.commands.segment import COLOURS, overlay
from dinokit.config.load import checked_values, parse_overrides
from dinokit.config.registry import check_at_least

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from dinokit.data.decode import ImageLike
    from dinokit.segment.predictor import Masks, Predictor

HOST = "127.0.0.1"
ON, BESIDE, CORNER = KINDS = ("on the object", "beside it", "a corner of a box")
MARKS = {ON: ("+", COLOURS[1]), BESIDE: ("-", COLOURS[2]), CORNER: ("", COLOURS[3])}
SHOWN = 640, 1600  # pixels of the long side of the picture: smaller images are enlarged, larger ones reduced


@dataclass
class Config:
    weights: str = "???"  # whatever load_backbone() reads; without a head, a folder of a released SAM
    head: str = ""  # a promptable or unified head of dinokit train-head, or the folder of its run
    port: int = 7860  # of the page on this machine; 0: one that is free
    device: str = "auto"  # cpu, cuda, cuda:1 ...; auto: a GPU if there is one

    def __post_init__(self) -> None:
        check_at_least(self, port=0)


class Click(NamedTuple):
    x: int  # pixels of the image
    y: int
    kind: str  # one of KINDS


def run(command: Command) -> dict[str, Any]:
    from dinokit.language import needed

    cfg = Config(**checked_values(Config, parse_overrides(command.settings)))
    needed("gradio", "page")
    files = image_files([command.one_word("image or folder")] if command.words else [])
    with opened(cfg.port) as port, TemporaryDirectory() as folder:
        from dinokit.segment.predictor import Predictor

        page = Page(Predictor.load(cfg.weights, cfg.head, cfg.device), Path(folder))
        if len(files) == 1:  # of several another one may be chosen
            page.look(files[0])
        result = {"address": f"http://{HOST}:{port.getsockname()[1]}"}
        print(json.dumps(result), flush=True)
        serve(layout(page, files), port)
    return result


def opened(port: int) -> socket.socket:
    """The port of this machine, or for 0 a free one, at which browsers wait for the page.

    Raises:
        ValueError: if the page cannot have it.
    """
    result = socket.socket()
    result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a page that has ended holds its port
    try:
        result.bind((HOST, port))
        result.listen()
    except (OSError, OverflowError) as error:
        result.close()
        raise ValueError(
            f"port={port}: {getattr(error, 'strerror', None) or error}. Give another one, as port=7861, or "
            f"port=0 for one that is free."
        ) from None
    return result


def serve(blocks: Any, port: socket.socket) -> None:
    """Show the page until Ctrl-C. gradio's own launch() looks for its address through proxies as well."""
    import fastapi
    import gradio as gr
    import uvicorn

    css = "#picture img {object-fit: contain; max-height: 85vh; cursor: crosshair}"
    off = {"run_history": False, "ssr_mode": False, "footer_links": []}
    app = gr.mount_gradio_app(fastapi.FastAPI(), blocks, "/", css=css, **off)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)).run([port])


def prompt(clicks: Sequence[Click]) -> tuple[list[list[int]], list[int]]:
    """Points and box of the clicks, as dinokit segment takes them.

    Returns:
        [x, y, 1 on the object or 0 beside it] each, and [x0, y0, x1, y1] around the pixels of the last two
        corners that make a box, or [].
    """
    points = [[click.x, click.y, int(click.kind == ON)] for click in clicks if click.kind != CORNER]
    corners = [click for click in clicks if click.kind == CORNER]
    pair = corners[: len(corners) // 2 * 2][-2:]
    x, y = sorted(click.x for click in pair), sorted(click.y for click in pair)
    return points, [x[0], y[0], x[1] + 1, y[1] + 1] if pair else []


def answer(predictor: "Predictor", clicks: Sequence[Click], several: bool, correct: bool) -> "Masks | None":
    """The masks for the clicks on the predictor's image; None without a box and a click on the object.

    Args:
        predictor: with an image.
        clicks: in their order.
        several: as for predict().
        correct: the box, or the points up to the first one on the object, are asked first, and each further
            point corrects the mask; else all are asked at once.
    """
    points, box = prompt(clicks)
    places, signs, count = [point[:2] for point in points], [point[2] for point in points], len(points)
    if not box and 1 not in signs:
        return None
    first = count if not correct else 0 if box else signs.index(1) + 1
    masks = predictor.predict(places[:first], signs[:first], box or None, None, several and first == count)
    for n in range(first, count):
        masks = predictor.refine(places[n : n + 1], signs[n : n + 1], several and n == count - 1)
    return masks


def scale_of(image: "ImageLike") -> float:
    """Pixels of the picture in one of the image."""
    from dinokit.data.transforms import size_of

    side = max(size_of(image))
    return min(max(side, SHOWN[0]), SHOWN[1]) / side


def picture(image: "ImageLike", masks: "Sequence[np.ndarray]", clicks: Sequence[Click]) -> "Image.Image":
    """The image with masks, points (+ on the object, - beside it), corners and the box."""
    from PIL import Image, ImageDraw

    shown, scale = overlay(image, masks), scale_of(image)
    size = max(1, round(shown.width * scale)), max(1, round(shown.height * scale))
    shown = shown.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
    pen, radius, box = ImageDraw.Draw(shown), max(size) / 80, prompt(clicks)[1]
    if box:
        pen.rectangle([edge * scale for edge in box], outline=MARKS[CORNER][1], width=round(radius / 3))
    for click in clicks:
        (sign, colour), at = MARKS[click.kind], ((click.x + 0.5) * scale, (click.y + 0.5) * scale)
        pen.circle(at, radius, colour, "white", round(radius / 5))
        pen.text(at, sign, "white", anchor="mm", font_size=2.5 * radius)
    return shown


class Page:
    """What the page shows of a predictor, which has one image at a time: two windows wait for each other.

    Args:
        predictor: of all windows.
        folder: for the masks that are downloaded.
    """

    def __init__(self, predictor: "Predictor", folder: Path) -> None:
        self.predictor, self.folder = predictor, folder
        self.lock, self.path = threading.Lock(), ""

    def look(self, path: str) -> "ImageLike":
        """The image, which the predictor then has. Raises as Predictor.set_image()."""
        from dinokit.data.decode import as_image

        if path != self.path:
            image = as_image(path, self.predictor.encoder.channels)
            self.predictor.set_image(image)
            self.image, self.path = image, path
        return self.image

    def pixel(self, path: str, place: Sequence[float]) -> tuple[int, int]:
        """The pixel of the image at a place of its picture, or the nearest one, if that is on the edge."""
        from dinokit.data.transforms import size_of

        with self.lock:
            image = self.look(path)
        x, y = (int(at / scale_of(image)) for at in place)
        width, height = size_of(image)
        return min(max(x, 0), width - 1), min(max(y, 0), height - 1)

    def view(
        self, path: str, clicks: Sequence[Click], several: bool, correct: bool, number: int = 0
    ) -> "tuple[Image.Image, list[str], str, str | None]":
        """The picture with answer `number`, names of all answers, a text, and the file of the mask.

        Raises as Predictor.set_image() and predict().
        """
        from PIL import Image

        with self.lock:
            image = self.look(path)
            masks = answer(self.predictor, clicks, several, correct)
        if masks is None:
            text = "Click on the object, or on two opposite corners of a box around it."
            return picture(image, [], clicks), [], text, None
        mask = masks.masks[number]
        file = Path(mkdtemp(dir=self.folder)) / f"{Path(path).stem}_mask.png"  # of this window alone
        Image.fromarray(mask.astype("uint8") * 255).save(file)
        keys = zip(("points", "box"), prompt(clicks), strict=True)
        asked = " ".join(f"{key}={value}".replace(" ", "") for key, value in keys if value)
        text = f"{mask.sum()} pixels, expected IoU {masks.quality[number]:.2f}, for `{asked}`"
        names = [f"{n} ({quality:.2f})" for n, quality in enumerate(masks.quality, 1)]
        return picture(image, [mask], clicks), names, text, str(file)


def layout(page: Page, files: Sequence[str]) -> Any:
    """The page as Blocks of gradio, with the first of `files`."""
    import gradio as gr

    def show(path: str, clicks: tuple[Click, ...], *more: Any) -> Any:
        if not path:
            return [path, clicks, None, gr.Radio(visible=False), "Upload an image.", gr.DownloadButton()]
        try:
            shown, names, text, file = page.view(path, clicks, *more)
        except (OSError, ValueError) as error:
            gr.Warning(str(error).replace(f"{Path(path).parent}/", ""))
            return gr.skip()  # what is on the page stays
        number = more[2] if len(more) > 2 else 0
        choice = gr.Radio(names, value=names[number] if names else None, visible=len(names) > 1)
        return [path, clicks, shown, choice, text, gr.DownloadButton(value=file, interactive=bool(file))]

    def clicked(event: gr.SelectData, kind: str, path: str, clicks: tuple[Click, ...], *more: Any) -> Any:
        return show(path, (*clicks, Click(*page.pixel(path, event.index), kind)), *more)

    with gr.Blocks(title="dinokit click", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        path, clicks = gr.State(files[0] if files else ""), gr.State(())
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                image = gr.Image(
                    format="jpeg", show_label=False, interactive=False, buttons=[], elem_id="picture",
                    alt_text="the image, with its mask",
                )  # fmt: skip
                text = gr.Markdown()
            with gr.Column(scale=1, min_width=280):
                chosen = gr.Dropdown(list(files), label="Image", visible=len(files) > 1)
                upload = gr.UploadButton("Upload an image", file_types=["image"])
                kind = gr.Radio(list(KINDS), value=ON, label="A click is")
                with gr.Row():
                    undo, clear = gr.Button("Undo", min_width=80), gr.Button("Clear", min_width=80)
                correct = gr.Checkbox(True, label="Each click corrects the last mask")
                several = gr.Checkbox(False, label="Several answers")
                answers = gr.Radio([], label="Answer (expected IoU)", type="index", visible=False)
                download = gr.DownloadButton("Download the mask", interactive=False)
        ways, views = [several, correct], [path, clicks, image, answers, text, download]
        # By default a click before the last answer is there would be lost, also under the sign of progress.
        more = {"outputs": views, "show_progress": "hidden"}
        each, last = more | {"trigger_mode": "multiple"}, more | {"trigger_mode": "always_last"}
        image.select(clicked, [kind, path, clicks, *ways], **each)
        undo.click(lambda path, clicks, *more: show(path, clicks[:-1], *more), [path, clicks, *ways], **each)
        gr.on([blocks.load, several.input, correct.input], show, [path, clicks, *ways], **last)
        answers.input(show, [path, clicks, *ways, answers], **last)
        for event, new in ((clear.click, path), (chosen.input, chosen), (upload.upload, upload)):
            event(lambda path, *more: show(path, (), *more), [new, *ways], views)
    return blocks


def describe(words: Sequence[str]) -> str:
    return "\n".join(["keys:", *key_lines("commands", "click")])
