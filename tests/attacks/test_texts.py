"""What an attacker put into texts that reach a terminal, a page or a table: each test does the same."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from dinokit import results
from dinokit.__main__ import main
from dinokit.runtime.files import file_cell, text_cell, write_text
from dinokit.runtime.log import read_records

ESCAPE = "\x1b]0;title\x07\x1b[31mred\nforged\u202e [bold]x[/bold] [/y] <script>alert(1)</script>"


def test_results_out_of_a_file_are_shown_as_they_are(tmp_path, capsys):
    about = {"data": {"test": {"path": ESCAPE}}, "settings": {ESCAPE: ESCAPE}, "fingerprint": "a"}
    line = {"eval": ESCAPE, "weights": ESCAPE, f"top1{ESCAPE}": 0.5, "about": about}
    other = {**line, "about": {**about, "settings": {ESCAPE: "2"}}}
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(other)}\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, f"knn{ESCAPE}/top1": 0.5}))
    assert main(["results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "0.5000" in shown
    assert not any(c in shown for c in "\x1b\x07\u202e")


BAD_LINES = [
    "[1]", '"x"', "null", "{", '{"step": 1e999}', '{"step": null}', '{"step": "a"}', "[" * 100_000,
    json.dumps({"step": 2, "knn/top1": 10**400}), '{"step": 2, "knn/": 1, "/": 2, "knn/ ": 3}',
    '{"eval": ["k"], "weights": {}, "about": {}}', '{"eval": "k", "weights": "w", "about": {"data": [1]}}',
    '{"eval": "k", "weights": "w", "about": {"data": {"test": "x"}, "settings": {}}}',
    '{"eval": "k", "weights": "w", "about": {"settings": "x"}}', '{"eval": "k", "weights": "w", " ": 1}',
    json.dumps({"eval": "k", "weights": "w", "about": {}, "top1": 10**400, "": 1, "x": [1]}),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_of_another_kind_among_records_and_results_hides_no_other(bad, tmp_path, capsys):
    good = {"eval": "knn", "weights": "w", "top1@20": 0.25, "about": {}}
    (tmp_path / "results.jsonl").write_text(f"{bad}\n{json.dumps(good)}\n")
    (tmp_path / "metrics.jsonl").write_text(f'{bad}\n{{"step": 3, "knn/top1@20": 0.75}}\n')
    assert main(["results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "0.2500" in shown
    assert "0.7500" in shown
    assert read_records(tmp_path)[-1] == {"step": 3, "knn/top1@20": 0.75}
    assert results.read([tmp_path])[0][-1]["top1@20"] == 0.25


NAMES = [
    "a\x1b[31m.png",
    "b\nforged.png",
    os.fsdecode(b"\xff\xfe.png"),
    "\u202egnp.exe.png",
    "n" * 250 + ".png",
]


def test_file_names_of_any_bytes_reach_no_terminal_and_no_table_as_commands(
    tmp_path, weights, write_images, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DINOKIT_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "images", [*NAMES, "=1+1.png"], ["=cmd|calc!A0", "@x"])
    predict = ["predict", f"weights={weights}", "labelled.path=images", "k=1"]
    shutil.copy("images/@x/=1+1.png", "@1.png")
    assert main([*predict, "data.path=images/@x"]) == 0
    assert main([*predict, "@1.png", "out=one.csv"]) == 0
    assert main([*predict, "data.path=images/@x", "out=labels.csv"]) == 0
    assert main(["extract", f"weights={weights}", "data.path=images", "out=store", "workers=0"]) == 0
    assert main(["search", "index=store", "@1.png", "images/@x", "k=9", "out=s.png"]) == 0
    assert main(["doctor", "images"]) in (0, 3)
    shown = capsys.readouterr()
    for character in "\x1b\u202e\udcff":
        assert character not in shown.out + shown.err
    with Path("labels.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {f"images/@x/{name}" for name in [*NAMES, "=1+1.png"]}
    assert {row["label"] for row in rows} == {"'@x"}
    assert Path("one.csv").read_text().splitlines()[1] == "./@1.png,'@x,1.0000"
    assert (text_cell("=1"), file_cell("=1.png"), text_cell("emu")) == ("'=1", "./=1.png", "emu")


def test_an_argument_that_is_no_utf8_is_named(capsys):
    assert main(["extract", "weights=w", "data.path=x", os.fsdecode(b"out=\xff")]) == 2
    assert "out=\\udcff: settings are UTF-8" in capsys.readouterr().err


def test_the_name_of_a_row_of_a_sweep_is_no_place_above_its_folder(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(f"recipe: scenes_cpu\nrows: {{'..': []}}\nout: {tmp_path / 'out'}\n")
    assert main(["sweep", str(tmp_path / "s.yaml"), "--dry-run"]) == 2
    assert "Row '..' has no letter or digit" in capsys.readouterr().err


def test_a_result_that_cannot_be_saved_is_in_the_error(tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(OSError, match=r'could not be added .* It is: {"top1": 0\.5}'):
        results.append(tmp_path, {"eval": "knn", "weights": "w", "top1": 0.5, "about": {}})


def test_a_file_of_the_longest_name_is_written(tmp_path):
    path = tmp_path / ("n" * 255)
    write_text(path, "x")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [(path.name, "x")]
