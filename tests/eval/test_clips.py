"""The evaluator of clips: it reads the order of frames, and a head without time never gets a pair."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dinokit import models
from dinokit.data.clips import Clips
from dinokit.eval import clips as module
from dinokit.eval.clips import Config, _Features, _Task, evaluate

CAPTIONED = {"name": "captioned", "size": 32, "count": 240, "test_count": 60, "frames": 9, "things": 1}
SMALL = {
    "train": CAPTIONED, "test": CAPTIONED, "frames": 5, "grid": 4, "size": 32, "batch": 400, "lr": (3e-3,),
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone():
    return models.build({"name": "raw_patches", "size": 32, "patch": 8})


def test_the_order_of_frames_is_read_and_nothing_else_gives_a_pair(backbone) -> None:
    scores = evaluate(Config(**SMALL, steps=(40, 120)), backbone)
    assert scores["accuracy"] > 0.8
    assert scores["pair_accuracy"] > 0.65
    assert scores["order_free_pair_accuracy"] == 0
    assert scores["order_free"] <= 0.5
    assert scores["middle_frame"] < 0.4
    assert scores["shuffled"] < 0.65
    assert (scores["clips_train"], scores["clips_test"]) == (240, 60)
    assert scores["lr"] == 3e-3
    assert scores["steps"] in (40, 120)


def test_features_of_views_are_those_of_the_turned_frames(backbone) -> None:
    """Patches of a mirrored frame are the mirrored ones in another order, for pixels that are averaged."""
    cfg = Config(**SMALL)
    clips = module._open(cfg, "test", 0)
    data = module._features(cfg, backbone, "test", clips.clips[:3], ["mirrored", "flipped"])
    assert data.x.shape == (3, 3, 6, 16, 48)
    for n, clip in enumerate(clips.clips[:3]):
        taken = [0, 2, 4, 6, 8, 4]  # five of nine, and the one in the middle
        frames = torch.from_numpy(clip.frames(taken)).permute(0, 3, 1, 2).float() / 255
        for view, turned in enumerate((frames, frames.flip(3), frames.flip(2))):
            expected = backbone([turned - 0.5], [None])[0].patches
            assert (data.x[view, n].float() - expected).abs().max() < 5e-3


def test_a_batch_has_the_classes_of_what_it_shows() -> None:
    """Clips whose features say which clip, view and frame they are."""
    n, frames = 6, 4
    view, clip, frame = torch.meshgrid(torch.arange(3), torch.arange(n), torch.arange(frames), indexing="ij")
    x = torch.stack([view, clip, frame], dim=3)[:, :, :, None].half()
    data = _Features(x, torch.ones(n, frames, dtype=torch.bool), torch.arange(n) % 4)
    changed = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 3, 2]])
    back = torch.tensor([1, 0, 3, 2])
    task = _Task(4, changed, back, slice(0, frames), True)
    rng = torch.Generator().manual_seed(0)
    found, _, y = module._draw(task, data, torch.tensor([0, 1, 3, 5]), 500, rng)
    seen = set()
    for row, label in zip(found[:, :, 0].int().tolist(), y.tolist(), strict=True):
        which, number = row[0][0], row[0][1]
        order = [place[2] for place in row]
        expected = int(changed[which, number % 4])
        if order == [3, 2, 1, 0]:
            expected = int(back[expected])
        else:
            assert order == [0, 1, 2, 3]
        assert label == expected
        seen.add((which, number, order[0]))
    assert seen == {(v, c, o) for v in range(3) for c in (0, 1, 3, 5) for o in (0, 3)}


def test_shuffled_frames_are_the_frames_of_the_same_clip() -> None:
    x = torch.arange(2 * 5).view(1, 2, 5, 1, 1).half()
    data = _Features(x, torch.tensor([[True] * 4 + [True]] * 2), torch.tensor([0, 1]))
    mixed = module._shuffled(data, 0).x[0, :, :, 0, 0]
    assert sorted(mixed[0, :4].tolist()) == [0, 1, 2, 3]
    assert sorted(mixed[1, :4].tolist()) == [5, 6, 7, 8]
    assert mixed[:, 4].tolist() == [4, 9]
    assert mixed[0, :4].tolist() != [0, 1, 2, 3] or mixed[1, :4].tolist() != [5, 6, 7, 8]


def test_frames_are_resized_and_cut_at_their_centre() -> None:
    frames = np.zeros((1, 20, 60, 3), np.uint8)
    frames[:, :, 20:40] = 200  # the square in the middle
    found = module._square(frames, 10)
    assert found.shape == (1, 3, 10, 10)
    assert found[0, :, :, 1:9].sub(200 / 255).abs().max() < 0.02
    same = module._square(frames[:, :, 20:40], 20)
    assert torch.equal(same, torch.full((1, 3, 20, 20), 200 / 255))


def write(root, split, name, label, columns):
    """Frame i has a white bar in column columns[i] of four."""
    folder = root / split / label / name
    folder.mkdir(parents=True)
    for i, column in enumerate(columns):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[4:28, 8 * column + 2 : 8 * column + 6] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_clips_of_files_without_known_reversals(tmp_path, backbone) -> None:
    """A bar that goes to the right or to the left, in clips of different lengths, also of too few frames."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        for i in range(count):
            columns = np.sort(rng.integers(0, 4, int(rng.integers(2, 8))))
            columns[0], columns[-1] = columns[0] % 2, 2 + columns[-1] % 2
            columns = np.sort(columns)
            write(tmp_path, split, f"a{i}", "rightwards", columns)
            write(tmp_path, split, f"b{i}", "leftwards", columns[::-1])
    section = {"name": "folders", "path": str(tmp_path)}
    settings = {"train": section, "test": section, "frames": 4, "grid": 4, "size": 32, "lr": (3e-3,)}
    scores = evaluate(Config(**settings, steps=(40,), baselines=False), backbone)
    assert scores["accuracy"] > 0.9
    assert "pair_accuracy" not in scores
    assert "order_free" not in scores
    assert scores["clips_test"] == 12
    # Mirrored clips that are taken for the same class are the other class here: nothing can be learned.
    assert evaluate(Config(**settings, steps=(40,), baselines=False, mirror=True), backbone)["accuracy"] < 0.8


