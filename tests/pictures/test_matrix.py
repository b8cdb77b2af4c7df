"""The heat-map and the curves of a stream: every number in its place, and no text over another or cut off."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from cpt_lightning.pictures import heatmap, stream_curves
from cpt_lightning.pictures.curves import HEIGHT, KEPT
from cpt_lightning.records import AccuracyMatrix

ACCURACY = {"a": (0.2, 0.9, 0.5), "b": (0.3, 0.3, 0.8), "p": (1.0, 0.6, 0.7)}  # base, after a, after b


def matrix_of(accuracy, stages, base=True) -> AccuracyMatrix:
    rows = [
        {name: {"accuracy": values[place], "num_samples": 100} for name, values in accuracy.items()}
        for place in range(len(stages) + 1)
    ]
    tasks = list(dict.fromkeys(task for stage in stages for task in stage))
    probes = [name for name in accuracy if name not in tasks]
    return AccuracyMatrix(tasks, probes, stages, rows[0] if base else None, rows[1:])


SMALL = matrix_of(ACCURACY, [["a"], ["b"]])
LARGE = matrix_of(
    {f"{kind}_{place}_with_quite_a_long_name": [0.1 * place] * 11 for kind in ("task", "probe") for place in range(10)},
    [[f"task_{place}_with_quite_a_long_name"] for place in range(10)],
)
MIXED = matrix_of(ACCURACY | {"c": (0.5, 0.5), "d": (0, 1)}, [["a", "b", "c", "d"]])


def test_every_cell_has_its_number_and_its_colour():
    (axes,) = heatmap(SMALL).axes
    cells = {(round(text.get_position()[0]), round(text.get_position()[1])): text for text in axes.texts[:9]}
    assert {place: cell.get_text() for place, cell in cells.items()} == {
        (0, 0): "20", (1, 0): "90", (2, 0): "50",
        (0, 1): "30", (1, 1): "30", (2, 1): "80",
        (0, 2): "100", (1, 2): "60", (2, 2): "70",
    }  # fmt: skip
    squares, frames = axes.collections
    brightness = [sum(colour[:3]) for colour in squares.get_facecolor()]
    assert brightness[3] > brightness[0]  # a after itself, and of the base
    assert len(frames.get_paths()) == 2  # a after a, b after b
    assert [cells[place].get_weight() for place in ((1, 0), (2, 1), (2, 0))] == ["bold", "bold", "normal"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "p"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["base", "a", "b"]


@pytest.mark.parametrize("draw", [heatmap, stream_curves])
def test_names_are_text_and_no_formulas(draw):
    """Of this one matplotlib would say that it is broken, and a run would end at its first picture."""
    name = r"$\foo$"
    figure = draw(matrix_of({name: (0.2, 0.9), "p": (1.0, 0.6)}, [[name]]))
    FigureCanvasAgg(figure).draw()
    assert figure.axes[0].get_yticklabels()[0].get_text() == r"\$\foo\$", "which is drawn without the backslashes"


def test_probes_and_the_base_stand_apart():
    (axes,) = heatmap(SMALL).axes
    xs, ys = axes.get_xticks(), axes.get_yticks()
    assert xs[1] - xs[0] > xs[2] - xs[1] == 1 and ys[2] - ys[1] > ys[1] - ys[0] == 1


def test_a_curve_is_grey_before_its_task_and_shows_what_was_lost_since():
    """Steps 10 and 40. a: 0.2, 0.9, 0.5, so 40 points lost at the end; b has lost nothing; p 30 of its base's 100."""
    (axes,) = stream_curves(SMALL, [10, 40]).axes
    known = [line for line in axes.lines if to_hex(line.get_color()) == KEPT and line.get_linestyle() == "-"]
    tops = [tick - HEIGHT / 2 for tick in axes.get_yticks()]
    drawn = [
        [(x, 1 - (y - top) / HEIGHT) for x, y in zip(*line.get_data(), strict=True)]
        for line, top in zip(known, tops, strict=True)
    ]
    assert [[x for x, _ in curve] for curve in drawn] == [[0, 10, 40], [10, 40], [0, 10, 40]]
    values = [accuracy for curve in drawn for _, accuracy in curve]
    assert values == pytest.approx([0.2, 0.9, 0.5, 0.3, 0.8, 1.0, 0.6, 0.7])
    texts = [text.get_text() for text in axes.texts]
    assert [text for text in texts if text[-1].isdigit()] == ["50", "\u221240", "80", "70", "\u221230"]
    assert {"a", "b"} <= set(texts)  # the stages
    boundaries = [line for line in axes.lines if line.get_linestyle() not in ("-", "None")]
    assert [list(line.get_xdata()) for line in boundaries] == [[10, 10]]


