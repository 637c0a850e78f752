"""Results are added, never lost, and shown side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dinokit import results
from dinokit.__main__ import main
from dinokit.evaluation import read_list


def line(weights="runs/a", name="knn", settings=None, digest="aa", path="photos", **scores):
    settings = {"test": {"name": "folder", "path": path}, "k": [20], "workers": 3, **(settings or {})}
    return results.record(name, weights, scores, settings, {"fingerprint": digest})


def test_a_line_says_what_was_found_and_how():
    result = json.loads(json.dumps(line(top1=0.5)))
    assert (result["eval"], result["weights"], result["top1"]) == ("knn", "runs/a", 0.5)
    about = result["about"]
    assert about["data"] == {"test": {"name": "folder", "path": "photos"}}
    assert about["settings"] == {"k": [20]}  # how many workers there were decides nothing
    assert {"python", "torch", "dinokit"} <= set(about["software"])
    assert about["fingerprint"] == "aa"
    assert about["time"]


def test_numbers_of_clips_and_steps_are_no_scores():
    """The evaluator of clips returns how many clips and steps there were, as floats."""
    found = line(name="clips", accuracy=0.5, clips_train=240.0, clips_test=60.0, steps=400.0, lr=1e-3)
    assert [type(found[key]) for key in ("clips_train", "clips_test", "steps")] == [int] * 3
    (table,) = results.tables([found])
    assert [values for _, _, values in table.rows] == [[0.5]]


def test_old_lines_call_the_fingerprint_weights_hash():
    old = results.record("knn", "runs/a", {"top1": 0.1}, {}, {"weights_hash": "aa"})
    new = results.record("knn", "runs/a", {"top1": 0.2}, {}, {"fingerprint": "aa"})
    (table,) = results.tables([old, new])
    assert [values for _, _, values in table.rows] == [[0.2]]


def test_keys_of_a_source_that_the_evaluator_sets_are_not_settings():
    source = {"name": "parquet", "path": "a.parquet", "target": "mask", "channels": 3}
    result = results.record("depth", "w", {"rmse": 1.0}, {"test": source, "layers": 1}, {})
    assert result["about"]["data"] == {"test": {"name": "parquet", "path": "a.parquet"}}


def test_lines_are_added_and_one_that_was_cut_short_costs_only_itself(tmp_path):
    results.append(tmp_path / "run", line(top1=0.1))
    with (tmp_path / "run" / results.NAME).open("a") as file:
        file.write('{"eval": "knn", "wei')
    results.append(tmp_path / "run", line(top1=0.2))
    lines, broken = results.read([tmp_path])
    assert [each["top1"] for each in lines] == [0.1, 0.2]
    assert broken == [f"{tmp_path / 'run' / results.NAME}, line 2"]


def test_many_processes_add_at_once_and_no_line_is_lost(tmp_path):
    code = (
        "import sys\nfrom dinokit import results\n"
        "for i in range(50): results.append(sys.argv[1], {'eval': 'x', 'weights': 'w', 'about': {}, 'n': i})"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0, 0]
    lines, broken = results.read([tmp_path])
    assert (len(lines), broken) == (150, [])


def test_the_best_row_comes_first_and_the_last_result_counts():
    lines = [line("a", top1=0.9), line("b", top1=0.7), line("a", top1=0.6)]
    (table,) = results.tables(lines)
    assert table.title == "knn on photos"
    assert table.rows == [("b", "", [0.7]), ("a", "", [0.6])]
    assert table.best == [0.7]


def test_a_score_that_flatters_is_never_above_an_honest_one():
    lines = [line("runs/leaked", top1_optimistic=0.93, settings={"train": {"name": "x"}}), line(top1=0.47)]
    (table,) = results.tables(lines)
    assert table.columns == ["top1", "top1_optimistic"]
    assert [weights for weights, *_ in table.rows] == ["runs/a", "runs/leaked"]


def test_of_an_error_the_least_is_the_best():
    (table,) = results.tables([line("a", rmse=0.9, delta1=0.8), line("b", rmse=0.7, delta1=0.9)])
    assert table.best == [0.7, 0.9]
    assert [row[0] for row in table.rows] == ["b", "a"]


def test_an_old_line_with_more_source_keys_is_in_the_same_row():
    old = line(top1=0.4)
    old["about"]["data"]["test"] |= {"target": "mask", "channels": 3}
    assert len(results.tables([old, line(top1=0.5)])[0].rows) == 1


def test_other_data_make_another_table_and_other_settings_another_row():
    lines = [line(top1=0.1), line(top1=0.2, path="maps"), line(top1=0.3, settings={"k": [5]})]
    tables = {table.title: table for table in results.tables(lines)}
    assert set(tables) == {"knn on photos", "knn on maps"}
    assert tables["knn on photos"].rows == [("runs/a", "k=[5]", [0.3]), ("runs/a", "k=[20]", [0.1])]


def test_other_training_images_make_another_row():
    def trained_on(path, **more):
        return {"train": {"name": "folder", "path": path, **more}}

    lines = [
        line(top1=0.9, settings=trained_on("A")),
        line(top1=0.5, settings=trained_on("B")),
        line(top1=0.3, settings=trained_on("B", split="train")),
        line(top1=0.4, settings=trained_on("B", split="train")),
    ]
    (table,) = results.tables(lines)
    assert table.rows == [
        ("runs/a", "train.path=A", [0.9]),
        ("runs/a", "train.path=B", [0.5]),
        ("runs/a", "train.path=B train.split=train", [0.4]),
    ]


def test_the_last_line_of_several_files_is_the_last_by_the_clock_of_no_zone(tmp_path):
    times = {
        "2026-11-24T09:00:00+0900": 0.2,
        "2026-11-24T01:00:00+0000": 0.3,
        "2026-11-23T23:30:00+0000": 0.1,
    }
    old = line(top1=0.0)
    del old["about"]["time"]
    for when, top1 in times.items():
        found = line(top1=top1)
        (tmp_path / str(top1)).mkdir()
        results.append(tmp_path / str(top1), {**found, "about": {**found["about"], "time": when}})
    results.append(tmp_path, old)
    lines, _ = results.read([tmp_path])
    assert [each["top1"] for each in lines] == [0.0, 0.1, 0.2, 0.3]
    assert results.tables(lines)[0].rows == [("runs/a", "", [0.3])]


def test_the_line_that_was_added_last_counts_though_the_clock_was_set_back(tmp_path):
    line = {"eval": "knn", "weights": "w", "about": {}}
    for score, when in ((0.1, "2026-05-01T00:00:00+0000"), (0.2, "2026-04-01T00:00:00+0000")):
        results.append(tmp_path, {**line, "top1@20": score, "about": {"time": when}})
    other = {**line, "top1@20": 0.15, "about": {"time": "2026-04-15T00:00:00+0000"}}
    (tmp_path / "other").mkdir()
    results.append(tmp_path / "other", other)
    assert [each["top1@20"] for each in results.read([tmp_path])[0]] == [0.15, 0.1, 0.2]


def test_two_checkpoints_in_one_place_are_two_rows():
    (table,) = results.tables([line(top1=0.1, digest="aabbccdd"), line(top1=0.2, digest="eeff0011")])
    assert [row[0] for row in table.rows] == ["runs/a [eeff00]", "runs/a [aabbcc]"]


def test_counts_and_settings_that_came_out_are_no_columns():
    (table,) = results.tables([line(top1=0.1, images_test=7, lr=0.1, queries=3, mAP=0.2)])
    assert table.columns == ["top1", "mAP"]


def test_a_folder_without_results_is_reported(tmp_path, capsys):
    assert main(["results", str(tmp_path)]) == 3
    assert "There is no results.jsonl in" in capsys.readouterr().err
    assert main(["results", str(tmp_path / "nowhere")]) == 3
    assert "There is no folder" in capsys.readouterr().err


def test_the_tables_are_printed_for_people_or_as_json(tmp_path, capsys):
    results.append(tmp_path, line("a", top1=0.9))
    results.append(tmp_path, line("b", top1=0.7, rmse=1.0))
    assert main(["results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("0.9000") < shown.index("0.7000")
    assert main(["results", str(tmp_path), "--json"]) == 0
    [table] = json.loads(capsys.readouterr().out)["tables"]
    assert table["rows"][1] == ["b", "", [0.7, 1.0]]


def test_no_score_is_cut_short_however_many_there_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    scores = {f"a_score_{number}": number + 0.1234 for number in range(12)}
    for settings in ({"lr": 0.1, "crop": [120, 160]}, {"lr": 0.2, "crop": []}):
        results.append(tmp_path, line(name="depth", settings=settings, **scores))
    assert main(["results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(shown.count(f" {score:.4f} ") == 2 for score in scores.values())


def test_names_are_whole_in_a_pipe_and_fold_where_a_width_is_given(tmp_path, capsys, monkeypatch):
    name = "runs/" + "a_folder_with_a_long_name/" * 4
    results.append(tmp_path, line(name, a_score_with_a_long_name=0.5, another_score_with_a_long_name=0.25))
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert name in shown
    assert "another_score_with_a_long_name" in shown
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["results", str(tmp_path)]) == 0
    assert name not in capsys.readouterr().out


def test_what_was_found_while_training_is_shown_at_its_best_and_at_the_end(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("data: {name: folder, path: photos}\nevals: {knn: {every: 5}}\n")
    found = [(0, 0.1), (5, 0.5), (10, 0.3), (15, 0.4)]
    lines = [{"step": step, "knn/top1@20": value, "knn/images_test": 9} for step, value in found]
    lines.insert(2, {"step": 7, "loss": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + '{"step": 2')
    assert main(["results", str(tmp_path), "--json"]) == 0
    [table] = json.loads(capsys.readouterr().out)["tables"]
    assert table["title"] == "knn on photos, while training"
    assert table["columns"] == ["top1@20"]
    assert table["rows"] == [[str(run), "step=5", [0.5]], [str(run), "step=15", [0.4]]]
    assert table["best"] == [0.5]
    other = tmp_path / "a_run_of_other_k"
    other.mkdir()
    (other / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    (other / "metrics.jsonl").write_text(json.dumps({"step": 5, "knn/top1@10": 0.1}) + "\n")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 5, "knn/top1@20": 0.2}) + "\n")
    assert main(["results", str(tmp_path), "--json"]) == 0
    [table] = json.loads(capsys.readouterr().out)["tables"]
    assert [row[2] for row in table["rows"]] == [[0.1, None], [None, 0.2]]  # who lacks the first comes last


RECIPE = """
all:
  train: {name: scenes, split: train, count: 60}
  test: {name: scenes, split: test, count: 60, test_count: 30}
  workers: 0