def test_clips_that_do_not_fit_are_refused(tmp_path, backbone) -> None:
    def config(**changes):
        return Config(**{**SMALL, **changes})

    with pytest.raises(ValueError, match=r"train\.name must be given; there is: captioned, folders, listed"):
        evaluate(config(train=None), backbone)
    with pytest.raises(ValueError, match="60 test clips are training clips too, such as captioned test 0"):
        evaluate(config(train={**CAPTIONED, "split": "test"}), backbone)
    write(tmp_path, "train", "a", "one", [1, 2])
    write(tmp_path, "test", "b", "one", [1, 2])
    section = {"name": "folders", "path": str(tmp_path)}
    with pytest.raises(ValueError, match="one class only, 'one'"):
        evaluate(config(train=section, test=section), backbone)
    write(tmp_path, "train", "c", "two", [1, 2])
    write(tmp_path, "test", "c", "two", [1, 2])
    with pytest.raises(ValueError, match=r"They are left, right, up, down \.\.\. and one, two \.\.\."):
        evaluate(config(test=section), backbone)
    assert isinstance(module._open(config(), "test", 7), Clips)
    assert len(module._open(config(), "test", 7).clips) == 7


def test_features_that_do_not_fit_the_memory_are_refused_before_they_are_computed(
    backbone, monkeypatch
) -> None:
    monkeypatch.setattr(module, "memory", lambda: 10_000)
    with pytest.raises(ValueError, match="smaller grid or fewer frames, or max_train=N"):
        evaluate(Config(**SMALL), backbone)


@pytest.mark.parametrize("limit", [15, 30, 60, 120])
def test_clips_that_are_drawn_have_all_classes(limit) -> None:
    """The class of a built-in clip is its number modulo 4: a fixed step would draw one or two classes."""
    cfg = Config(**SMALL)
    assert [clip.label for clip in module._open(cfg, "train", 0).clips[:5]] == [0, 1, 2, 3, 0]
    drawn = module._open(cfg, "train", limit).clips
    assert len(drawn) == limit == len({clip.name for clip in drawn})
    assert {clip.label for clip in drawn} == {0, 1, 2, 3}


class Peak(TorchDispatchMode):
    """The most bytes of float16 that were in memory at once, in tensors that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.seen = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float16:
            memory = out.untyped_storage()
            self.seen = {each: size for each, size in self.seen.items() if not each.expired()}
            self.seen[StorageWeakRef(memory)] = memory.nbytes()
            self.bytes = max(self.bytes, sum(self.seen.values()))
        return out


def test_features_of_all_clips_are_in_memory_once(backbone) -> None:
    cfg = Config(**{**SMALL, "batch": 60, "steps": (1,)})
    clips = module._open(cfg, "train", 40).clips
    with Peak() as peak:
        data = module._features(cfg, backbone, "train", clips, ["mirrored", "flipped"])
    whole = 2 * len(clips) * 3 * 6 * 16 * 48
    assert 2 * data.x.numel() == whole
    assert whole <= peak.bytes < 1.3 * whole
    at_once = module._features(replace(cfg, batch=1000), backbone, "train", clips, ["mirrored", "flipped"])
    torch.testing.assert_close(data.x, at_once.x)
    task = _Task(4, torch.arange(4).expand(3, 4), torch.tensor([1, 0, 3, 2]), slice(0, 5), True)
    data = _Features(data.x.repeat(1, 5, 1, 1, 1), data.real.repeat(5, 1), data.y.repeat(5))
    with Peak() as peak:  # 160 of 200 clips are held out, in one view of three; 64 are a batch
        module._chosen_head(replace(cfg, held_out=0.8, step_batch=8), task, data, torch.device("cpu"))
    assert 5 * whole <= peak.bytes < 1.4 * 5 * whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": ()}, "lr="),
        ({"steps": ()}, "steps is empty"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"frames": 0}, "frames=0"),
    ],
)
def test_wrong_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**settings)
