"""Files and folders of rows that are neither JSON nor parquet alone."""

import gc
import json

import pytest

from cpt_lightning.tasks import Columns, FileRows, Task
from tests.tasks.conftest import png

datasets = pytest.importorskip("datasets")


def rows(*answers):
    return [{"question": f"{answer}?", "answer": answer} for answer in answers]


def answers(*paths, **options):
    return [row.answer for row in FileRows(list(map(str, paths)), **options).split("train")]


@pytest.fixture
def saved(tmp_path, cache):
    """A data set of two splits as ``save_to_disk`` writes it."""
    splits = {name: datasets.Dataset.from_list(rows(name, "b")) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_split_and_its_arrow_file_are_read(saved):
    assert answers(saved / "train") == ["train", "b"]
    (file,) = (saved / "test").glob("*.arrow")
    assert answers(file) == ["test", "b"]
    row = FileRows(f"{saved}/train").split("train")[1]
    assert row.row_id == f"{saved}/train:2"


def test_a_saved_set_must_name_its_split(saved):
    with pytest.raises(ValueError, match=r"saved' holds the splits train, test; name one, as '.*/saved/train'"):
        FileRows(str(saved))


def test_a_folder_of_files_is_read_in_alphabetical_order(tmp_path, cache):
    (tmp_path / "b.json").write_text(json.dumps(rows("b", "c")))
    (tmp_path / "c.jsonl").write_text(json.dumps(rows("d")[0]))
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("no rows")
    datasets.Dataset.from_list(rows("a")).to_parquet(str(tmp_path / "a.parquet"))
    assert answers(tmp_path) == ["a", "b", "c", "d"]
    ids = [row.row_id for row in FileRows(f"{tmp_path}/").split("train")]
    assert ids == [f"{tmp_path}/{name}" for name in ("a.parquet:1", "b.json:1", "b.json:2", "c.jsonl:1")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 5.2 leaves the CSV file open
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_of_images_with_metadata_is_read(tmp_path, cache, kind):
    (tmp_path / "train").mkdir()
    for name in ("train/a.png", "b.png"):
        (tmp_path / name).write_bytes(png("red" if name == "b.png" else "blue"))
    records = [
        {"file_name": "train/a.png", "question": "What colour?", "choices": "['red', 'blue']", "answer": 1},
        {"file_name": "b.png", "question": "What colour?", "choices": "['red', 'blue']", "answer": 0},
    ]
    if kind == "jsonl":
        text = "\n".join(map(json.dumps, records))
    else:
        text = "file_name,question,choices,answer\n" + "\n".join(
            f'{row["file_name"]},{row["question"]},"{row["choices"]}",{row["answer"]}' for row in records
        )
    (tmp_path / f"metadata.{kind}").write_text(text)
    examples = Task(FileRows(str(tmp_path), columns=Columns(options="choices"))).examples("train", "colours")
    said = sorted((example.gold[1], example.images[0].getpixel((0, 0))) for example in examples)
    assert said == [("blue", (0, 0, 255)), ("red", (255, 0, 0))]
    gc.collect()


def test_an_object_with_one_list_is_that_list(tmp_path):
    (tmp_path / "questions.json").write_text(json.dumps({"info": {"version": 1}, "questions": rows("a", "b")}))
    assert answers(tmp_path / "questions.json") == ["a", "b"]


def test_class_labels_are_their_names(tmp_path, cache):
    features = {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["cat", "dog"])}
    records = [{"question": "What?", "answer": number} for number in (1, 0, None)]
    dataset = datasets.Dataset.from_list(records, features=datasets.Features(features))
    dataset.save_to_disk(str(tmp_path / "labels"))
    source = FileRows(str(tmp_path / "labels"), columns=Columns(required=["answer"], where={"answer": ["dog", "cat"]}))
    assert [row.answer for row in source.split("train")] == ["dog", "cat"]
    assert source.num_left_out("train") == 1


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("num_before", [1, 2000], ids=["at its beginning", "behind what is read at once"])
def test_a_file_that_is_not_utf8_is_named_with_the_line(tmp_path, name, num_before):
    """Line n has ``num_before`` lines of 6 bytes before it, then é as Latin-1 writes it in a place of its own."""
    start = b"[\n" if name == "rows.json" else b"\n\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + start + b'"ab",\n'.replace(b",", b" ") * num_before + b'"\xe9"')
    message = f"{name}: line {num_before + 2 + (name == 'rows.jsonl')} is not UTF-8"
    with pytest.raises(ValueError, match=rf"{message} \(byte {num_before * 6 + 6} is 0xe9\); save it as UTF-8"):
        FileRows(str(tmp_path / name)).split("train")


def test_metadata_of_images_that_is_not_utf8_is_named_with_the_line(tmp_path, cache):
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "metadata.csv").write_bytes("file_name,question,answer\na.png,café?,b\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"^.*/metadata.csv: line 2 is not UTF-8 \(byte 35 is 0xe9\); save it as UTF-8"
    ):
        FileRows(str(tmp_path)).split("train")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_damaged_file_is_named(tmp_path, cache, name):
    (tmp_path / name).write_bytes(b"PAR1 this is cut off")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: cannot be read: \w+: ."):
        FileRows(str(tmp_path / name)).split("train")


def test_a_damaged_folder_is_named(saved):
    (saved / "train" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"^{saved}/train: cannot be read: \w+: ."):
        FileRows(f"{saved}/train").split("train")


def test_a_folder_of_several_splits_is_not_one_of_them(tmp_path):
    """Read one after another, the rows of the test would be learned."""
    for name in ("train-00000-of-00001.jsonl", "testing_ideas.jsonl"):
        (tmp_path / name).write_text('{"question": "x?", "answer": "a"}')
    assert len(FileRows(str(tmp_path)).split("train")) == 2
    (tmp_path / "test-00000-of-00001.jsonl").write_text("")
    with pytest.raises(
        ValueError, match="files of several splits, such as test-00000.*, train-00000.*; name the files"
    ):
        FileRows(str(tmp_path))


def test_rows_by_the_line_in_a_file_of_another_name_are_told_theirs(tmp_path):
    (tmp_path / "rows.json").write_text('{"question": "x?", "answer": "a"}\n{"question": "y?", "answer": "b"}\n')
    with pytest.raises(
        ValueError, match="rows.json: not a JSON file: Extra data: .*; for a row per line name it .jsonl"
    ):
        FileRows(str(tmp_path / "rows.json")).split("train")


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no saved data set, no metadata.csv and no .json, .jsonl"):
        FileRows(str(tmp_path))


def test_image_folders_may_differ_by_split(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}_images").mkdir()
        record = {"question": "x?", "answer": "a", "image": "1.png"}
        (tmp_path / f"{split}.json").write_text(json.dumps([record] * 4))
    folders = {"train": f"{tmp_path}/train_images", "test": f"{tmp_path}/test_images"}
    source = FileRows(
        f"{tmp_path}/train.json",
        test=f"{tmp_path}/test.json",
        val_fraction=0.5,
        group_by="answer",
        image_folder=folders,
    )
    assert source.split("test")[0].images == [f"{tmp_path}/test_images/1.png"]
    with pytest.raises(ValueError, match="image_folder names 'dev'; there are train, val, test"):
        FileRows(f"{tmp_path}/train.json", image_folder={"dev": str(tmp_path)})
    by_row = FileRows(f"{tmp_path}/train.json", val_fraction=0.5, image_folder=folders, columns=Columns(images="no"))
    with pytest.raises(ValueError, match="no column 'no'"):
        by_row.split("val")[0]
