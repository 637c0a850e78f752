"""Parquet files against the rows that were written into them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinokit.data.sources import parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

Paint = Callable[[int], bytes]
Numbers = Callable[[Any], Any]


def write(path: Path, columns: dict[str, Any], meta: dict[str, Any] | None = None, group: int = 4) -> Path:
    table = pa.table(columns).replace_schema_metadata(
        {key: json.dumps(value) for key, value in (meta or {}).items()}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


def opened(path: Path | str, **values: Any) -> Any:
    return parquet.build(parquet.Config(path=str(path), **values))


def hugging_face(names: list[str]) -> dict[str, Any]:
    return {"huggingface": {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}}


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_rows_come_in_order_with_labels_named_as_the_file_names_them(
    tmp_path: Path, paint: Paint, numbers: Numbers, memory: float
) -> None:
    images = [paint(n) for n in range(10)]
    structs = [{"bytes": image, "path": f"{n}.png"} for n, image in enumerate(images)]
    labels = [n % 3 for n in range(9)] + [None]
    names = ["zebra", "ant", "emu"]
    for meta in (hugging_face(names), {"dinokit": {"classes": names}}):
        for column in (images, structs, pa.array(images, pa.large_binary())):
            path = write(tmp_path / "x.parquet", {"image": column, "label": labels}, meta)
            source = opened(path, memory_gib=memory)
            assert list(source.classes) == names
            assert numbers(source) == [*((n, n % 3) for n in range(9)), (9, -1)]
            assert source.name(7) == f"{path} row 7"


def test_labels_without_names_are_sorted_and_may_be_text(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    images = [paint(n) for n in range(4)]
    source = opened(write(tmp_path / "n.parquet", {"image": images, "label": [10, 9, -1, 10]}))
    assert list(source.classes) == ["9", "10"]
    assert numbers(source) == [(0, 1), (1, 0), (2, -1), (3, 1)]
    source = opened(write(tmp_path / "t.parquet", {"image": images, "label": ["b", "a", None, "b"]}))
    assert list(source.classes) == ["a", "b"]
    assert numbers(source) == [(0, 1), (1, 0), (2, -1), (3, 1)]


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint64", "int8"])
@pytest.mark.parametrize("names", [["zebra", "ant", "emu"], None])
def test_labels_may_be_whole_numbers_of_any_type(
    tmp_path: Path, paint: Paint, numbers: Numbers, kind: str, names: list[str] | None
) -> None:
    labels = pa.array([2, 0, None, 1], kind)
    columns = {"image": [paint(n) for n in range(4)], "label": labels}
    path = write(tmp_path / "x.parquet", columns, hugging_face(names) if names else None)
    assert numbers(opened(path)) == [(0, 2), (1, 0), (2, -1), (3, 1)]


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("names", [["zebra", "ant", "emu"], None])
def test_floats_that_are_whole_are_labels_and_others_are_refused(
    tmp_path: Path, paint: Paint, numbers: Numbers, kind: str, names: list[str] | None
) -> None:
    meta = hugging_face(names) if names else None
    images = [paint(n) for n in range(6)]
    whole = pa.array([2.0, 0.0, None, float("nan"), 1.0, -1.0], kind)
    path = write(tmp_path / "x.parquet", {"image": images, "label": whole}, meta)
    assert numbers(opened(path)) == [(0, 2), (1, 0), (2, -1), (3, -1), (4, 1), (5, -1)]
    assert list(opened(path).classes) == (names or ["0", "1", "2"])
    for wrong in (0.75, float("inf")):
        ages = pa.array([2.0, None, wrong, 1.0, 1.5, 0.0], kind)
        path = write(tmp_path / "y.parquet", {"image": images, "label": ages}, meta)
        said = rf"Column 'label' of .*y\.parquet has 2 .*not whole.* {wrong:g}, in row 2 .*label=COLUMN"
        with pytest.raises(ValueError, match=said):
            opened(path)
        assert numbers(opened(path, label="")) == [(n, -1) for n in range(6)]


def test_a_label_beyond_all_reason_is_refused_with_the_file(tmp_path: Path, paint: Paint) -> None:
    path = write(tmp_path / "x.parquet", {"image": [paint(0)], "label": pa.array([2**64 - 1], "uint64")})
    with pytest.raises(ValueError, match=r"x\.parquet has labels that no int64 holds: .*1844674407370955"):
        opened(path)


def test_without_a_label_column_there_are_no_labels(tmp_path: Path, paint: Paint, numbers: Numbers) -> None:
    source = opened(write(tmp_path / "x.parquet", {"image": [paint(3)]}, {"dinokit": {"classes": ["sky"]}}))
    assert list(source.classes) == []
    assert numbers(source) == [(3, -1)]


def test_columns_may_have_other_names(tmp_path: Path, paint: Paint, numbers: Numbers) -> None:
    path = write(
        tmp_path / "x.parquet", {"img": [paint(1), paint(2)], "y": [0, 1], "subset": ["train", "test"]}
    )
    source = opened(path, image="img", label="y", split_column="subset", split="test")
    assert numbers(source) == [(2, 1)]


def test_the_split_column_decides_and_both_sides_have_all_classes(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    sides = ["train", "test", "validation", "train"]
    columns = {"image": [paint(n) for n in range(4)], "label": ["a", "b", "c", "a"], "split": sides}
    path = write(tmp_path / "x.parquet", columns)
    train, test = opened(path, split="train"), opened(path, split="test")
    assert numbers(train) == [(0, 0), (3, 0)]
    assert numbers(test) == [(1, 1), (2, 2)]
    assert list(train.classes) == list(test.classes) == ["a", "b", "c"]
    assert test.name(0).endswith("row 1")


def test_files_named_for_their_side_are_the_split_and_words_may_differ_between_them(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    for n, name in enumerate(("test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002")):
        columns = {"image": [paint(2 * n), paint(2 * n + 1)], "label": ["xyz"[n], "y"]}
        write(tmp_path / "data" / f"{name}.parquet", columns)
    assert numbers(opened(tmp_path, split="test")) == [(0, 0), (1, 1)]
    assert numbers(opened(tmp_path, split="train")) == [(2, 1), (3, 1), (4, 2), (5, 1)]
    assert numbers(opened(f"{tmp_path}/*/*.parquet")) == [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2), (5, 1)]
    assert opened(tmp_path).name(3).endswith("train-00000-of-00002.parquet row 1")


def test_a_column_that_knows_no_side_leaves_it_to_the_hash(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    path = write(tmp_path / "x.parquet", {"image": [paint(n) for n in range(300)], "split": ["pool"] * 300})
    train, test = (numbers(opened(path, split=s)) for s in ("train", "test"))
    assert sorted(train + test) == [(n, -1) for n in range(300)]
    assert 10 < len(test) < 60


def test_a_side_that_the_column_leaves_empty_can_be_made_by_the_hash(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    path = write(tmp_path / "x.parquet", {"image": [paint(n) for n in range(50)], "split": ["train"] * 50})
    with pytest.raises(ValueError, match=r"split='test'.*no image"):
        opened(path, split="test")
    assert numbers(opened(path, split="test", split_column="", test_share=0.5))


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_another_process_sees_the_same(
    tmp_path: Path, paint: Paint, numbers_elsewhere: Numbers, memory: float
) -> None:
    columns = {"image": [paint(n) for n in range(10)], "label": [n % 3 for n in range(10)]}
    source = opened(write(tmp_path / "x.parquet", columns), memory_gib=memory)
    assert numbers_elsewhere(source) == [[(n, n % 3) for n in range(10)]] * 3


def test_large_row_groups_above_the_limit_are_warned_of(tmp_path: Path, paint: Paint) -> None:
    heavy = [paint(n) + bytes(3 << 20) for n in range(4)]
    path = write(tmp_path / "x.parquet", {"image": pa.array(heavy)})
    with pytest.warns(UserWarning, match=r"0\.01 GiB.*memory_gib=0.001.*12 MiB"):
        source = opened(path, memory_gib=0.001)
    assert source[3][0].size == (3, 2)


def test_a_row_without_an_image_is_named(tmp_path: Path, paint: Paint) -> None:
    source = opened(write(tmp_path / "x.parquet", {"image": [paint(0), None, b"junk"]}))
    for row in (1, 2):
        with pytest.raises(ValueError, match=rf"x\.parquet row {row}"):
            source[row]


@pytest.mark.parametrize(
    ("columns", "values", "says"),
    [
        ({"img": [b""], "label": [1]}, {}, "no column 'image' for image.*Did you mean 'img'.*img, label"),
        ({"image": [b""], "label": [1]}, {"label": "labell"}, "no column 'labell'.*Did you mean 'label'"),
        ({"image": [b""]}, {"split_column": "subset"}, "no column 'subset' for split_column"),
        ({"image": [[1, 2]]}, {}, "of type list"),
        ({"image": [b""][:0]}, {"image": "image"}, "of type null|without a row"),
    ],
)
def test_columns_that_do_not_fit_are_explained(
    tmp_path: Path, columns: dict[str, Any], values: dict[str, str], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        opened(write(tmp_path / "x.parquet", columns), **values)


@pytest.mark.parametrize("kind", ["int64", "int16", "float64", "float32"])
@pytest.mark.parametrize("label", [2, 900, -2, -7])
def test_a_label_beyond_the_names_is_refused_with_its_row_and_what_it_may_be(
    tmp_path: Path, paint: Paint, kind: str, label: int
) -> None:
    labels = pa.array([1, None, -1, label, 0, label], pa.int64()).cast(kind)
    path = write(
        tmp_path / "x.parquet", {"image": [paint(0)] * 6, "label": labels}, hugging_face(["ant", "emu"])
    )
    says = rf"x\.parquet has 2 label.* names, 0 \(ant\) to 1 \(emu\), nor -1 .* first is {label}, in row 3 \("
    with pytest.raises(ValueError, match=says):
        opened(path)


def test_labels_that_a_tool_wrote_with_a_point_are_numbers_where_names_are(
    tmp_path: Path, paint: Paint, numbers: Numbers
) -> None:
    columns = {"image": [paint(n) for n in range(4)], "label": [1.0, 0.0, None, 1.0]}
    source = opened(write(tmp_path / "x.parquet", columns, hugging_face(["zebra", "ant"])))
    assert list(source.classes) == ["zebra", "ant"]
    assert numbers(source) == [(0, 1), (1, 0), (2, -1), (3, 1)]


def test_files_that_name_other_classes_are_not_mixed(tmp_path: Path, paint: Paint) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.parquet", {"image": [paint(0)], "label": [0]}, hugging_face([name]))
    with pytest.raises(ValueError, match="do not name the same classes"):
        opened(tmp_path)


def test_a_file_that_is_no_parquet_is_explained(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"x\.parquet is damaged or no Parquet file"):
        opened(tmp_path)
    (tmp_path / "x.tar").write_bytes(bytes(1024))
    with pytest.raises(ValueError, match="set name=tar"):
        opened(tmp_path / "x.tar")


def test_without_pyarrow_it_says_what_to_install(
    tmp_path: Path, paint: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.parquet", {"image": [paint(0)]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[cpu\]'"):
        opened(path)


def test_some_classes_alone_are_numbered_anew(tmp_path: Path, paint: Paint, numbers: Numbers) -> None:
    columns = {"image": [paint(n) for n in range(8)], "label": [0, 1, 2, 3, 0, 1, 2, None]}
    path = write(tmp_path / "x.parquet", columns, hugging_face(["ant", "bee", "cow", "doe"]))
    source = opened(path, classes=("doe", "bee"))
    assert source.classes == ["bee", "doe"]
    assert numbers(source) == [(1, 0), (3, 1), (5, 0)]
    assert source.name(1) == f"{path} row 3"
    with pytest.raises(ValueError, match=r"no class 'been'\. Did you mean 'bee'\? Its classes are: ant, bee"):
        opened(path, classes=("been",))
