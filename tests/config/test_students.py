"""Recipes of several students: whose settings count, and which numbers of processes fit."""

import pytest

from dinokit.config.load import load_recipe, student_shares
from dinokit.config.students import check_keep, ranks_of

RECIPE = """
backbone: {name: vit, size: 32, width: 24, depth: 2, heads: 2, patch: 8}
students:
  small: {}
  large: {share: 2, backbone: {width: 48}, optim: {lr: 2e-3}}
  other: {backbone: {name: timm_convnext}}
losses: {dino: {}}
teacher: {frozen: somewhere}
crops: {globals: {count: 2, size: 32}, locals: {count: 0}}
optim: {steps: 6, batch: 8, lr: 1e-3}
data: {name: folder, path: photos}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "several.yaml"
    path.write_text(RECIPE)
    return path


def test_a_students_section_comes_over_the_file_and_under_what_is_given(file):
    small, large, other = (load_recipe(file, [f"student={name}"]) for name in ("small", "large", "other"))
    assert (small.backbone["width"], large.backbone["width"], small.optim.lr, large.optim.lr) == (
        24,
        48,
        1e-3,
        2e-3,
    )
    assert large.backbone["depth"] == 2
    assert "depth" not in other.backbone  # another architecture starts from its own defaults
    assert (large.name, large.run.out) == ("several_large", "runs/several/students/large")
    given = ["student=large", "students.large.backbone.depth=3", "optim.lr=5e-3", "run.out=x"]
    large = load_recipe(file, given)
    assert (large.backbone["depth"], large.optim.lr, large.run.out) == (3, 5e-3, "x/students/large")


def test_a_student_can_be_left_out_or_added(file):
    assert student_shares(file) == {"small": 1, "large": 2, "other": 1}
    assert student_shares(file, ["students.other=null", "students.new.share=3"]) == {
        "small": 1,
        "large": 2,
        "new": 3,
    }
    assert student_shares("scenes_cpu") == {}


@pytest.mark.parametrize(
    ("given", "kind", "answer"),
    [
        (
            [],
            ValueError,
            r"several students: small, large, other\. .* at least 4 processes; .* student=small",
        ),
        (["student=tiny"], LookupError, "no such student. There is: small, large, other"),
        (
            ["students.large.crops.flip=0"],
            ValueError,
            r"students\.large\.crops: a student has share, backbone, heads and",
        ),
        (["students.large.optim.batch=4"], ValueError, r"give optim\.batch for all"),
        (["students.large.share=0"], ValueError, r"large\.share=0: it is a whole number, 1 or more"),
        (["students.a/b.share=1"], ValueError, "the name is one of a folder"),
        (["student=small", "teacher.frozen=''"], ValueError, r"give teacher\.frozen="),
    ],
)
def test_what_is_no_recipe_of_students_is_refused_in_words(file, given, kind, answer):
    with pytest.raises(kind, match=answer):
        load_recipe(file, given)


def test_a_student_of_a_recipe_that_has_none_is_refused():
    with pytest.raises(ValueError, match="has no section `students`"):
        load_recipe("scenes_cpu", ["student=small"])


def test_one_checkpoint_is_enough_for_a_student_alone_only(file):
    recipe = load_recipe(file, ["student=small", "run.keep=1"])
    with pytest.raises(ValueError, match=r"Set run\.keep=2"):
        check_keep(recipe)


def test_processes_are_shared_in_proportion():
    share = {"a": 1, "b": 2}
    assert ranks_of(share, 3, 8) == {"a": range(1), "b": range(1, 3)}
    assert ranks_of(share, 6, 8) == {"a": range(2), "b": range(2, 6)}
    published = {"s": 6, "splus": 6, "b": 10, "l": 15}
    assert [len(ranks) for ranks in ranks_of(published, 296, 1920).values()] == [48, 48, 80, 120]


def test_shares_that_do_not_fit_name_numbers_that_do():
    with pytest.raises(
        ValueError, match=r"4 processes cannot .*\(a 1, b 2: a multiple of 3.*Start one of: 3, 6, 12\."
    ):
        ranks_of({"a": 1, "b": 2}, 4, 8)
    with pytest.raises(ValueError, match=r"9 processes .*optim\.batch=8.*Start one of: 3, 6, 12\."):
        ranks_of({"a": 1, "b": 2}, 9, 8)  # b would have 6
    with pytest.raises(ValueError, match=r"^1 process cannot .*Start one of: 3, 6, 12\. .* add student=a\."):
        ranks_of({"a": 1, "b": 2}, 1, 8)
    with pytest.raises(ValueError, match="No number does"):
        ranks_of({"a": 3, "b": 1}, 4, 8)