def test_without_a_base_a_curve_begins_after_the_first_stage():
    (axes,) = stream_curves(matrix_of(ACCURACY, [["a"], ["b"]], base=False)).axes
    assert axes.lines[0].get_xdata().tolist() == [1, 2]
    assert axes.get_xlabel() == "stage"


@pytest.mark.parametrize("draw", [heatmap, stream_curves])
@pytest.mark.parametrize("matrix", [SMALL, LARGE, MIXED], ids=["small", "ten and ten", "mixed"])
def test_no_text_is_cut_off_or_lies_over_another(draw, matrix):
    figure = draw(matrix)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, (axes,) = canvas.get_renderer(), figure.axes
    upright = [text for text in [*axes.texts, *axes.get_yticklabels(), *figure.texts] if text.get_rotation() == 0]
    turned = [text for text in [*axes.texts, *axes.get_xticklabels()] if text.get_rotation() % 90]
    boxes = {text: text.get_window_extent(renderer) for text in [*upright, *turned]}
    for text, box in boxes.items():
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for one, other in combinations(upright, 2):
        assert not boxes[one].overlaps(boxes[other]), (one, other)
    # Turned texts are parallel: what is left of their boxes' corners must be at least a line's height apart.
    starts = [boxes[text].x0 for text in turned]
    assert all(later - earlier > 12 for earlier, later in pairwise(starts))


def test_what_came_later_has_a_dash_and_a_line_from_there_on():
    """c is asked for the first time after b: 0.4, and 0.9 when it is learned; 10, 40 and 70 are ends of stages."""
    extended = matrix_of(ACCURACY | {"a": (0.2, 0.9, 0.5, 0.5), "b": (0.3, 0.3, 0.8, 0.8), "p": (1.0, 0.6, 0.7, 0.7),
                                     "c": (0.0, 0.0, 0.4, 0.9)}, [["a"], ["b"], ["c"]])  # fmt: skip
    for scores in (extended.zero_shot, extended.rows[0]):
        del scores["c"]
    (axes,) = heatmap(extended).axes
    shown = {(round(text.get_position()[0]), round(text.get_position()[1])): text.get_text() for text in axes.texts}
    assert [shown[place, 2] for place in range(4)] == ["-", "-", "40", "90"]
    assert len(axes.collections[0].get_paths()) == 14, "no colour where nothing was measured"
    (axes,) = stream_curves(extended, [10, 40, 70]).axes
    lines = [line for line in axes.lines if to_hex(line.get_color()) == KEPT and line.get_linestyle() == "-"]
    assert [list(line.get_xdata()) for line in lines] == [[0, 10, 40, 70], [10, 40, 70], [40, 70], [0, 10, 40, 70]]


def test_a_mixed_stage_is_named_by_the_number_of_its_tasks():
    (axes,) = heatmap(MIXED).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["base", "4 tasks mixed"]
    assert len(axes.collections[1].get_paths()) == 4


def test_what_cannot_be_drawn_is_refused():
    empty = AccuracyMatrix(["a"], [], [["a"]])
    with pytest.raises(ValueError, match="neither the base nor a stage"):
        heatmap(empty)
    with pytest.raises(ValueError, match="before the first stage"):
        stream_curves(empty)
    with pytest.raises(ValueError, match="steps has 1 numbers for 2 stages"):
        stream_curves(SMALL, [10])