knn: {k: [5]}
grid: {eval: linear, steps: 4, step_batch: 8, blocks: [1], pool: [false], lr: [0.1]}
retrieval: {k: [1]}
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def test_a_list_gives_every_evaluator_what_it_has_a_key_for(recipe):
    plan = read_list(str(recipe), {"grid": {"steps": 9}, "seed": 3, "test": {"test_count": 20}})
    assert [(each.label, each.name) for each in plan] == [
        ("knn", "knn"),
        ("grid", "linear"),
        ("retrieval", "retrieval"),
    ]
    assert (plan[1].values["steps"], plan[1].values["seed"]) == (9, 3)
    assert {each.values["test"]["test_count"] for each in plan} == {20}
    assert plan[0].values["train"]["count"] == 60
    with pytest.raises(ValueError, match=r"No evaluator of mine\.yaml reads a key 'sed'"):
        read_list(str(recipe), {"sed": 3})
    with pytest.raises(ValueError, match="there is no key 'stepps'"):
        read_list(str(recipe), {"grid": {"stepps": 3}})


def test_another_method_than_the_list_has_takes_what_it_reads_and_leaves_the_rest():
    def values(overrides):
        return {each.label: each.values for each in read_list("eval_scenes", overrides)}

    plain, changed = values({}), values({"depth": {"method": "mean"}, "save_every": 9})
    assert (plain["depth"]["steps"], plain["depth"]["bins"]) == (300, 64)
    assert changed["depth"] == {
        **plain["depth"], "method": "mean",
        "layers": 4, "augment": True, "steps": 38_400, "lr": 1e-4, "bins": 256,
    }  # fmt: skip
    assert changed["linear"] == {**plain["linear"], "save_every": 9}
    assert changed["segmentation"] == plain["segmentation"]  # by its neighbours: nothing is trained
    with pytest.raises(ValueError, match=r"No evaluator of eval_scenes\.yaml reads a key 'c'"):
        values({"c": [0.1]})


