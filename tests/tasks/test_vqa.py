"""easy-VQA from its package: every question has a type, and no picture is in two splits."""

from collections import Counter

import pytest

from cpt_lightning.tasks import EasyVQA, Reward, Task
from cpt_lightning.tasks.vqa import YES_NO, question_type

easy_vqa = pytest.importorskip("easy_vqa")


@pytest.fixture(scope="module")
def source():
    return EasyVQA()


def test_the_splits_are_the_packages_own(source):
    """Counted by the package's reader: validation is cut from training, the test set stays whole."""
    sizes = {split: len(source.split(split)) for split in ("train", "val", "test")}
    assert sizes["train"] + sizes["val"] == len(easy_vqa.get_train_questions()[0]) == 38575
    assert sizes["test"] == len(easy_vqa.get_test_questions()[0]) == 9673


def test_a_row_is_the_packages_question_answer_and_picture(source):
    texts, answers, pictures = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    for index in (0, 5000, 9672):
        row = source.split("test")[index]
        assert (row.question, row.answer) == (texts[index], answers[index])
        assert row.images == [paths[pictures[index]]]
        assert row.row_id == f"easy_vqa/test/{index}"


def test_no_picture_is_in_two_splits(source):
    pictures = {split: {row.images[0] for row in source.split(split)} for split in ("train", "val", "test")}
    assert {split: len(paths) for split, paths in pictures.items()} == {"train": 3600, "val": 400, "test": 1000}
    assert len(set.union(*pictures.values())) == 5000


def test_the_types_sort_every_question_by_what_it_asks_for():
    """Shapes are answered by shapes, colours by colours, the rest by yes and no; the package counts 7,136 of them."""
    answers = {"shape": {"circle", "rectangle", "triangle"}, "color": set(easy_vqa.get_answers())}
    answers["color"] -= answers["shape"] | {"yes", "no"}
    counts = Counter()
    for text, answer in zip(*easy_vqa.get_test_questions()[:2], strict=True):
        kind = question_type(text)
        counts[kind] += 1
        assert answer in answers.get(kind, {"yes", "no"}), text
    assert sum(counts[kind] for kind in YES_NO) == 7136
    assert counts == {kind: len(EasyVQA([kind]).split("test")) for kind in counts}
    assert len(EasyVQA(["yes_no"]).split("test")) == 7136
    assert len(EasyVQA(["shape", "has_shape"]).split("test")) == counts["shape"] + counts["has_shape"]


def test_negated_questions_are_told_apart():
    assert question_type("is there a red shape in the image?") == "has_color"
    assert question_type("does the image not contain a circle?") == "lacks_shape"
    assert question_type("is no circle present?") == "lacks_shape"
    with pytest.raises(ValueError, match="'how many.' is not a question of easy-VQA"):
        question_type("how many?")


def test_the_seed_draws_the_validation_pictures():
    def ids(seed):
        return [row.row_id for row in EasyVQA(["shape"], seed=seed).split("val")]

    assert ids(0) == ids(0) != ids(1)


def test_a_task_on_it_shows_the_picture_and_grades_the_answer():
    example = Task(EasyVQA(["color"]), reward=Reward("exact")).examples("test", "colours")[3]
    assert example.images[0].size == (64, 64)
    assert example.reward(example.target, example.gold)["accuracy"] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"questions": ["size"]}, "unknown question type 'size'; there are shape, color, yes_no"),
        ({"val_fraction": 1.5}, "val_fraction is 1.5"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        EasyVQA(**options)


def test_without_a_fraction_there_is_no_validation():
    source = EasyVQA(val_fraction=0)
    assert len(source.split("train")) == 38575
    with pytest.raises(ValueError, match="set val_fraction"):
        source.split("val")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        source.split("dev")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("cpt_lightning.tasks.vqa.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install easy-vqa"):
        EasyVQA()
