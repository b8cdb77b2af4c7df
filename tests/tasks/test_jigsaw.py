"""Jigsaw puzzles: the answer restores the picture, in both conventions."""

import numpy as np
import pytest
from PIL import Image

from cpt_lightning.tasks import Jigsaw, Reward, Task, load_image
from cpt_lightning.tasks.jigsaw import answer_indices, shuffle_order, shuffle_pieces


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures of noise, 61 x 47 pixels, some in a sub-folder, one file that is no picture."""
    (tmp_path / "more").mkdir()
    for index in range(20):
        noise = np.random.default_rng(index).integers(0, 256, (47, 61, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / ("more" if index % 2 else ".") / f"{index:02}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def tiles(image, rows, cols):
    width, height = image.width // cols, image.height // rows
    return [
        np.asarray(image.crop((c * width, r * height, (c + 1) * width, (r + 1) * height)))
        for r in range(rows)
        for c in range(cols)
    ]


def test_both_conventions_by_hand():
    """Shown: the original's third piece, then its first, then its second; so the first is now at place 2."""
    order = np.array([2, 0, 1])
    assert answer_indices(order, "source") == [3, 1, 2]
    assert answer_indices(order, "target") == [2, 3, 1]
    strip = Image.fromarray(np.repeat(np.array([[10, 20, 30]], dtype=np.uint8), 9, axis=1).repeat(9, axis=0))
    assert np.asarray(shuffle_pieces(strip, order, 1, 3))[0, ::9].tolist() == [30, 10, 20]


@pytest.mark.parametrize("convention", ["source", "target"])
@pytest.mark.parametrize("rows, cols", [(3, 3), (2, 2), (1, 4), (3, 2)])
def test_the_answer_restores_the_picture(folder, convention, rows, cols):
    source = Jigsaw(str(folder), rows, cols, convention)
    for row in source.split("train"):
        picture = load_image(row.row_id)
        shuffled = load_image(row.images[0])
        assert shuffled.size == (61 // cols * cols, 47 // rows * rows)
        originals = tiles(picture.crop((0, 0, *shuffled.size)), rows, cols)
        shown = tiles(shuffled, rows, cols)
        for position, index in enumerate(map(int, row.answer.split(", "))):
            piece, place = (position, index - 1) if convention == "source" else (index - 1, position)
            assert np.array_equal(shown[piece], originals[place])


def test_the_order_is_seeded_and_never_the_original():
    orders = [shuffle_order(2, (0, 0, index)).tolist() for index in range(50)]
    assert orders == [[1, 0]] * 50
    nine = [tuple(shuffle_order(9, (0, 0, index))) for index in range(50)]
    assert len(set(nine)) == 50
    assert nine == [tuple(shuffle_order(9, (0, 0, index))) for index in range(50)]
    assert all(sorted(order) == list(range(9)) for order in nine)
    assert tuple(shuffle_order(9, (0, 1, 0))) != nine[0] != tuple(shuffle_order(9, (1, 0, 0)))


def test_no_picture_is_in_two_splits(folder):
    source = Jigsaw(str(folder), val_fraction=0.2, test_fraction=0.25)
    pictures = {split: {row.row_id for row in source.split(split)} for split in ("train", "val", "test")}
    assert {split: len(names) for split, names in pictures.items()} == {"train": 11, "val": 4, "test": 5}
    assert len(set.union(*pictures.values())) == 20


def test_a_task_on_it_asks_and_grades(folder):
    reward = Reward("permutation")
    example = Task(Jigsaw(str(folder), 2, 2), reward=reward).examples("test", "jigsaw")[0]
    assert "2 x 2 pieces" in example.messages[0]["content"][1]["text"]
    assert example.reward(example.target, example.gold)["accuracy"] == 1
    assert example.reward("1, 2, 3, 4", example.gold)["accuracy"] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_rows": 1, "num_cols": 1}, "1 x 1 pieces cannot be shuffled"),
        ({"num_rows": 0}, "0 x 3 pieces"),
        ({"convention": "both"}, "'both' is unknown; there are source, target"),
        ({"folder": "gone"}, "folder 'gone' does not exist"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Jigsaw(**{"folder": str(folder), **options})


def test_splits_and_pictures_that_are_not_there_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="no val split; set val_fraction"):
        Jigsaw(str(folder), val_fraction=0).split("val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures"):
        Jigsaw(str(tmp_path / "empty")).split("train")
    (folder / "00.png").write_bytes(b"broken")
    task = Task(Jigsaw(str(folder), val_fraction=0, test_fraction=0))
    with pytest.raises(ValueError, match="task 'jigsaw', .*00.png: image .* is not an image"):
        list(task.examples("train", "jigsaw"))
    assert len(task.asked("train", "jigsaw")[0][0]) == 1  # what is asked does not need the picture
