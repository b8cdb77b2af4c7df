"""The toy world: the same rows everywhere, splits apart, answers that a second reading of the picture confirms."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from numpy.random import default_rng

from cpt_lightning.tasks.toy import FAMILIES, ToyWorld, toy_rows
from cpt_lightning.tasks.toy_drawings import (
    DIGIT_ROWS,
    DRAWERS,
    SINGLE_COLOURS,
    SINGLE_SHAPES,
    WORDS,
    ask_chart,
    draw_chart,
)
from cpt_lightning.tasks.toy_scenes import ASKERS, COLOURS, SHAPES, SIZE, Scene, ask_relation, draw_shape
from cpt_lightning.tasks.toy_text import CAPITALS, TEXT_ASKERS

VISUAL = (*ASKERS, *DRAWERS)


def digest(row) -> str:
    pixels = b"".join(image.tobytes() for image in row.images)
    return hashlib.sha256(pixels + f"{row.question}|{row.answer}|{sorted(row.fields.items())}".encode()).hexdigest()


def picture(row) -> bytes:
    return hashlib.sha256(row.images[0].tobytes()).digest()


def test_there_are_seven_visual_families_and_two_without_a_picture():
    assert len(VISUAL) >= 7
    assert set(TEXT_ASKERS) == {"arithmetic", "facts"}
    assert set(FAMILIES) == {*VISUAL, *TEXT_ASKERS}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_depends_on_family_seed_split_and_index_alone(family):
    rows = ToyWorld(family, seed=3).split("train")
    backwards = [digest(rows[index]) for index in (9, 4, 0)]
    again = ToyWorld(family, seed=3, num_train=10).split("train")
    assert backwards == [digest(again[index]) for index in (9, 4, 0)]
    assert digest(rows[-1]) == digest(rows[len(rows) - 1])
    assert digest(rows[0]) != digest(rows[1])
    assert digest(rows[0]) != digest(ToyWorld(family, seed=4).split("train")[0])


def test_another_process_with_another_hash_seed_draws_the_same_rows():
    code = (
        "import hashlib; from cpt_lightning.tasks.toy import ToyWorld, FAMILIES;"
        "rows = [ToyWorld(f).split('test')[5] for f in ('colour', 'word2', 'arithmetic')];"
        "print(hashlib.sha256(repr([(r.question, r.answer, [i.tobytes() for i in r.images]) for r in rows]).encode())"
        ".hexdigest())"
    )
    run = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        for seed in ("1", "2")
    ]
    assert run[0].stdout == run[1].stdout
    rows = [ToyWorld(family).split("test")[5] for family in ("colour", "word2", "arithmetic")]
    here = repr([(row.question, row.answer, [image.tobytes() for image in row.images]) for row in rows])
    assert run[0].stdout.decode().strip() == hashlib.sha256(here.encode()).hexdigest()


@pytest.mark.parametrize("family", VISUAL)
def test_no_picture_occurs_in_two_splits_nor_twice_in_one(family):
    seen = Counter(
        picture(row) for split in ("pretrain", "train", "val", "test") for row in toy_rows(family, 0, split, 60)
    )
    assert len(seen) == 240


def test_every_split_has_handwritten_digits_of_its_own():
    train, val, test = (set(range(*DIGIT_ROWS[split])) for split in ("train", "val", "test"))
    assert not train & val and not train & test and not val & test
    assert set(range(*DIGIT_ROWS["pretrain"])) <= train
    assert train | val | test == set(range(1797))


def test_no_arithmetic_problem_occurs_in_two_splits_in_either_order():
    splits_of = defaultdict(set)
    for split in ("train", "val", "test"):
        for row in ToyWorld("arithmetic", num_train=600).split(split):
            numbers = [int(word) for word in row.question.strip("?.").split() if word.isdigit()]
            splits_of[frozenset(numbers)].add(split)
    assert set(map(len, splits_of.values())) == {1}
    assert {next(iter(splits)) for splits in splits_of.values()} == {"train", "val", "test"}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_asks_in_two_wordings_without_instructions_and_gives_both_phrases(family):
    rows = list(ToyWorld(family, num_train=120).split("train"))
    first_words = {row.question.split()[0] for row in rows}
    assert len(first_words) >= 2
    for index, row in enumerate(rows):
        assert row.row_id == f"toy/{family}/train/{index}"
        assert not {"<", "answer", "boxed"} & {*row.question, *row.question.split()}
        assert row.target is None
        assert len(row.fields["thought"].split()) <= 5 < 15 < len(row.fields["teacher"].split())
        assert [image.size for image in row.images] == ([] if family in TEXT_ASKERS else [(SIZE, SIZE)])
    assert len({row.fields["thought"] for row in rows}) >= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_no_single_answer_is_right_more_often_than_expected(family):
    """The share of the most frequent answer: what a model that does not look can score."""
    limit = {"existence": 0.6, "relation": 0.36, "count": 0.4, "single": 0.4, "polygon": 0.3, "polygon2": 0.3}
    answers = Counter(row.answer for row in ToyWorld(family, num_train=300).split("train"))
    assert answers.most_common(1)[0][1] / 300 < limit.get(family, 0.25)


def cells_of(caption: str) -> list[tuple[str, str] | None]:
    """The nine cells, read back from the caption."""
    words, cells = caption.split(), []
    while words:
        first = words.pop(0)
        cells.append(None if first == "-" else (first, words.pop(0)))
    assert len(cells) == 9
    return cells


def colour_at(row, cell: int) -> str:
    """The world colour nearest to the middle of a grid cell, judged from the pixels."""
    x, y = SIZE // 6 + SIZE // 3 * (cell % 3), SIZE // 6 + SIZE // 3 * (cell // 3)
    middle = np.asarray(row.images[0])[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1))
    return min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - middle).sum()))


def test_captions_name_the_colours_that_the_pixels_have():
    for row in ToyWorld("colour", num_test=40).split("test"):
        pixels = np.asarray(row.images[0], dtype=int)
        for cell, thing in enumerate(cells_of(row.fields["caption"])):
            y, x = SIZE // 3 * (cell // 3), SIZE // 3 * (cell % 3)
            if thing is None:
                assert pixels[y : y + SIZE // 3, x : x + SIZE // 3].max() < 60
            else:
                assert colour_at(row, cell) == thing[0]


def test_colour_answers_are_those_of_the_one_shape_asked_for():
    for row in ToyWorld("colour", num_test=100).split("test"):
        shape = next(shape for shape in SHAPES if shape in row.question)
        assert [thing[0] for thing in cells_of(row.fields["caption"]) if thing and thing[1] == shape] == [row.answer]


def test_counts_are_what_a_recount_of_the_caption_gives():
    for row in ToyWorld("count", num_test=150).split("test"):
        things = [thing for thing in cells_of(row.fields["caption"]) if thing]
        colour = [name for name in COLOURS if f" {name} " in row.question]
        shape = [name for name in SHAPES if name in row.question]
        counted = [c for c, s in things if (not colour or c == colour[0]) and (not shape or s == shape[0])]
        assert row.answer == str(len(counted))


def test_existence_answers_agree_with_the_caption_and_are_balanced():
    answers = Counter()
    for row in ToyWorld("existence", num_test=200).split("test"):
        colour, shape = row.question.rstrip("?").split()[-2:]
        assert row.answer == ("yes" if (colour, shape) in cells_of(row.fields["caption"]) else "no")
        answers[row.answer] += 1
    assert 70 < answers["yes"] < 130


def test_relations_agree_with_the_places_in_the_caption():
    for row in ToyWorld("relation", num_test=100).split("test"):
        cells = cells_of(row.fields["caption"])
        words = row.question.rstrip("?").split()
        if words[0] == "where":
            first, second = (words[3], words[4]), (words[7], words[8])
        else:
            second, first = (words[5], words[6]), (words[9], words[10])
        (row_a, column_a), (row_b, column_b) = divmod(cells.index(first), 3), divmod(cells.index(second), 3)
        assert (row_a == row_b) != (column_a == column_b)
        if row_a == row_b:
            assert row.answer == ("left" if column_a < column_b else "right")
        else:
            assert row.answer == ("above" if row_a < row_b else "below")


def test_a_scene_without_an_aligned_pair_of_unique_objects_has_no_relation():
    assert ask_relation(Scene({0: ("red", "star"), 5: ("blue", "star")}), default_rng(0)) is None
    assert ask_relation(Scene({0: ("red", "star"), 2: ("red", "star")}), default_rng(0)) is None


@pytest.mark.parametrize("family", ["bars", "bars2"])
def test_bar_answers_are_the_colours_of_the_tallest_and_shortest_columns(family):
    """Independent of the drawing code: the bar of each colour is as tall as its tallest pixel column."""
    for row in ToyWorld(family, num_test=40).split("test"):
        pixels = np.asarray(row.images[0], dtype=int)
        heights = {}
        for name, colour in COLOURS.items():
            near = np.abs(pixels - np.array(colour)).max(axis=2) <= 15
            if near.sum() > 40:
                heights[name] = int(near.sum(axis=0).max())
        pick = max if "tallest" in row.question else min
        assert row.answer == pick(heights, key=heights.__getitem__)


def test_a_chart_is_asked_for_both_ends():
    _, colours = draw_chart(default_rng(1))
    question, answer = ask_chart(colours, default_rng(0), tallest=True)
    assert "tallest" in question and answer == colours[-1]
    question, answer = ask_chart(colours, default_rng(0), tallest=False)
    assert "shortest" in question and answer == colours[0]


def test_single_shapes_are_what_is_said_of_them():
    for row in ToyWorld("single", num_test=150).split("test"):
        pixels = np.asarray(row.images[0], dtype=int)
        masks = {n: np.abs(pixels - np.array(c)).max(axis=2) <= 4 for n, c in SINGLE_COLOURS.items()}
        colour = max(masks, key=lambda name: int(masks[name].sum()))
        assert masks[colour].sum() > 40
        if row.answer in SINGLE_COLOURS:
            assert row.answer == colour
        asked = [name for name in SINGLE_COLOURS if f" {name} " in row.question]
        if asked:
            assert row.answer == ("yes" if asked[0] == colour else "no")
        mask = masks[colour]
        box = np.ptp(np.nonzero(mask.any(axis=1))[0]) + 1, np.ptp(np.nonzero(mask.any(axis=0))[0]) + 1
        fill = mask.sum() / (box[0] * box[1])  # of its bounding box: rectangle 1, circle pi / 4, triangle 1 / 2
        shape = "rectangle" if fill > 0.9 else "circle" if fill > 0.64 else "triangle"
        if row.answer in SINGLE_SHAPES:
            assert row.answer == shape
        asked = [name for name in SINGLE_SHAPES if f" {name}" in row.question]
        if asked:
            assert row.answer == ("yes" if asked[0] == shape else "no")


def test_jigsaw_answers_put_the_tiles_back():
    """With every tile where the answer says, no seam is left: neighbours across the cuts differ by noise alone."""
    half = SIZE // 2
    places = [(0, 0), (half, 0), (0, half), (half, half)]
    for row in ToyWorld("jigsaw", num_test=30).split("test"):
        shuffled = np.asarray(row.images[0], dtype=int)
        restored = np.zeros_like(shuffled)
        for (x, y), source in zip(places, map(int, row.answer.split()), strict=True):
            to_x, to_y = places[source - 1]
            restored[to_y : to_y + half, to_x : to_x + half] = shuffled[y : y + half, x : x + half]
        seams = [restored[half - 1] - restored[half], restored[:, half - 1] - restored[:, half]]
        broken = [(np.abs(seam).max(axis=1) > 40).mean() for seam in seams]
        assert max(broken) < 0.2, row.row_id


def test_polygons_with_more_sides_fill_more_of_their_circle():
    """A regular n-gon fills n / (2 pi) * sin(2 pi / n) of its circle: 0.41 for 3 sides, 0.90 for 8."""
    fill = defaultdict(list)
    for row in ToyWorld("polygon", num_test=120).split("test"):
        inside = np.asarray(row.images[0], dtype=int).max(axis=2) > 90
        ys, xs = np.nonzero(inside)
        radius = np.hypot(ys - ys.mean(), xs - xs.mean()).max()
        fill[int(row.answer)].append(inside.sum() / (np.pi * radius**2))
    assert sorted(fill) == [3, 4, 5, 6, 7, 8]
    for sides, values in fill.items():
        assert np.mean(values) == pytest.approx(sides / (2 * np.pi) * np.sin(2 * np.pi / sides), abs=0.05)


@pytest.mark.parametrize("family", ["word", "word2"])
def test_words_are_visible_and_all_of_them_occur(family):
    rows = list(ToyWorld(family, num_train=300).split("train"))
    assert {row.answer for row in rows} == set(WORDS)
    for row in rows[:50]:
        ink = np.asarray(row.images[0], dtype=int).max(axis=2) > 110
        assert ink.sum() > 40
        assert not ink[:, [0, -1]].any() and not ink[[0, -1]].any(), "no word is cut off at the edge"


@pytest.mark.parametrize("family", ["digit", "digit2"])
def test_digits_are_all_ten_and_visible(family):
    rows = list(ToyWorld(family, num_test=150).split("test"))
    assert {row.answer for row in rows} == set("0123456789")
    assert all((np.asarray(row.images[0]).max(axis=2) > 110).sum() > 40 for row in rows)


def test_arithmetic_answers_are_right_and_never_negative():
    for row in ToyWorld("arithmetic", num_test=200).split("test"):
        a, b = (int(word) for word in row.question.strip("?.").split() if word.isdigit())
        assert int(row.answer) == (a + b if {"plus", "+"} & set(row.question.split()) else a - b) >= 0


def test_facts_are_the_capitals_of_forty_countries():
    assert len(CAPITALS) == len(set(CAPITALS.values())) == 40
    for row in ToyWorld("facts", num_test=50).split("test"):
        assert CAPITALS[row.question.strip("?.").split()[-1]] == row.answer


def test_an_unknown_family_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown toy family 'color'.*colour.*jigsaw"):
        ToyWorld("color")


def test_a_negative_size_and_an_unknown_split_are_refused():
    with pytest.raises(ValueError, match="num_val must not be negative, got -1"):
        ToyWorld("bars", num_val=-1)
    with pytest.raises(ValueError, match=r"no split 'dev'; it has train, val, test"):
        ToyWorld("bars").split("dev")
    with pytest.raises(IndexError):
        ToyWorld("bars", num_test=3).split("test")[3]


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="unknown shape 'heart'"):
        draw_shape(None, "heart", 0, 0, 1, (0, 0, 0))
