"""What an alignment is used for: captions, the command, evaluators, search and segment by words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinokit.__main__ import main
from dinokit.config import registry
from dinokit.data.dense import IGNORE
from dinokit.data.scenes.captioned import COLOURS, SHAPES
from dinokit.eval import text_retrieval
from dinokit.eval._align import class_words, of_classes
from dinokit.eval.text_retrieval import pairs, recall, swap_scores
from dinokit.eval.zeroshot_segmentation import pointing
from dinokit.language.aligned import load_aligned
from dinokit.models.vit import Config, VisionTransformer
from dinokit.weights.checkpoint import read_safetensors
from dinokit.weights.formats.native import save_backbone

TINY = [
    "data.size=32", "view.size=32", "data.count=16", "head.width=16", "head.depth=1", "head.heads=2",
    "head.embedding=8", "text.width=16", "text.depth=1", "text.heads=2", "steps=2", "batch=4", "device=cpu",
    "run.log_every=1",
]  # fmt: skip

SPLITS = ("all", "train", "test")


def build(kind, **section):
    return registry.build(kind, section)


def test_captions_of_a_board_are_true_and_all_there_is_to_say():
    source = build("data.captions", name="captioned", size=32, count=30, test_count=10)
    assert len(source) == 40
    assert source.name(35) == "captioned test 5"
    several = 0
    for index in range(40):
        board, (whole, one, *two) = source.board(index), source.captions(index)
        assert len(whole) == 1
        for thing in board.things:
            names = {f"a {COLOURS[thing.colour]} {SHAPES[thing.shape]}", f"a {COLOURS[thing.colour]} thing"}
            assert names | {f"a {SHAPES[thing.shape]}"} <= set(one)
        colours = {COLOURS[thing.colour] for thing in board.things}
        assert {word for text in one for word in text.split()} & set(COLOURS) == colours
        sides = {(a.cell, b.cell) for a in board.things for b in board.things if a.cell != b.cell}
        assert bool(two) == (len(board.things) > 1)
        lined = {(a, b) for a, b in sides if a % 3 != b % 3}, {(a, b) for a, b in sides if a // 3 != b // 3}
        assert sum(map(len, two)) == len(lined[0]) + len(lined[1])
        swap = source.exchanged(index)
        several += swap is not None
        if swap:
            assert sorted(swap[0].split()) == sorted(swap[1].split())
            assert swap[0] != swap[1]
            assert [swap[0]] == whole
    assert several > 10


def test_a_relation_holds_on_the_board():
    source = build("data.captions", name="captioned", size=32, count=1, things=(2, 4))
    first, second = sorted(source.board(0).things, key=lambda thing: thing.cell)[:2]
    a, b = (f"a {COLOURS[t.colour]} {SHAPES[t.shape]}" for t in (first, second))
    texts = source.captions(0)[2]
    assert (f"{a} above {b}" in texts) == (first.cell // 3 < second.cell // 3)
    assert (f"{a} left of {b}" in texts) == (first.cell % 3 < second.cell % 3)
    assert (f"{b} right of {a}" in texts) == (first.cell % 3 < second.cell % 3)


def test_captions_of_files(tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 6)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"one  {name}\n\n two {name} \n")
    source = build("data.captions", name="folder", path=str(tmp_path), split="all")
    assert (len(source), source.captions(1)) == (3, [["one b", "two b"]])
    assert source[0][0].size == (8, 6)
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"b\.txt: there is no caption with a word"):
        source.captions(1)
    (tmp_path / "c.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images have no text beside them, such as .*c\.png"):
        build("data.captions", name="folder", path=str(tmp_path), split="all")
    listed = {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
        "annotations": [
            {"image_id": 7, "caption": "a b"}, {"image_id": 3, "caption": "an a."},
            {"image_id": 7, "caption": "b"},
        ],
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(listed))
    source = build("data.captions", name="coco", path=str(tmp_path), annotations="c.json")
    captions = {source.file(i).name: source.captions(i) for i in range(2)}
    assert captions == {"a.png": [["an a."]], "b.png": [["a b", "b"]]}
    listed["annotations"].append({"image_id": 9, "caption": "x"})
    (tmp_path / "c.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="captions of images that it does not list, such as 9"):
        build("data.captions", name="coco", path=str(tmp_path), annotations="c.json")
    (tmp_path / "c.json").write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="is no file of captions"):
        build("data.captions", name="coco", path=str(tmp_path), annotations="c.json")


def test_maps_of_the_captioned_world_have_the_colour_of_each_thing():
    source = build("data.dense", name="captioned", size=32, count=3, labels="pair", split="train")
    image, target = source[1]
    board = build("data.captions", name="captioned", size=32, count=3).board(1)
    shown = {COLOURS[t.colour] + " " + SHAPES[t.shape] for t in board.things}
    assert {source.classes[i] for i in np.unique(target) if i != IGNORE} == shown
    assert target.shape == (32, 32) == image.size


def test_the_vector_of_a_class_is_the_mean_over_templates():
    table = {"a red": [1.0, 0], "the red": [0, 1.0], "a blue": [0.6, 0.8], "the blue": [0.6, 0.8]}
    got = of_classes(
        lambda texts: torch.tensor([table[t] for t in texts]), ["red", "blue"], ["a {}", "the {}"]
    )
    torch.testing.assert_close(got, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))
    assert class_words((), ["traffic_light"]) == ["traffic light"]
    with pytest.raises(ValueError, match="names has 1 words, but there are 2 classes: a, b"):
        class_words(("x",), ["a", "b"])


def test_recall_counts_any_right_caption_among_the_first():
    right = pairs([["a", "b"], ["c"], ["b"]], ["a", "b", "c"])
    assert right.tolist() == [[True, True, False], [False, False, True], [False, True, False]]
    cosine = torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.4, 0.1], [0.9, 0.1, 0.5]])
    assert [recall(cosine, right, k) for k in (1, 2, 3, 9)] == [
        pytest.approx(x) for x in (1 / 3, 1 / 3, 1, 1)
    ]


def test_pointing_asks_for_each_class_of_an_image():
    truth = torch.full((4, 4), IGNORE)
    truth[:2, :2], truth[2, 2] = 0, 1  # the pixel (2, 2) is the centre
    maps = torch.zeros(3, 4, 4)
    maps[0, 0, 1], maps[1, 3, 3], maps[2, 0, 0] = 1, 1, 1
    longest = torch.zeros(4, 4)
    longest[:2, :2] = 1
    assert pointing(maps, longest, truth) == [(True, False, True), (False, True, False)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with weights, an alignment of two steps and three photos."""
    place = tmp_path_factory.mktemp("use")
    torch.manual_seed(0)
    section = {"size": 32, "patch": 8, "width": 64, "depth": 1, "heads": 2}
    save_backbone(place / "vit.safetensors", VisionTransformer(Config(**section)), {"name": "vit", **section})
    recipe = ["align", "align_captioned_cpu", f"weights={place / 'vit.safetensors'}", f"out={place / 'run'}"]
    assert main([*recipe, *TINY, "--quiet"]) == 0
    (place / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"photos/{number}.png")
    return place