def test_a_key_without_a_section_is_above_what_the_list_says():
    values = {
        each.label: each.values for each in read_list("eval_scenes", {"steps": 9, "depth": {"steps": 8}})
    }
    assert (values["linear"]["steps"], values["depth"]["steps"]) == (9, 8)


def test_what_a_list_leaves_open_may_be_given_where_a_method_is_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("segmentation: {steps: '???', train: {path: '???'}}\n")
    given = {"segmentation": {"steps": 9, "train": {"path": "here"}}}
    assert read_list(str(path), given)[0].values["steps"] == 9
    with pytest.raises(ValueError, match=r"segmentation\.steps"):
        read_list(str(path), {})


def test_null_takes_a_section_out_of_a_list_and_braces_put_it_back_to_its_defaults(recipe):
    plan = read_list(str(recipe), {"grid": {}, "knn": None})
    assert [(each.label, each.name) for each in plan] == [("grid", "linear"), ("retrieval", "retrieval")]
    assert (plan[0].values["steps"], plan[0].values["blocks"]) == (12_500, (1, 4))
    assert plan[0].values["train"]["count"] == 60  # what stands in `all` is no part of the section
    with pytest.raises(ValueError, match=r"knn=7: it is a section, as in knn\.KEY=7\."):
        read_list(str(recipe), {"knn": 7})


