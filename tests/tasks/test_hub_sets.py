"""The papers' data sets as YAML entries: rows of the hub's own columns become what is asked, shown and graded."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from cpt_lightning.tasks import Source, load_image

hub_sets = pytest.importorskip("tests.tasks.hub_sets")

CONFIGS = Path(__file__).parents[2] / "configs" / "tasks"
ENTRIES = {path.stem: yaml.safe_load(path.read_text())["source"] for path in sorted(CONFIGS.glob("*.yaml"))}
del ENTRIES["jigsaw"]  # of any pictures: see test_jigsaw.py
ENTRIES["vizwiz_hub"] = {
    "class_path": "cpt_lightning.tasks.HubRows",
    "init_args": {"path": "lmms-lab/VizWiz-VQA", "splits": {"test": "val"}, "columns": {"answer": "answers"}},
}
RED, LIME, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def opened(tmp_path, monkeypatch, cache):
    """Opens an entry in a working directory whose ``data`` holds that set alone."""
    monkeypatch.chdir(tmp_path)

    def open_entry(name) -> Source:
        getattr(hub_sets, name)(tmp_path / "data")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--source", type=Source)
        return parser.instantiate(parser.parse_object({"source": ENTRIES[name]})).source

    return open_entry


# Split, number of its rows, those left out, the row to look at: its id, question, answer and its images' colours.
ROWS = {
    "scienceqa": [
        ("train", 2, 1, 0, "derek-thomas/ScienceQA/train/0",
         "Context: Use the graph.\nWhich month is the wettest?\nA. March\nB. June\nC. October", ["B", "June"], [RED]),
        ("val", 2, 1, 1, "derek-thomas/ScienceQA/validation/2",
         "Which property matches?\nA. hard\nB. soft", ["A", "hard"], [BLUE]),
    ],
    "textvqa": [
        ("test", 4, 0, 0, "lmms-lab/textvqa/validation/0",
         "what is the brand of phone?\nReference OCR token:MIA,NOKIA", ["nokia"] * 7 + ["toshiba"] * 3, [LIME]),
        ("test", 4, 0, 3, "lmms-lab/textvqa/validation/3",
         "what is the brand of phone?", ["nokia"] * 7 + ["toshiba"] * 3, [LIME]),
        ("val", 2, 0, 0, None, None, None, [LIME]),
    ],
    "vizwiz": [
        ("train", 59, 0, 0, "data/vizwiz/Annotations/train.json:1",
         "What is this?", ["unanswerable"] * 6 + ["dog", "a dog", "cat", "unsuitable"], [RED]),
        ("val", 1, 0, 0, None, None, None, [RED]),
        ("test", 3, 0, 2, "data/vizwiz/Annotations/val.json:3", "What is this?", None, [BLUE]),
    ],
    "vizwiz_hub": [
        ("test", 3, 0, 1, "lmms-lab/VizWiz-VQA/val/1",
         "Which green vegetable?", ["broccoli"] * 9 + ["vegetable"], [RED]),
    ],
    "gqa": [
        ("train", 7, 0, 3, "lmms-lab/GQA/train_balanced_instructions/train/3", "Is it 3?", "yes", [RED]),
        ("val", 7, 0, 4, "lmms-lab/GQA/val_balanced_instructions/val/4", "Is it 4?", "yes", [LIME]),
        ("test", 7, 0, 5, "lmms-lab/GQA/testdev_balanced_instructions/testdev/5", "Is it 5?", "yes", [BLUE]),
    ],
    "geometry3k": [
        ("test", 3, 0, 1, "hiyouga/geometry3k/test/1", r"<image>Find $m \angle 2$.", r"8 \sqrt { 2 }", [RED]),
    ],
    "pathvqa": [
        ("val", 3, 0, 0, "flaviagiammarino/path-vqa/validation/0",
         "where are liver stem cells located?", "in the canals", [RED]),
    ],
    "super_clevr": [
        ("train", 32, 0, 0, None, "How many buses are there?", None, [RED]),
        ("val", 4, 0, 0, None, None, None, [RED]),
        ("test", 4, 0, 0, None, None, None, [RED]),
    ],
    "mmmu": [
        ("test", 3, 0, 0, "MMMU/MMMU/Art/validation/0",
         "<image> Which one shows the same colour?\nA. <image>\nB. <image>\nC. both of them\nD. it's none",
         "B", [RED, BLUE, LIME]),
        ("test", 3, 0, 2, "MMMU/MMMU/Math/validation/1",
         "How large is the slope? <image>", ["24/7", "3.429"], [RED]),
    ],
    "mmlu_pro": [
        ("test", 3, 0, 0, "TIGER-Lab/MMLU-Pro/test/0",
         "How many forests?\nA. 10\nB. 11\nC. 12\nD. 13\nE. 14\nF. 15\nG. 16\nH. 17\nI. 18\nJ. 19", ["I", "18"], []),
    ],
    "pope": [
        ("test", 3, 0, 0, "lmms-lab/POPE/test/0", "Is there a snowboard in the image?", "yes", [RED]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_a_papers_set_is_a_yaml_entry(opened, name):
    source = opened(name)
    for split, num_rows, num_left_out, index, row_id, question, answer, colours in ROWS[name]:
        rows = source.split(split)
        assert (len(rows), source.num_left_out(split)) == (num_rows, num_left_out)
        row = rows[index]
        assert row.row_id == (row_id or row.row_id)
        assert row.question == (question or row.question)
        assert row.answer == (answer or row.answer)
        assert [load_image(image).getpixel((0, 0)) for image in row.images] == colours


def test_every_entry_is_tested():
    assert set(ROWS) == set(ENTRIES)
