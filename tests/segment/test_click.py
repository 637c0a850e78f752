"""The page for clicking: what its clicks ask for, and the page in a real browser."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.commands.click import BESIDE, CORNER, ON, Click, Page, answer, opened, picture, prompt, scale_of
from dinokit.config import registry
from dinokit.features import fingerprint
from dinokit.segment.encoder import Encoder
from dinokit.segment.predictor import Predictor
from dinokit.segment.promptable import PromptableHead
from dinokit.segment.recipe import Head
from dinokit.segment.saved import SavedHead, save_head
from dinokit.weights.formats.native import save_backbone

CLICKS = (Click(20, 9, ON), Click(3, 3, BESIDE), Click(30, 11, ON))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A photo, and a backbone and a head at random weights, whose masks are not empty."""
    folder = tmp_path_factory.mktemp("click")
    torch.manual_seed(0)
    section = {"name": "vit", "size": 32, "width": 24, "depth": 1, "heads": 2, "patch": 8}
    backbone = registry.build("models", section).eval()
    save_backbone(folder / "vit.safetensors", backbone, section, "")
    cfg = Head(hidden=32)
    head = PromptableHead(Encoder(backbone, 32).width, cfg)
    about = SavedHead("promptable", asdict(cfg), 32, 1, fingerprint(backbone), None, 0)
    save_head(folder / "head.safetensors", head, about)
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


def arguments(folder):
    return [f"weights={folder / 'vit.safetensors'}", f"head={folder / 'head.safetensors'}", "device=cpu"]


@pytest.fixture
def predictor(folder):
    return Predictor.load(folder / "vit.safetensors", folder / "head.safetensors", "cpu")


@pytest.fixture
def page(predictor, tmp_path):
    return Page(predictor, tmp_path)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def asked(folder, out, *words):
    """The mask that dinokit segment writes."""
    file = out / "mask.png"
    assert main(["segment", str(folder / "photo.png"), *arguments(folder), *words, f"out={file}"]) == 0
    return pixels(file)


def test_clicks_are_points_and_two_corners_a_box():
    corners = [Click(30, 4, CORNER), Click(10, 20, CORNER), Click(0, 0, CORNER), Click(5, 5, CORNER)]
    assert prompt(CLICKS) == ([[20, 9, 1], [3, 3, 0], [30, 11, 1]], [])
    assert prompt(corners[:1]) == ([], [])
    assert prompt([corners[0], CLICKS[0], corners[1]]) == ([[20, 9, 1]], [10, 4, 31, 21])
    assert prompt(corners[:3]) == prompt(corners[:2]) == ([], [10, 4, 31, 21])
    assert prompt(corners) == ([], [0, 0, 6, 6])


def test_the_mask_is_that_of_the_command_line_and_undone_with_its_click(page, folder, tmp_path):
    def mask(clicks):
        *_, text, file = page.view(str(folder / "photo.png"), clicks, several=False, correct=False)
        return text, file and pixels(file)

    three, two, none = mask(CLICKS), mask(CLICKS[:2]), mask(())
    again = mask(CLICKS)
    assert "`points=[[20,9,1],[3,3,0],[30,11,1]]`" in three[0]
    expected = asked(folder, tmp_path, "points=[[20,9,1],[3,3,0],[30,11,1]]")
    assert 0 < expected.mean() < 255
    assert (three[1] == expected).all()
    assert (again[1] == expected).all()
    assert (two[1] == asked(folder, tmp_path, "points=[[20,9,1],[3,3,0]]")).all()
    assert (two[1] != three[1]).any()
    assert none == ("Click on the object, or on two opposite corners of a box around it.", None)
    boxed = mask((Click(30, 20, CORNER), Click(10, 4, CORNER), CLICKS[0]))
    assert (boxed[1] == asked(folder, tmp_path, "points=[[20,9,1]]", "box=[10,4,31,21]")).all()


def test_a_click_corrects_the_last_mask(predictor, folder):
    predictor.set_image(folder / "photo.png")
    predictor.predict([(3, 3), (20, 9)], [0, 1])
    expected = predictor.refine([(30, 11)], [1], several=True)
    clicks = [CLICKS[1], CLICKS[0], CLICKS[2]]
    found = answer(predictor, clicks, several=True, correct=True)
    assert len(found.masks) == 3
    assert torch.equal(found.logits, expected.logits)
    assert not torch.equal(found.logits, answer(predictor, clicks, several=True, correct=False).logits)
    predictor.predict(box=(10, 4, 31, 21))
    expected = predictor.refine([(3, 3)], [0])
    clicks = [CLICKS[1], Click(10, 4, CORNER), Click(30, 20, CORNER)]
    assert torch.equal(answer(predictor, clicks, several=False, correct=True).logits, expected.logits)
    assert answer(predictor, [CLICKS[1]], several=False, correct=True) is None


