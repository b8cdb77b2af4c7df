"""Rows that are in memory are read as those of files."""

import pickle

import pytest
from PIL import Image

from cpt_lightning.tasks import Columns, FileRows, HubRows, MemoryRows, Task

RECORDS = [{"q": f"{number}?", "answer": number, "level": number % 2} for number in range(10)]


def test_a_list_is_asked_and_cut_like_a_file():
    source = MemoryRows(RECORDS, columns=Columns(question="q", where={"level": 1}), test_fraction=0.4)
    rows = {split: source.split(split) for split in ("train", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 3, "test": 2}
    assert {row.row_id for found in rows.values() for row in found} == {f"train/{number}" for number in (1, 3, 5, 7, 9)}
    with pytest.raises(ValueError, match="task 'a': no val split; set val"):
        Task(source).examples("val", "a")
    with pytest.raises(ValueError, match="task 'a', test/0: the row is an int, not an object with columns"):
        Task(MemoryRows(test=[3])).examples("test", "a")[0]


def test_a_data_set_keeps_its_pictures_encoded_until_they_are_shown():
    datasets = pytest.importorskip("datasets")
    picture = Image.new("RGB", (56, 56), "blue")
    data = datasets.Dataset.from_list([{"image": picture, "problem": "<image>x?", "answer": "a"}])
    source = MemoryRows(test=data.cast_column("image", datasets.Image()))
    assert isinstance(source.split("test")[0].images[0], dict)
    (example,) = Task(pickle.loads(pickle.dumps(source))).examples("test", "a")
    assert (example.row_id, example.gold, example.images[0].getpixel((0, 0))) == ("test/0", "a", (0, 0, 255))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "no rows are given; set train, val or test"),
        ({"train": "rows.json"}, TypeError, "train is a str; give a list of dicts, or one split as a datasets.Dataset"),
        ({"val": {"train": []}}, TypeError, "val is a dict; give a list of dicts"),
        ({"val": RECORDS, "val_fraction": 0.1, "train": RECORDS}, ValueError, "both val and val_fraction are given"),
    ],
)
def test_what_are_no_rows_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        MemoryRows(**options)


@pytest.mark.parametrize("make", [lambda **options: MemoryRows(RECORDS, **options),
                                  lambda **options: FileRows(__file__.replace(".py", ".jsonl"), **options),
                                  lambda **options: HubRows("a/b", {"train": "train"}, **options)])  # fmt: skip
def test_columns_that_are_none_are_refused(make, monkeypatch):
    monkeypatch.setattr("cpt_lightning.tasks.sources.check_files", lambda files: None)
    with pytest.raises(TypeError, match="columns={'question': 'q'} is a dict; give a Columns"):
        make(columns={"question": "q"})
    with pytest.raises(TypeError, match="columns.fields='why' is text; give a list of columns"):
        Columns(fields="why")