def test_a_run_resumes_with_the_backbone_that_it_began_with(trained, tmp_path, capsys):
    folder = shutil.copytree(trained / "run", tmp_path / "run")
    recipe = (folder / "recipe.yaml").read_text()
    other = tmp_path / "other.safetensors"
    section = {"size": 32, "patch": 8, "width": 64, "depth": 1, "heads": 2}
    save_backbone(other, VisionTransformer(Config(**section)), {"name": "vit", **section})
    changed = recipe.replace(str(trained / "vit.safetensors"), str(other)).replace(
        str(trained), str(tmp_path)
    )
    (folder / "recipe.yaml").write_text(changed)
    assert main(["align", "align_captioned_cpu", f"weights={other}", f"out={folder}", *TINY]) != 0
    assert "The fingerprint of the backbone was" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """But for the biases of keys, whose gradient is nothing but rounding: attention does not read them."""
    raw = [f"backbone.{text}" for text in ("name=raw_patches", "size=32", "patch=8", "cell=4")]
    found = []
    for count in (1, 2):
        launcher = ["torch.distributed.run", "--nproc-per-node", f"{count}", "-m"] if count > 1 else []
        words = ["-m", *launcher, "dinokit", "align", "align_captioned_cpu", *raw, *TINY, "optim.warmup=0"]
        out = tmp_path / f"{count}"
        done = subprocess.run(
            [sys.executable, *words, f"out={out}"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append([read_safetensors(out / f"{name}.safetensors")[0] for name in ("head", "text/model")])
    for one, two in zip(*found, strict=True):
        for name, x in one.items():
            if name.endswith("qkv.bias"):
                x, two[name] = (torch.cat([bias[:16], bias[32:]]) for bias in (x, two[name]))
            if not name.endswith("key.bias"):
                torch.testing.assert_close(x, two[name], rtol=0, atol=1e-5)


def scores(capsys, *words):
    capsys.readouterr()
    assert main([*words, "--json", "--quiet"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_evaluators_by_words(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        f"weights={trained / 'vit.safetensors'}",
        f"align={trained / 'run'}",
        "test.size=32",
        "device=cpu",
    ]
    world = [
        "test.name=captioned",
        "test.split=test",
        "test.test_count=20",
    ]
    found = scores(
        capsys, "eval", "zeroshot", *given, *world, "test.labels=colour", "templates=['a {} thing','a {}']"
    )
    assert {"top1", "top5", "top1 first template", "mean_per_class"} <= found.keys()
    found = scores(capsys, "eval", "text_retrieval", *given, *world, "k=[1,8]")
    aligned = load_aligned(trained / "run", trained / "vit.safetensors", "cpu")
    source = build("data.captions", name="captioned", size=32, split="test", test_count=20)
    whole = [source.captions(i)[0][0] for i in range(20)]
    cosine = aligned.image([source[i][0] for i in range(20)]) @ aligned.text(whole).T
    nearer = [sum(row > row[i]).item() for rows in (cosine, cosine.T) for i, row in enumerate(rows)]
    assert len(set(whole)) == found["captions_test"] == 20
    for k in (1, 8):
        right = [sum(rank < k for rank in ranks) / 20 for ranks in (nearer[:20], nearer[20:])]
        assert [found[f"text recall@{k}"], found[f"image recall@{k}"]] == pytest.approx(right)
    assert 0 < found["text recall@8"] < 1
    assert {"shuffled recall@1", "swap", "swaps"} <= found.keys()
    found = scores(capsys, "eval", "zeroshot_segmentation", *given, *world, "max_test=6", f"out={tmp_path}")
    assert {"mIoU", "pointing", "pointing centre", "pointing longest"} <= found.keys()
    assert found["images_test"] == 6
    assert [*tmp_path.rglob("predictions.npz")]


def test_a_bag_of_words_is_right_in_half_of_the_swaps(trained):
    source = build("data.captions", name="captioned", size=32, count=60, things=(2, 4), split="train")
    aligned = load_aligned(trained / "run", trained / "vit.safetensors", "cpu")
    numbers = [*range(60)]
    images = aligned.image([source[i][0] for i in numbers])
    places = aligned.tower.encoder.embeddings.position_embeddings.weight.data
    said = aligned.text([source.captions(i)[0][0] for i in numbers])  # as images that show just that
    as_it_is = swap_scores(aligned, source, numbers, said)
    places.zero_()  # no word knows its place
    without = swap_scores(aligned, source, numbers, images)
    assert without["swap"] == 0.5
    assert as_it_is["swap"] > 0.6  # after two steps many differ by less than a tie
    assert 10 < without["swaps"] == as_it_is["swaps"]


def test_captions_of_boards_in_motion_are_true():
    source = build("data.captions", name="moving", size=32, count=6, test_count=10, frames=9)
    assert len(source) == 16
    assert source.name(8) == "captioned test 2"
    for index in range(16):
        (whole,), (moves,) = source.captions(index)
        clip, way = source.clip(index), moves.split()[-1]
        assert whole.startswith(moves)
        frames = clip.frames(range(9)).astype(int)
        assert np.array_equal(np.asarray(source[index][0]), frames[4])
        changed = abs(frames[[0, -1]] - np.median(frames, axis=0)).sum(axis=3) > 60
        (y0, x0), (y1, x1) = (np.argwhere(each).mean(axis=0) for each in changed)
        steps = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
        assert way == max(steps, key=steps.get)
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[way]
        other = moves.replace(f"moves {way}", f"moves {opposite}")
        assert source.exchanged(index) == (whole, whole.replace(moves, other, 1))


def test_videos_of_a_list_with_their_captions(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for n in range(3):
            Image.new("RGB", (8, 6), (n, 0, 0)).save(tmp_path / f"{name}/{n}.png")
    lines = ["path,label", "a,a dog  runs", "b,a cat", '"a",it runs']
    (tmp_path / "v.csv").write_text("\n".join(lines))
    source = build("data.captions", name="videos", path=str(tmp_path / "v.csv"))
    assert [source.captions(n) for n in range(len(source))] == [[["a dog runs", "it runs"]], [["a cat"]]]
    assert source[0][0][0, 0, 0] == 1
    assert len(source.clip(1)) == 3
    (tmp_path / "v.csv").write_text("path,label,split\na,a dog,train\nb,a cat,test\n")
    parts = [
        build("data.captions", name="videos", path=str(tmp_path / "v.csv"), split=each) for each in SPLITS
    ]
    assert [[each.name(n)[-1] for n in range(len(each))] for each in parts] == [["a", "b"], ["a"], ["b"]]
    (tmp_path / "v.csv").write_text("path,label,split\na,a dog,test\nb,a cat,test\na,a dog,test\na,it,test")
    only = build("data.captions", name="videos", path=str(tmp_path / "v.csv"))  # as the default, all
    assert [only.captions(n) for n in range(len(only))] == [[["a dog", "it"]], [["a cat"]]]
    (tmp_path / "v.csv").write_text("path,label\na,a dog\nc,a cat\n")
    with pytest.raises(ValueError, match=r"line 3: .*c does not exist"):
        build("data.captions", name="videos", path=str(tmp_path / "v.csv"))


def test_videos_and_captions_find_each_other_by_the_mean_of_frames(trained, capsys, tmp_path, monkeypatch):
    """Against loops over frames; a video and the same backwards have one vector."""
    monkeypatch.chdir(tmp_path)
    files = [f"weights={trained / 'vit.safetensors'}", f"align={trained / 'run'}", "device=cpu"]
    keys = {"name": "moving", "size": 32, "split": "test", "test_count": 16, "frames": 9}
    words = [f"test.{key}={value}" for key, value in keys.items()]
    found = scores(capsys, "eval", "text_retrieval", *files, *words, "frames=3", "k=[1,4]")
    aligned = load_aligned(trained / "run", trained / "vit.safetensors", "cpu")
    source = build("data.captions", **keys)
    texts = aligned.text([source.captions(n)[0][0] for n in range(16)])
    for frames, name, ks in (([1, 4, 7], "", (1, 4)), ([4], "middle frame ", (1,))):
        rows = []
        for n in range(16):
            mean = sum(aligned.image(source.clip(n).frames([frame])[0])[0] for frame in frames)
            rows.append(mean / mean.norm())
        cosine = torch.stack(rows) @ texts.T
        for k in ks:
            for side, table in (("text", cosine), ("image", cosine.T)):
                right = [(row > row[i]).sum().item() < k for i, row in enumerate(table)]
                assert found[f"{name}{side} recall@{k}"] == pytest.approx(sum(right) / 16)
    assert found["swaps"] == 16
    images = ["test.name=captioned", "test.size=32", "test.split=test", "test.test_count=4"]
    assert main(["eval", "text_retrieval", *files, *images, "frames=8"]) == 2
    assert "frames=8: test.name=captioned has images" in capsys.readouterr().err
    cfg = text_retrieval.Config(frames=9)
    pooled = [
        text_retrieval.pooled_frames(cfg, aligned, [clip])
        for clip in (source.clip(0), Backwards(source.clip(0)))
    ]
    torch.testing.assert_close(*pooled, rtol=0, atol=1e-6)


class Backwards:
    """A clip with its frames in the opposite order."""

    def __init__(self, clip):
        self.clip, self.seconds = clip, clip.seconds

    def __len__(self):
        return len(self.clip)

    def frames(self, indices):
        return self.clip.frames([len(self.clip) - 1 - index for index in indices])


def test_search_and_segment_by_words(trained, capsys, tmp_path):
    given = [f"weights={trained / 'vit.safetensors'}", f"align={trained / 'run'}", "device=cpu"]
    photos = trained / "photos"
    found = scores(
        capsys, "search", *given, f"data.path={photos}", "k=2", f"out={tmp_path / 'a.png'}", "a red disc"
    )
    hits = found["found"]["a red disc"]
    assert len(hits) == 2
    assert hits[0]["similarity"] >= hits[1]["similarity"]
    aligned = load_aligned(trained / "run", trained / "vit.safetensors", "cpu")
    cosine = aligned.image(hits[0]["image"]) @ aligned.text(["a red disc"]).T
    assert cosine.item() == pytest.approx(hits[0]["similarity"], abs=1e-5)
    files = {"weights": trained / "vit.safetensors", "align": trained / "run"}
    by_hub = torch.hub.load(
        Path(__file__).parents[2], "dinokit_aligned", source="local", device="cpu", **files
    )
    assert torch.equal(by_hub.text(["a red disc"]), aligned.text(["a red disc"]))
    out = tmp_path / "mask.png"
    found = scores(
        capsys, "segment", str(photos / "1.png"), *given, "text=a red disc", "level=0.8", f"out={out}"
    )
    mask, place = np.asarray(Image.open(out)), aligned.place(photos / "1.png", "a red disc").numpy()
    assert mask.shape == (40, 30) == place.shape
    assert set(np.unique(mask)) == {0, 255}
    share = (place - place.min()) / np.ptp(place)
    sure = abs(share - 0.8) > 1e-4
    assert np.array_equal(mask[sure] == 255, share[sure] > 0.8)
    assert sure.mean() > 0.9
    assert found["area"] == [int((mask > 0).sum())]


def test_wrong_commands_are_named(trained, capsys):
    weights = f"weights={trained / 'vit.safetensors'}"
    for words, text in [
        (["align", "align_captioned_cpu"], "Give either weights=FILE_OR_RUN or backbone.name=NAME"),
        (["align", "align_captioned_cpu", weights, "data=null"], "data.name must be given"),
        (["align", "align_captioned_cpu", weights, "head.width=10"], "head.width=10"),
        (["eval", "zeroshot", weights, "test.name=captioned"], "align=RUN must be given"),
        (["eval", "zeroshot", weights, "align=x", "templates=[photo]"], "'photo' has no {}"),
        (["search", weights, "align=x", "a disc"], "data.path=FOLDER"),
        (["search", "a.png"], "Give index=FOLDER"),
        (["segment", "a.png", weights, "text=a disc"], "needs align=RUN"),
    ]:
        assert main([*words]) != 0
        assert text in capsys.readouterr().err