@pytest.mark.parametrize("size", [(5, 3), (640, 90), (2000, 31)])
def test_a_click_on_the_picture_is_one_on_its_pixel(page, tmp_path, size):
    image, path = Image.new("RGB", size), str(tmp_path / "image.png")
    image.save(path)
    shown, scale = picture(image, [], []), scale_of(image)
    assert 640 <= shown.width <= 1600
    for x, y in ((0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 3)):
        assert page.pixel(path, ((x + 0.5) * scale, (y + 0.5) * scale)) == (x, y)
    assert page.pixel(path, shown.size) == (size[0] - 1, size[1] - 1)
    x, y = size[0] // 2, size[1] // 2
    marked = picture(image, [], [Click(x, y, BESIDE)])
    half = max(shown.size) / 160  # of the radius of the disc: above its sign
    assert marked.getpixel((int((x + 0.5) * scale), int((y + 0.5) * scale - half))) == (0, 130, 200)


def test_each_window_has_the_mask_of_its_own_image(page, folder, tmp_path):
    other = str(tmp_path / "other.png")
    Image.fromarray(255 - pixels(folder / "photo.png")).save(other)
    paths = [str(folder / "photo.png"), other]
    first = [page.view(path, CLICKS, several=False, correct=True)[2] for path in paths]
    assert first[0] != first[1]
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken.png"):
        page.view(str(tmp_path / "broken.png"), (), several=False, correct=True)
    assert [page.view(path, CLICKS, several=False, correct=True)[2] for path in paths] == first


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port={port}: Address already in use. Give another one"):
            opened(port)
    with opened(port) as ours:
        assert ours.getsockname() == ("127.0.0.1", port)  # this machine alone
    with pytest.raises(ValueError, match="port=70000: "):
        opened(70000)


def test_without_gradio_its_extra_is_named_before_any_work(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["click", "none.png", "weights=none"]) == 2
    assert "This needs gradio, which is not installed: pip install 'dinokit[page]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["PHOTO"], 2, "weights"),
        (["PHOTO", "weights=FOLDER/vit.safetensors"], 2, "or head=RUN"),
        (["PHOTO", "weights=FOLDER/vit.safetensors", "head=FOLDER/none"], 2, "There is no head"),
        (["FOLDER/none.png", *arguments(Path("FOLDER"))], 3, "none.png"),
        (["PHOTO", *arguments(Path("FOLDER")), "port=-1"], 2, "port"),
        (["PHOTO", "PHOTO", *arguments(Path("FOLDER"))], 2, "is the image or folder already"),
    ],
)
def test_wrong_commands_get_words(folder, monkeypatch, capsys, words, status, message):
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))  # all of them end before it is used
    words = [word.replace("PHOTO", "FOLDER/photo.png").replace("FOLDER", str(folder)) for word in words]
    assert main(["click", *words]) == status
    assert message in capsys.readouterr().err


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Chromium reads commands from descriptor 3 and answers at 4, as JSON that ends in a zero byte.
PIPED = """import os, sys
for given, wanted in zip(sys.argv[1:3], (3, 4)):
    os.dup2(int(given), wanted)
os.execv(sys.argv[3], sys.argv[3:])"""
WAIT = 60  # seconds


