"""Rankings by hand, against scikit-learn, and on a small truth file of the Revisited kind."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score

from dinokit.config.load import section_values
from dinokit.eval._metrics import revisited_scores
from dinokit.eval.retrieval import Config, evaluate, labelled_scores, read_truth, whitening


def unit(n, width, seed=0):
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def config(**values):
    return Config(**section_values("eval", "retrieval", {"workers": 0, **values}, "retrieval"))


def test_labelled_scores_are_their_definitions_query_by_query():
    x, y = unit(300, 4), torch.randint(40, (300,), generator=torch.Generator().manual_seed(1))
    y[0] = 99  # alone in its class: it looks for nothing, and nobody looks for it
    scores = labelled_scores(x, y, x, y, [1, 5], exclude_self=True)
    whole, first, hits = [], [], {1: [], 5: []}
    for i in range(1, 300):
        others = [j for j in range(300) if j != i]
        cosine, same = (x[i] @ x[others].T).numpy(), (y[others] == y[i]).numpy()
        if not same.any():
            continue
        whole.append(average_precision_score(same, cosine))
        ranked, r = same[np.argsort(-cosine)], int(same.sum())
        first.append(sum(ranked[:k].mean() * ranked[k - 1] for k in range(1, r + 1)) / r)
        for k, found in hits.items():
            found.append(ranked[:k].any())
    assert scores["queries"] == len(whole) < 300
    assert scores["mAP"] == pytest.approx(np.mean(whole), abs=1e-5)
    assert scores["mAP@R"] == pytest.approx(np.mean(first), abs=1e-5)
    for k, found in hits.items():
        assert scores[f"recall@{k}"] == pytest.approx(np.mean(found))


def test_queries_of_their_own_may_find_everything_and_distractors_only_stand_in_the_way():
    bank = torch.eye(3)
    query = F.normalize(torch.tensor([[1.0, 0.1, 0.0], [0.1, 0.0, 1.0]]), dim=1)
    classes, labels = torch.tensor([0, 0]), torch.tensor([0, 1, -1])
    scores = labelled_scores(query, classes, bank, labels, [1], exclude_self=False)
    assert scores == {"recall@1": 0.5, "mAP": (1 + 1 / 2) / 2, "mAP@R": 0.5, "queries": 2}


def test_queries_without_positives_are_refused():
    with pytest.raises(ValueError, match="No query has another image"):
        labelled_scores(unit(3, 2), torch.arange(3), unit(3, 2), torch.arange(3), [1], exclude_self=True)


def test_whitened_features_vary_alike_along_every_axis():
    x = torch.randn(500, 5, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([9.0, 3, 1, 0.1, 0])
    )
    middle, white = x.mean(dim=0), whitening(x + 7, 0.5)
    rows = white(x + 7)
    assert rows.shape == (500, 4)  # one axis has no extent
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(500))
    # Along the axes alone, before the length is taken away: Mahalanobis distance, whose cosine stays.
    centred = (x - middle).double()[:, :4]
    inverse = torch.linalg.inv(centred.T @ centred / 500)
    a, b = centred[0], centred[1]
    cosine = (a @ inverse @ b) / ((a @ inverse @ a) * (b @ inverse @ b)).sqrt()
    assert float(rows[0] @ rows[1]) == pytest.approx(float(cosine), abs=1e-4)


def test_average_precision_of_the_revisited_kind_by_hand():
    # Ranked: hard, junk, easy, nothing, easy. Without hard and junk, easy ones stand at places 1 and 3.
    truth = {"easy": [2, 4], "hard": [0], "junk": [1]}
    scores = revisited_scores(torch.tensor([[0, 1, 2, 3, 4]]), [truth], [1, 2])
    assert scores["mAP easy"] == pytest.approx(((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    assert scores["mAP hard"] == 1.0
    assert scores["mAP medium"] == pytest.approx((1 + 1 + (2 / 3 + 3 / 4) / 2) / 3)
    assert scores["mP@1 easy"] == 1.0
    assert scores["mP@2 easy"] == 0.5
    assert (
        scores["mP@2 hard"] == 1.0
    )  # nothing is left to find behind the first, so only one place is asked for


def test_a_protocol_without_a_truth_is_left_out():
    truth = {"easy": [0], "hard": [], "junk": []}
    assert "mAP hard" not in revisited_scores(torch.tensor([[0, 1]]), [truth], [1])


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def test_a_truth_file_that_would_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps({"imlist": [], "qimlist": [], "gnd": [Evil()]}))
    with pytest.raises(ValueError, match=r"builtins.print, which is not plain data"):
        read_truth(str(path))
    assert capsys.readouterr().out == ""


@pytest.fixture
def places(tmp_path):
    """Gallery: red, dark red, green, half red and half blue. Query: the red half of the last kind."""
    folder = tmp_path / "jpg"
    folder.mkdir()
    colours = {"red": (220, 0, 0), "dark": (150, 10, 0), "green": (0, 200, 0)}
    for name, colour in colours.items():
        Image.new("RGB", (40, 24), colour).save(folder / f"{name}.png")
    mixed = np.zeros((24, 40, 3), np.uint8)
    mixed[:, :20] = (220, 0, 0)
    mixed[:, 20:] = (0, 0, 220)
    Image.fromarray(mixed).save(folder / "query.png")
    Image.fromarray(mixed).save(folder / "mixed.png")
    truth = {
        "imlist": ["green", "mixed", "dark", "red"],
        "qimlist": ["query"],
        "gnd": [{"bbx": np.array([0.0, 0.0, 20.0, 24.0]), "easy": np.array([3]), "hard": [2], "junk": [1]}],
    }
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(truth))
    return {"test": {"name": "folder", "path": str(folder)}, "truth": str(tmp_path / "gnd.pkl"), "size": 32}


@pytest.mark.parametrize("scales", [[1.0], [1.0, 0.7071, 0.5]])
def test_a_query_is_cut_out_by_its_box_and_finds_its_place(places, mean, scales):
    scores = evaluate(config(**places, scales=scales, k=[1]), mean)
    assert scores["mAP medium"] == scores["mP@1 easy"] == 1.0
    assert (scores["queries"], scores["images_test"]) == (1, 4)


def test_a_truth_file_may_be_json_and_its_images_must_be_there(places, mean, tmp_path):
    images, queries = read_truth(places["truth"])
    table = {"imlist": images, "qimlist": ["query"], "gnd": [{"bbx": None, **queries[0].truth}]}
    path = tmp_path / "gnd.json"
    path.write_text(json.dumps(table))
    assert read_truth(str(path))[1][0].truth == queries[0].truth
    path.write_text(json.dumps({**table, "imlist": ["green", "gone", "dark", "red"]}))
    with pytest.raises(ValueError, match="names 1 images that do not exist: 'gone'"):
        evaluate(config(**{**places, "truth": str(path)}), mean)


def test_each_image_finds_the_others_of_its_colour(colours, mean):
    scores = evaluate(config(test=colours["test"]), mean)
    assert scores["recall@1"] == scores["mAP"] == scores["mAP@R"] == 1.0
    assert scores["queries"] == 12


def test_one_class_alone_is_refused_since_whatever_is_found_would_be_right(colours, mean):
    red = {**colours["test"], "path": f"{colours['test']['path']}1"}
    shutil.copytree(Path(colours["test"]["path"]) / "red", Path(red["path"]) / "red")
    with pytest.raises(ValueError, match=r"one class only, 'red'.* two classes or more"):
        evaluate(config(test=red), mean)
    scores = evaluate(config(test=red, distractors=colours["train"]), mean)
    assert scores["queries"] == 3


def test_copies_are_found_among_originals_and_distractors(colours, mean, tmp_path):
    sections = {"query": colours["train"], "whiten": colours["train"], "distractors": colours["train"]}
    scores = evaluate(config(test=colours["test"], features="copy", power=0.25, **sections), mean)
    assert scores["queries"] == 30
    assert 0 < scores["mAP"] < 1  # each stands among the distractors itself
    assert evaluate(config(test=colours["test"], features="copy", query=colours["train"]), mean)["mAP"] == 1.0
