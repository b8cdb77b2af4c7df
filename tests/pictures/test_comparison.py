"""Pictures of several arms, read back from the figure: what lies where."""

import pytest

from cpt_lightning.pictures.comparison import Panel, Point, style_of, task_curves, trade_off
from cpt_lightning.pictures.files import svg
from cpt_lightning.pictures.law import law
from cpt_lightning.records import AccuracyMatrix


def test_points_are_means_and_the_front_goes_through_those_that_are_not_beaten():
    points = [Point("x", [1, 3], [50, 60]), Point("y", [5], [70]), Point("z", [6], [40])]
    (axes,) = trade_off([Panel("lost", points)]).axes
    marks, labels = axes.get_legend_handles_labels()
    lines = dict(zip(labels, marks, strict=True))
    assert lines.pop("Pareto front").get_xydata().tolist() == [[2, 55], [5, 70]]
    assert {name: mark.lines[0].get_xydata().tolist() for name, mark in lines.items()} == {
        "x": [[2, 55]], "y": [[5, 70]], "z": [[6, 40]],
    }  # fmt: skip


def test_where_less_is_lost_to_the_right_the_front_turns():
    points = [Point("x", [-5], [50]), Point("y", [-1], [50]), Point("z", [-9], [60])]
    (axes,) = trade_off([Panel("probes", points, right_is_worse=False)]).axes
    (front,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    assert front.get_xydata().tolist() == [[-1, 50], [-9, 60]]


def test_an_arm_that_is_not_finished_is_hollow_and_no_part_of_the_front():
    """It beats all others so far: of one task nothing can be forgotten."""
    points = [Point("x", [2], [55]), Point("y", [5], [70]), Point("half", [0], [90], is_finished=False)]
    (axes,) = trade_off([Panel("lost", points)]).axes
    marks, labels = axes.get_legend_handles_labels()
    lines = dict(zip(labels, marks, strict=True))
    assert lines["Pareto front"].get_xydata().tolist() == [[2, 55], [5, 70]]
    assert {name for name in ("x", "y", "half") if lines[name].lines[0].get_markerfacecolor() == "none"} == {"half"}
    assert lines["hollow: not finished"].get_markerfacecolor() == "none"
    assert "hollow: not finished" not in trade_off([Panel("lost", points[:2])]).axes[0].get_legend_handles_labels()[1]


def test_arms_look_different():
    styles = [tuple(style_of(number).values()) for number in range(70)]
    assert len(set(styles)) == 70


def test_a_panel_per_task_with_a_line_per_arm_that_has_it():
    def cell(accuracy):
        return {"accuracy": accuracy, "num_samples": 4}

    rows = [{"a": cell(0.5), "p": cell(1.0)}, {"a": cell(0.25), "p": cell(0.5)}]
    one = AccuracyMatrix(["a"], ["p"], [["a"]], rows[0], rows[1:])
    other = AccuracyMatrix(["b"], [], [["b"]], None, [{"b": cell(0.75)}])
    panels = {axes.get_title(): axes for axes in task_curves({"one": one, "other": other}).axes}
    assert list(panels) == ["a", "b", "probes, mean"]
    found = {
        name: [line.get_xydata().tolist() for line in axes.lines if line.get_marker() in "os"]
        for name, axes in panels.items()
    }
    assert found == {"a": [[[0, 50], [1, 25]]], "b": [[[1, 75]]], "probes, mean": [[[0, 100], [1, 50]]]}


@pytest.mark.parametrize("num_tasks", [1, 3, 4, 5, 7])
def test_no_panel_is_left_empty(num_tasks):
    tasks = [f"task{number}" for number in range(num_tasks)]
    row = {task: {"accuracy": 0.5, "num_samples": 4} for task in tasks}
    matrix = AccuracyMatrix(tasks, [], [[task] for task in tasks], row, [row])
    assert [axes.get_title() for axes in task_curves({"one": matrix}).axes] == tasks


def test_an_arm_looks_the_same_in_all_pictures_of_a_page():
    """The second of three is drawn as that, whether the first one is there or not."""
    row = {"a": {"accuracy": 0.5, "num_samples": 4}}
    matrix, among = AccuracyMatrix(["a"], [], [["a"]], row, [row]), ["x", "y", "z"]
    (point,) = trade_off([Panel("lost", [Point("y", [1], [50])])], among=among).axes[0].containers
    curve = task_curves({"y": matrix, "z": matrix}, among).axes[0].lines[0]
    (cloud, _) = law({"y": [(1.0, 2.0)]}, ("x", "y"), None, among).axes[0].lines
    assert {(line.get_color(), line.get_marker()) for line in (point.lines[0], curve, cloud)} == {
        tuple(style_of(1).values())
    }


def test_ticks_of_a_long_stream_do_not_run_together():
    """Of 14 stages every second one: 1 + 14 // 9."""
    tasks = [f"task{number}" for number in range(14)]
    row = {task: {"accuracy": 0.5, "num_samples": 4} for task in tasks}
    matrix = AccuracyMatrix(tasks, [], [[task] for task in tasks], row, [row] * 14)
    axes = task_curves({"one": matrix}).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["base", "2", "4", "6", "8", "10", "12", "14"]


def test_arms_of_any_name_are_in_the_legend_and_none_is_a_formula():
    """matplotlib takes what begins with _ for hidden, and what is between dollars for a formula, which is none here."""
    long = "runs/" * 20 + "sft"
    names = ["_x", r"$\foo$", long]
    figure = trade_off([Panel("lost", [Point(name, [1], [50]) for name in names])])
    assert b"svg" in svg(figure)
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [" _x", r"\$\foo\$", f"…{long[-69:]}"]
    figure.canvas.draw()
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width, "a name of 70 letters is not cut off"


def test_the_same_picture_is_the_same_file():
    panel = Panel("lost", [Point("x", [1], [50])])
    assert svg(trade_off([panel])) == svg(trade_off([panel]))
