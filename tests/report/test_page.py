"""The page: whole, closed in itself, safe against what models say, and the same as its files."""

import csv
import html.parser
import json

import pytest
import yaml

from cpt_lightning.cli import main
from cpt_lightning.records import AccuracyMatrix, RunFolder
from cpt_lightning.report import Report, arms_of
from cpt_lightning.report.cautions import cautions
from cpt_lightning.report.examples import changes_of
from cpt_lightning.report.images import address
from cpt_lightning.report.settings import differing_circumstances, differing_options
from cpt_lightning.rewards import Reward
from cpt_lightning.tasks import Task, ToyWorld
from cpt_lightning.tasks.images import load_image
from tests.report.made_runs import SCORES, log, made_run, write_updates

HOSTILE = "</pre><script>alert(1)</script><img src=https://evil.example/x> ``` | "


class Reader(html.parser.HTMLParser):
    """Checks that tags close in their order, and keeps what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        self.text += " "
        assert self.open.pop() == tag, f"{tag} closes at {self.getpos()}, where another is open"

    def handle_data(self, data):
        self.text += data


def read(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(autouse=True, scope="module")
def fewer_draws():
    """Tests check the shapes of every call, which takes a multiple of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpt_lightning.report.intervals.NUM_DRAWS", 50)
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two seeds of one arm and one of another, which forgot less and says hostile things."""
    folder = tmp_path_factory.mktemp("report")
    calm = {**SCORES, "a": [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]}
    runs = [made_run(folder / "plain/seed_0"), made_run(folder / "plain/seed_1", calm, seed=1)]
    runs.append(made_run(folder / "hostile/seed_0", calm, lr=0.2, says=HOSTILE))
    log(runs[0], perf_rows=[16, 16])
    (runs[2] / "filter").mkdir()
    verdicts = [
        {"completions_per_row": 4},
        {"refused": None, "pass_count": 3, "kept": True, "reason": "solvable", "time_s": 60.0},
        {"refused": None, "pass_count": 0, "kept": False, "reason": "fewer than 1 passes", "time_s": 60.0},
    ]
    (runs[2] / "filter/a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in verdicts))
    main(["report", *map(str, runs), "-o", str(folder / "out/page.html"), "--title", "SFT & <GRPO>"])
    return folder / "out"


def test_the_page_parses_and_refers_to_nothing_outside(report):
    page = read(report / "page.html")
    outside = [each for each in page.references if not each.startswith(("#", "data:image/svg+xml;base64,"))]
    assert outside == [] and "script" not in page.tags and "link" not in page.tags
    assert "@import" not in (report / "page.html").read_text() and "url(" not in (report / "page.html").read_text()
    assert "SFT & <GRPO>" in page.text and HOSTILE in page.text, "shown as it was said"


def test_the_page_says_what_was_learned_and_lost(report):
    """plain: a .75 then b 1 just learned, mean 87.5; a ends at .5 and .75: lost 25 and 0 points, mean 12.5."""
    text = " ".join(read(report / "page.html").text.split())
    assert "plain stood at 87.5 % when each task had just been learned, and stands at 81.2 % in the end" in text
    assert "earlier tasks are 12.5 points below their best" in text and "probes changed by -25.0 points" in text
    assert "12.5 ± 17.7" in text, "forgetting over two seeds"
    for heading in (
        "Learned and lost",
        "Against plain",
        "Cost",
        "Rollout filter",
        "Fingerprints",
        "What the figures are",
    ):
        assert heading in text
    assert "2 50.0 37.5 8 2.0 fewer than 1 passes: 1" in text, "judged, kept, right, completions, minutes, reasons"
    assert "model.init_args.lr 0.1 0.2" in text
    assert "One seed: hostile." in text


def test_each_probe_has_its_change_since_the_base(tmp_path, monkeypatch):
    """One of four rows is lost: 25 points; of a draw 0 to 75, for it may come up never, or three times in four."""
    monkeypatch.setattr("cpt_lightning.report.intervals.NUM_DRAWS", 400)
    report = Report(arms_of([str(made_run(tmp_path / "x"))]))
    assert report.probes == ["p"] and report.probe_changes == {"x": [("-25.0", "[-75.0, 0.0]", False)]}


def test_the_files_beside_the_page(report):
    names = {path.name for path in report.iterdir()}
    assert names == {"page.html", "page.md", "page.csv", "page.tex", "page_files"}
    with (report / "page.csv").open() as file:
        rows = [(row["arm"], row["seed"], float(row["forgetting"])) for row in csv.DictReader(file)]
    assert rows == [("plain", "0", 25.0), ("plain", "1", 0.0), ("hostile", "0", 0.0)]
    with (report / "page_files/matrices.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 3 * 3 * 3 and cells[0]["after"] == "base" and cells[-1]["kind"] == "probe"
    pictures = {"learning_forgetting", "learning_probes", "tasks", "matrix_1", "curves_1", "matrix_2", "curves_2"}
    assert {path.name for path in (report / "page_files").iterdir()} == {
        "matrices.csv", *(f"{name}.{kind}" for name in pictures for kind in ("png", "svg")),
    }  # fmt: skip
    assert (report / "page.tex").read_text().count(r"\begin{tabular}") == 2


def test_the_markdown_shows_what_was_said_as_code_and_its_pictures_exist(report):
    text = (report / "page.md").read_text()
    assert "````text\n" + HOSTILE + "1\n````" in text
    links = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(links) == 7 and all((report / link).exists() for link in links)
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert not any("<script>" in line for line in tables)
    assert "| a | 0.0 ± 0.0 | **75.0 ± 0.0** | 62.5 ± 17.7 |" in text, "mean and deviation of two seeds"


def test_one_run_alone_is_compared_with_nothing(tmp_path):
    report = Report(arms_of([str(made_run(tmp_path / "x"))]))
    assert (report.differences, report.options, report.circumstances) == ({}, {}, {})
    assert report.pictures == [], "a point alone, or a line in a panel for it, says nothing"
    assert report.comparison.legend.startswith("One seed an arm; in brackets")
    report.save(tmp_path / "x.html")
    assert "Against" not in read(tmp_path / "x.html").text


def test_what_updates_did_has_a_table_of_its_own(tmp_path):
    """-3 and 3 thousandths of a nat; the arm that measured nothing has empty cells."""
    for name in ("sft", "grpo"):
        made_run(tmp_path / name)
    write_updates(tmp_path / "sft")
    Report(arms_of([f"{name}={tmp_path / name}" for name in ("sft", "grpo")])).save(tmp_path / "page.html")
    table = (tmp_path / "page.md").read_text().split("## Updates")[1].split("##")[0]
    assert "| sft | 1 | -3.0 | 3.0 | 4.0 | 2.5 | 6.0 | 3.0 | 15.0 |" in table and "| grpo | 1 |  |" in table
    assert "Updates" in read(tmp_path / "page.html").text
    scores, updates = (tmp_path / "page.tex").read_text().split("log p, probes")
    assert "AvgAcc" in scores and updates.count("tabular") == 1, "costs were not logged"


def test_a_cell_of_one_seed_has_an_interval_that_stays_within_0_and_100(tmp_path):
    """Wilson, none right of four: from 0 to z^2 / (4 + z^2) = 3.8415 / 7.8415."""
    report = Report(arms_of([str(made_run(tmp_path / "x"))]))
    base = report.sections[0].table[1]["a"][0]
    assert base is not None and (base.accuracy, base.spread) == (0.0, "[0.0, 49.0]")
    report.save(tmp_path / "x.html")
    assert "| a | 0.0 [0.0, 49.0] |" in (tmp_path / "x.md").read_text()
    assert "0.0[0.0, 49.0]" in read(tmp_path / "x.html").text


def test_streams_of_every_shape_are_reported_together(tmp_path):
    """Joint training, no base, no probes, other tasks without fingerprints and answers, nothing learned yet."""

    def changed(name: str, change, **options):
        run = made_run(tmp_path / name, **options)
        matrix = AccuracyMatrix.load(run / "accuracy_matrix.json")
        change(matrix)
        matrix.save(run / "accuracy_matrix.json")
        return run

    def rename(matrix):
        matrix.tasks, matrix.stages, matrix.fingerprints = ["c", "d"], [["c"], ["d"]], {}
        for scores in (matrix.zero_shot, *matrix.rows):
            scores["c"], scores["d"] = scores.pop("a"), scores.pop("b")

    runs = [
        changed("joint", lambda matrix: setattr(matrix, "stages", [["a", "b"]]), num_stages=1),
        changed("no_base", lambda matrix: setattr(matrix, "zero_shot", None)),
        changed("no_probes", lambda matrix: setattr(matrix, "probes", []), lr=1),
        changed("other", rename, lr=2),
        made_run(tmp_path / "begun", num_stages=0),
    ]
    (runs[3] / "samples.jsonl").unlink()
    report = Report(arms_of(list(map(str, runs))))
    report.save(tmp_path / "page.html")
    text = " ".join(read(tmp_path / "page.html").text.split())
    assert "joint stood at 50.0 % when each task had just been learned, and stands at 50.0 % in the end; probes" in text
    assert "begun (0 of 2 stages) has not learned a task yet" in text
    assert "Some learn other tasks, or in another order: " in text and "Some have other probes: no_probes" in text
    assert {arm: figures[next(iter(figures))]["FWT"] for arm, figures in report.comparison.arms.items()} == {
        "joint": None, "no_base": None, "no_probes": 25.0, "other": 25.0, "begun (0 of 2 stages)": None,
    }  # fmt: skip


def test_unfinished_runs_are_reported_as_such(tmp_path, capsys):
    half, nothing = made_run(tmp_path / "half", num_stages=1), made_run(tmp_path / "nothing", seed=1)
    for name in ("accuracy_matrix.json", "samples.jsonl"):
        (nothing / name).unlink()
    main(["report", str(nothing), str(half), "-o", str(tmp_path / "page.html")])
    said = capsys.readouterr().out
    assert f"{half} is not finished: 1 of 2 stages are learned" in said
    assert f"{nothing} is not finished: nothing has been measured yet" in said
    assert "half (1 of 2 stages)" in read(tmp_path / "page.html").text


def test_pictures_tell_unfinished_arms_from_finished_ones(tmp_path):
    """An arm of which one seed is finished is none."""
    half, whole = made_run(tmp_path / "half", num_stages=1), made_run(tmp_path / "whole", seed=1)
    other = made_run(tmp_path / "other", seed=2)
    panels = Report(arms_of([f"mixed={half}", f"mixed={whole}", str(other)])).comparison.panels
    shown = {point.name: point.is_finished for point in panels["probes"].points}
    assert shown == {"mixed (1 of 2 stages)": False, "other": True}


def test_the_verb_names_what_is_wrong(tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "none")], "none is no folder"),
        ([str(made_run(tmp_path / "x")), "-o", "page.pdf"], "--output=page.pdf must end in .html"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["report", *arguments])
        assert message in capsys.readouterr().err
    (tmp_path / "x/samples.jsonl").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path / "x"), "-o", str(tmp_path / "page.html")])
    assert f"{tmp_path}/x/samples.jsonl cannot be read: it is empty" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_what_lies_beside_runs_is_passed_over_and_named(tmp_path, capsys):
    """As `runs/*` finds it: an inspection, a page. Alone, or as the folder of an arm, such a thing is refused."""
    run, page, looked_at = made_run(tmp_path / "x"), tmp_path / "compared.html", tmp_path / "looked_at"
    (looked_at / "inspect").mkdir(parents=True)
    page.write_text("")
    main(["report", *map(str, (looked_at, page, run)), "-o", str(tmp_path / "out.html")])
    assert f"passed over, for no run was begun there: {looked_at}, {page}\n" in capsys.readouterr().out
    for arguments, message in (
        ([looked_at], "looked_at has neither config.yaml nor accuracy_matrix.json"),
        ([run, f"arm={looked_at}"], "looked_at has neither config.yaml nor accuracy_matrix.json"),
        ([run, tmp_path / "none"], "none is no folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["report", *map(str, arguments), "-o", str(tmp_path / "out.html")])
        assert message in capsys.readouterr().err


# -- what it is made of ------------------------------------------------------------------------------------------------


def test_rows_gained_since_the_base_and_lost_since_learned(tmp_path):
    """a: rows 0 and 1 gained, row 2 learned and lost; b: all four gained; p: row 3 lost since the base."""
    found = {each.name: each for each in changes_of(RunFolder(made_run(tmp_path / "x")))}
    counts = {name: (each.num_gained, each.num_lost, each.since) for name, each in found.items()}
    assert counts == {"a": (2, 1, "learned"), "b": (4, 0, "learned"), "p": (0, 1, "base")}
    (lost,) = found["a"].lost
    assert (lost.row_id, lost.before, lost.after, lost.gold) == ("a/2", "1", "0", "yes")
    assert [change.row_id for change in found["b"].gained] == ["b/0", "b/1"], "two are shown"


def test_rows_of_answers_that_were_cut_off_are_not_counted(tmp_path):
    """The matrix has 4 rows of p in the end, the file none of them: not that 0 were lost."""
    path = made_run(tmp_path / "x") / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-4]))
    assert changes_of(RunFolder(tmp_path / "x")) == []
    (said,) = Report(arms_of([str(tmp_path / "x")])).resampled.unknown
    assert f"{path} has 0 answers on p, but accuracy_matrix.json 4 with 1.000" in said


@pytest.fixture
def toy_run(tmp_path):
    """Task a asks rows of the toy world; b and p have nothing to show, for they did not change."""
    task = {
        "source": {"class_path": "cpt_lightning.tasks.ToyWorld", "init_args": {"family": "bars2", "num_test": 9}},
        "reward": {"kind": "text"},
        "num_test": 4,
    }
    source = ToyWorld(family="bars2", num_test=9)
    rows = [example.row_id for example in Task(source, reward=Reward(kind="text"), num_test=4).examples("test", "a")]
    run = made_run(tmp_path / "x", {**SCORES, "b": [[0] * 4] * 3, "p": [[1] * 4] * 3})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["tasks"] = {"a": task}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = (run / "samples.jsonl").read_text()
    for number, row in enumerate(rows):
        text = text.replace(f'"a/{number}"', f'"{row}"')
    (run / "samples.jsonl").write_text(text)
    return run


def test_examples_show_the_images_of_their_rows(toy_run, tmp_path):
    """Two gained and one lost: the three images are those of the rows, small."""
    main(["report", str(toy_run), "--images", "-o", str(tmp_path / "page.html")])
    found = [each for each in read(tmp_path / "page.html").references if each.startswith("data:image/png;base64,")]
    changes = changes_of(RunFolder(toy_run))[0]
    names = [change.row_id for change in (*changes.gained, *changes.lost)]
    rows = {row.row_id: row for row in ToyWorld(family="bars2", num_test=9).split("test")}
    assert len(names) == 3 and found == [address(load_image(rows[name].images[0])) for name in names]


def test_images_of_other_rows_are_not_shown(toy_run, tmp_path, capsys):
    path = toy_run / "config.yaml"
    path.write_text(path.read_text().replace("num_test: 9", "num_test: 8"))
    for message in (
        "row 1 of a was toy/bars2/test/1, now the data has toy/bars2/test/2",
        "config.yaml: a cannot be opened",
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["report", str(toy_run), "--images", "-o", str(tmp_path / "page.html")])
        assert message in capsys.readouterr().err
        path.write_text(path.read_text().replace("bars2", "no_such_family"))


def test_cautions_name_what_does_not_compare(tmp_path):
    few = {name: [row[:3] for row in rows] for name, rows in SCORES.items()}
    prints = {"a": "other", "b": "b" * 12, "p": "p" * 12}
    runs = [made_run(tmp_path / "x"), made_run(tmp_path / "y", few, lr=1, fingerprints=prints, max_pixels=3136)]
    assert cautions(arms_of(list(map(str, runs)))) == [
        "Some ask or grade a otherwise (fingerprints differ), so these scores do not compare: y, against x.",
        "Some were scored on another number of rows of a, b, p: y, against x.",
        "Some differ in pixels (model.init_args.backbone.max_pixels: null, 3136): y, against x.",
        "One seed: x, y. Intervals hold for other test rows, not for other seeds.",
    ]
    old = made_run(tmp_path / "z", {**SCORES, "b": [[1, 0, 0, 0], *SCORES["b"][1:]]}, lr=2, fingerprints={})
    said = cautions(arms_of([str(runs[0]), str(old)]))
    assert any(line.startswith("z: written before fingerprints") for line in said)
    base = made_run(tmp_path / "w", {**SCORES, "b": [[1, 0, 0, 0], *SCORES["b"][1:]]}, lr=3)
    assert any("began from another base" in line for line in cautions(arms_of([str(runs[0]), str(base)])))


def test_cautions_name_an_arm_where_all_its_seeds_are_meant(tmp_path):
    """Seed 1 of x saw other pixels, and both seeds of y were graded otherwise than those of x."""
    one, two = made_run(tmp_path / "x0"), made_run(tmp_path / "x1", seed=1, max_pixels=3136)
    prints = {"a": "other", "b": "b" * 12, "p": "p" * 12}
    y = [made_run(tmp_path / f"y{seed}", seed=seed, fingerprints=prints) for seed in (0, 1)]
    said = cautions(arms_of([f"x={one}", f"x={two}", *(f"y={run}" for run in y)]))
    assert [line.rpartition(": ")[2] for line in said] == ["y, against x.", "x (seed 1), against x (seed 0), y."]


def test_a_run_that_logged_elsewhere_says_that_its_costs_are_not_known(tmp_path):
    """With TensorBoard beside the other logger they are."""
    run = made_run(tmp_path / "x")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "trainer": {"logger": {"class_path": "WandbLogger"}}}))
    said = [line for line in cautions(arms_of([str(run)])) if "TensorBoard" in line]
    assert len(said) == 1 and "tokens and memory that it took are not known" in said[0]
    log(run, perf_rows=[16.0])
    assert not any("TensorBoard" in line for line in cautions(arms_of([str(run)])))


def test_a_part_of_the_options_that_an_arm_lacks_is_one_row(tmp_path):
    """z has no task b, and no callbacks where x and y have one: not a row for each of their options."""
    task, arms = {"num_test": 4, "reward": {"kind": "text"}}, []
    for name, tasks, callbacks in (
        ("x", {"a": task, "b": task}, [{"class_path": "Drift"}]),
        ("y", {"a": task, "b": {**task, "num_test": 5}}, [{"class_path": "Drift"}]),
        ("z", {"a": task}, None),
    ):
        config = {"data": {"tasks": tasks}, "trainer": {"callbacks": callbacks}}
        (made_run(tmp_path / name) / "config.yaml").write_text(yaml.safe_dump(config))
        arms.append(f"{name}={tmp_path / name}")
    drift = '[{"class_path": "Drift"}]'
    assert differing_options(arms_of(arms)) == {
        "data.tasks.b": [json.dumps(task), json.dumps({**task, "num_test": 5}), ""],
        "data.tasks.b.num_test": ["4", "5", ""],
        "trainer.callbacks": [drift, drift, "null"],
    }


def test_what_arms_were_told_and_where_they_ran(tmp_path):
    arms = arms_of([str(made_run(tmp_path / name, lr=lr)) for name, lr in (("x", 0.1), ("y", 0.2))])
    assert differing_options(arms) == {"model.init_args.lr": ["0.1", "0.2"]}
    assert differing_circumstances(arms) == {}
    for name, commit in (("x", "aaa"), ("y", "bbb")):
        starts = [{"git": {"commit": "first"}}, {"git": {"commit": commit}, "python": "3.11", "date": commit}]
        (tmp_path / name / "environment.json").write_text(json.dumps({"version": 1, "starts": starts}))
    arms = arms_of([str(tmp_path / "x"), str(tmp_path / "y")])
    assert differing_circumstances(arms) == {"git.commit": ["aaa", "bbb"]}