class Browser:
    """A window of Chromium, driven by its DevTools protocol."""

    def __init__(self, profile):
        (reads, self.to), (self.back, writes) = os.pipe(), os.pipe()
        given = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (reads, writes)]  # neither is 3 or 4
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        words = [BROWSER, *options, f"--user-data-dir={profile}", "about:blank"]
        words = [sys.executable, "-c", PIPED, *map(str, given), *words]
        self.process = subprocess.Popen(words, pass_fds=given, stderr=subprocess.DEVNULL)
        for end in (reads, writes, *given):
            os.close(end)
        self.count, self.read, self.urls, self.window = 0, b"", [], {}
        (window,) = [t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=window["targetId"], flatten=True)
        self.window = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "DOM"):
            self.send(f"{domain}.enable")

    def close(self):
        self.process.terminate()
        self.process.wait(WAIT)
        os.close(self.to)
        os.close(self.back)

    def send(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.window}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.read:
                part = os.read(self.back, 1 << 20)
                assert part, "Chromium has ended"
                self.read += part
            text, _, self.read = self.read.partition(b"\0")
            found = json.loads(text)
            if found.get("method") == "Network.requestWillBeSent":
                self.urls.append(found["params"]["request"]["url"])
            if found.get("id") == self.count:
                assert "error" not in found, found
                return found["result"]

    def value(self, code):
        found = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, code):
        """The value of the code, once it is true."""
        end = time.monotonic() + WAIT
        while not (found := self.value(code)):
            if time.monotonic() > end:
                pytest.fail(f"{code} is not so: {self.value('document.body.innerText')}")
            time.sleep(0.1)
        return found

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, text):
        """Press what has this text."""
        named = f"e => e.innerText.trim() == {json.dumps(text)}"
        self.wait(f"window.found = [...document.querySelectorAll('button, label')].find({named}), !!found")
        self.value("found.click()")

    def says(self, text):
        self.wait(f"document.body?.innerText.includes({json.dumps(text)})")


@pytest.fixture
def served(folder, tmp_path):
    """A narrow window of a browser with the page, and the process that serves it."""
    words = [sys.executable, "-m", "dinokit", "click", folder / "photo.png", *arguments(folder), "port=0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = json.loads(process.stdout.readline())["address"]
            browser = Browser(tmp_path / "profile")
            try:
                size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                browser.send("Emulation.setDeviceMetricsOverride", **size)
                browser.send("Page.navigate", url=address)
                yield browser, process, address
            finally:
                browser.close()
        finally:
            process.kill()


IMAGE = "document.querySelector('#picture img')"
PLACE = f"(r => [r.x, r.y, r.width, r.height])({IMAGE}.getBoundingClientRect())"


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER or not find_spec("gradio"), reason="no Chromium or no gradio is installed")
def test_a_browser_shows_the_mask_of_its_clicks(served, folder, tmp_path):
    browser, process, address = served

    def click(x, y):
        """Click on the middle of a pixel of the image, which has 40 x 24."""
        browser.wait(f"{IMAGE}?.naturalWidth > 0")
        left, top, width, height = browser.value(PLACE)
        browser.click(left + (x + 0.5) * width / 40, top + (y + 0.5) * height / 24)

    browser.says("Click on the object")
    click(20, 9)
    browser.says("points=[[20,9,1]]")
    browser.press("beside it")
    click(3, 3)
    browser.says("points=[[20,9,1],[3,3,0]]")
    browser.press("Undo")
    browser.says("points=[[20,9,1]]")
    browser.press("a corner of a box")
    click(39, 23)
    click(2, 1)
    browser.says("points=[[20,9,1]] box=[2,1,40,24]")
    browser.press("Each click corrects the last mask")
    browser.press("Several answers")
    browser.says("Answer (expected IoU)")
    expected = asked(folder, tmp_path, "points=[[20,9,1]]", "box=[2,1,40,24]", "several=true")
    browser.says(f"{(expected > 0).sum()} pixels")
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "got"))
    browser.press("Download the mask")
    end = time.monotonic() + WAIT
    while not (got := tmp_path / "got" / "photo_mask.png").is_file() and time.monotonic() < end:
        time.sleep(0.1)
    assert (pixels(got) == expected).all()

    def upload(path):
        root = browser.send("DOM.getDocument")["root"]["nodeId"]
        found = browser.send("DOM.querySelector", nodeId=root, selector="input[type=file]")
        browser.send("DOM.setFileInputFiles", nodeId=found["nodeId"], files=[str(path)])

    (tmp_path / "broken.png").write_bytes(b"nothing")
    upload(tmp_path / "broken.png")
    browser.says("broken.png cannot be read")
    browser.says("points=[[20,9,1]] box=[2,1,40,24]")
    upload(folder / "photo.png")
    browser.says("Click on the object")
    assert browser.value("document.documentElement.scrollWidth") <= 420
    urls = [url for url in browser.urls if not url.startswith((address, "data:", "blob:"))]
    assert len(browser.urls) > 10
    assert urls == []
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT) == 0