def test_what_nothing_reads_of_a_list_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("segmentation: {method: majority, k: 7}\n")
    with pytest.raises(ValueError, match=r"segmentation\.k: only with method=knn, and here"):
        read_list(str(path), {})
    assert read_list(str(path), {"segmentation": {"method": "knn"}})[0].values["k"] == 7


def test_a_list_is_evaluated_printed_and_saved(recipe, tmp_path, capsys):
    words = [
        "backbone.name=pixels",
        f"recipe={recipe}",
        f"out={tmp_path / 'out'}",
        f"cache={tmp_path / 'cache'}",
    ]
    assert main(["eval", "all", *words]) == 0
    shown = capsys.readouterr().out.splitlines()
    printed = [json.loads(text) for text in shown if text.startswith("{")]
    assert [each["eval"] for each in printed] == ["knn", "linear", "retrieval"]
    saved, _ = results.read([tmp_path / "out"])
    assert [{**each, "file": ""} for each in saved] == [{**each, "file": ""} for each in printed]
    assert (
        len(list((tmp_path / "cache").iterdir())) == 2
    )  # the class tokens of train and of test, for all three
    assert {each["weights"] for each in saved} == {"backbone.name=pixels"}
    assert len({each["about"]["fingerprint"] for each in saved}) == 1
    assert saved[0]["about"]["transform"]["size"] == 64


def test_a_failed_evaluator_does_not_stop_the_others(recipe, tmp_path, capsys):
    words = ["backbone.name=pixels", f"recipe={recipe}", f"out={tmp_path / 'out'}", "cache=null"]
    assert main(["eval", "all", *words, "grid.blocks=[2]"]) == 3
    output = capsys.readouterr()
    assert [json.loads(text)["eval"] for text in output.out.splitlines() if text.startswith("{")] == [
        "knn",
        "retrieval",
    ]
    assert "grid: 2 blocks were asked for, but Pixels has none" in output.err
    assert "1 of 3 evaluators failed: grid" in output.err
