"""`cpt inspect`, called as a person calls it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.progress import Progress

from cpt_lightning.cli import main
from cpt_lightning.cli.inspect.measure import collapse_images, measure_split, reason, show
from cpt_lightning.cli.inspect.report import Spread, TaskReport
from cpt_lightning.cli.inspect.stream import opening
from cpt_lightning.cli.inspect.tables import console, task_section
from cpt_lightning.cli.run_directory import run_directory
from cpt_lightning.pictures.contact_sheet import PICTURE, contact_sheet, wrap
from cpt_lightning.tasks import HubRows, Prompt, Reward, Row, Source, Task, ToyWorld
from cpt_lightning.types import Example

CONFIG = """
run_dir: {folder}/run
model: {{class_path: cpt_lightning.modules.SFT}}
data:
  tasks:
    word2:
      source: {{class_path: cpt_lightning.tasks.ToyWorld, init_args: {{family: word2}}}}
      num_val: 4
      num_test: 3
  probes:
    facts: {{source: {{class_path: cpt_lightning.tasks.ToyWorld, init_args: {{family: facts}}}}, num_test: 2}}
  prompts_per_step: 3
  steps: 2
"""
FILES = """
data:
  tasks:
    charts:
      source:
        class_path: cpt_lightning.tasks.FileRows
        init_args: {{train: {folder}/rows.json, test: {folder}/rows.json}}
      prompt: {{style: think_boxed}}
      reward: {{kind: number, format: think_boxed}}
"""


class Listed(Source):
    def __init__(self, rows):
        self.rows = rows

    def split(self, split):
        return self.rows


def inspect(*args) -> int:
    """What the command ends with."""
    try:
        main(["inspect", *map(str, args)])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path / "config.yaml"


@pytest.fixture
def charts(tmp_path, config):
    """An overlay with rows of a file; its pictures are 84 x 84 pixels, which is 3 x 3 tokens of 28 x 28."""
    Image.new("RGB", (84, 84)).save(tmp_path / "good.png")
    Image.new("RGB", (20, 84)).save(tmp_path / "narrow.png")
    (tmp_path / "charts.yaml").write_text(FILES.format(folder=tmp_path))

    def write(*rows):
        content = [{"images": [image], "problem": "How many?", "answer": answer} for image, answer in rows]
        (tmp_path / "rows.json").write_text(json.dumps(content))
        return "-c", config, "-c", tmp_path / "charts.yaml"

    return write


def report_of(tmp_path) -> dict:
    return json.loads((tmp_path / "run" / "inspect" / "report.json").read_text())


def test_it_prints_and_writes_what_a_run_would_ask(tmp_path, config, capsys):
    assert inspect("-c", config, "--inspect.max_rows=20") == 0
    shown = capsys.readouterr().out
    for text in (
        "20 measured of 4,000",
        "<|image_pad|> x 9<|vision_end|>which word is written?",
        "no problem was found",
    ):
        assert text in shown
    report = report_of(tmp_path)
    assert [(task["name"], task["role"]) for task in report["tasks"]] == [("word2", "task"), ("facts", "probe")]
    assert report["stages"] == [{"name": "word2", "num_rows": 4000, "num_steps": 2, "passes": 6 / 4000}]
    train, val, test = report["tasks"][0]["splits"]
    assert [(split["num_rows"], split["num_measured"]) for split in (train, val, test)] == [(4000, 20), (4, 4), (3, 3)]
    assert train["image_tokens"] == dict.fromkeys(("minimum", "median", "p95", "maximum"), 9)
    assert train["image_sizes"] == [[84, 84]] * 3
    assert train["target_earns"] == {"total": 1.0, "accuracy": 1.0}
    names = {split["fingerprint"] for task in report["tasks"] for split in task["splits"]}
    assert len(names) == 6 and all(len(name) == 12 for name in names)
    with Image.open(tmp_path / "run" / "inspect" / "word2.png") as sheet:
        assert sheet.width > 4 * PICTURE[0]
    # The run that comes next has its folder for itself, and nothing of a Trainer was left in it.
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["inspect"]
    assert run_directory(str(tmp_path / "run"), None, named=False) == tmp_path / "run"


def test_no_weights_are_loaded_and_options_of_fit_apply(tmp_path, config, monkeypatch, capsys):
    monkeypatch.setattr("cpt_lightning.models.Backbone.load_model", lambda backbone: pytest.fail("weights were loaded"))
    options = ["--inspect.split=train", "--inspect.max_rows=5", "--inspect.num_examples=1"]
    assert inspect("-c", config, *options, "--data.tasks.word2.prompt.style=direct", "--data.max_prompt_tokens=8") == 1
    report = report_of(tmp_path)
    assert [split["split"] for split in report["tasks"][0]["splits"]] == ["train"]
    (shown,) = report["tasks"][0]["examples"]
    assert shown["prompt"].endswith("using a single word or phrase.<|im_end|>\n<|im_start|>assistant\n")
    assert report["problems"] == ["task word2, train: every prompt is over data.max_prompt_tokens"]
    assert "5 left out" in capsys.readouterr().out


def test_what_replies_are_made_to_begin_with_is_shown_with_the_prompt(tmp_path, config, capsys):
    """Of a task in rollouts and evaluations, of a probe in evaluations; an objective without rollouts forces none."""
    options = ["--inspect.max_rows=2", "--inspect.split=test", "--inspect.num_examples=1"]
    forced = "<think></think><answer>"
    rft = [f"--model.sampling.prefix={forced}", f"--model.evaluation.prefix={forced}"]
    assert inspect("-c", config, "--model=RFT", *rft, *options) == 0
    task, probe = (each["prefixes"] for each in report_of(tmp_path)["tasks"])
    assert task == {"sampling.prefix": forced, "evaluation.prefix": forced}
    assert probe == {"evaluation.prefix": forced}
    shown = capsys.readouterr().out
    line = f"begins with '{forced}' "
    # Once above the splits and once below the example's prompt.
    assert shown.count(f"{line}(sampling.prefix, evaluation.prefix)") == shown.count(f"{line}(evaluation.prefix)") == 2
    assert inspect("-c", config, "--model=RFT", *rft[:1], "--model.evaluation.prefix=The", *options) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"{line}(sampling.prefix)") == 2 and shown.count("begins with 'The' (evaluation.prefix)") == 4
    assert inspect("-c", config, *options) == 0
    assert "begins with" not in capsys.readouterr().out


def test_a_beginning_behind_which_no_reply_can_go_on_is_a_problem(tmp_path, config):
    assert inspect("-c", config, "--model.evaluation.prefix=<|im_end|>", "--inspect.max_rows=1") == 1
    (problem,) = report_of(tmp_path)["problems"]
    assert problem.startswith("evaluation.prefix: the prefix '<|im_end|>' has <|im_end|>, which no reply")


def test_a_stream_alone_is_measured_with_the_embedded_base(tmp_path, config):
    (tmp_path / "stream.yaml").write_text(
        "tasks: {facts: {source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: facts}}, num_test: 2}}"
    )
    options = ["--run_dir", tmp_path / "run", "--inspect.max_rows=3", "--inspect.split=test"]
    assert inspect("--data", tmp_path / "stream.yaml", *options) == 0
    assert report_of(tmp_path)["backbone"] == "tiny"


def test_refused_images_are_counted_by_reason_and_the_first_is_named(tmp_path, charts, capsys):
    rows = [("good.png", "1"), ("narrow.png", "2"), ("gone.png", "3"), ("gone_too.png", "4")]
    assert inspect(*charts(*rows)) == 1
    split = report_of(tmp_path)["tasks"][0]["splits"][0]
    found = [(complaint["what"].split(";")[0], complaint["count"]) for complaint in split["refused"]]
    assert found == [("image does not exist", 2), ("image is N x N pixels", 1)]
    assert "rows.json:3: image" in split["refused"][0]["first"] and "gone.png" in split["refused"][0]["first"]
    assert split["prompt_tokens"] is not None and split["image_tokens"]["maximum"] == 9
    assert "WOULD STOP THE RUN: 2 of 4 train rows" in capsys.readouterr().out

    assert inspect(*charts(*rows), "--data.tasks.charts.bad_images=skip") == 0
    split = report_of(tmp_path)["tasks"][0]["splits"][0]
    assert (sum(complaint["count"] for complaint in split["skipped"]), split["refused"]) == (3, [])


@pytest.mark.parametrize("column", ["problem", "answer"])
def test_half_of_a_character_is_a_problem_that_names_its_row(tmp_path, charts, capsys, column):
    """What is refused is printed and written all the same, though it could not be encoded."""
    options = charts(*[("good.png", "1")] * 3)
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows[1][column] = "3\ud800"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert inspect(*options) == 1
    what = "question" if column == "problem" else "answer"
    said = " ".join(capsys.readouterr().out.split())
    assert f"rows.json:2: the {what} holds '\\ud800', which is half of a character" in said
    assert len(report_of(tmp_path)["problems"]) >= 1


def test_a_split_all_of_whose_rows_would_be_skipped_is_a_problem(tmp_path, charts, capsys):
    """Train and test are the same file. Where 1 of its 3 rows is left that is said, but no problem."""
    assert inspect(*charts(("gone.png", "1"), ("narrow.png", "2")), "--data.tasks.charts.bad_images=skip") == 1
    (problem,) = report_of(tmp_path)["problems"]
    assert problem.startswith(
        "task charts, train, test: all 2 measured rows would be skipped for their images; first: "
    )
    assert "rows.json:1: image" in problem and "gone.png" in problem
    assert report_of(tmp_path)["warnings"] == []
    shown = capsys.readouterr().out
    assert "1 problem" in shown and "no problem was found" not in shown

    rows = [("gone.png", "1"), ("good.png", "2"), ("narrow.png", "3")]
    assert inspect(*charts(*rows), "--data.tasks.charts.bad_images=skip") == 0
    known, *skipped = report_of(tmp_path)["warnings"]
    assert known.startswith("task charts, test: 1 of 3 measured rows") and "in train too" in known
    assert [warning[:39] for warning in skipped] == [
        "task charts, train: 67% of the measured",
        "task charts, test: 67% of the measured ",
    ]
    assert "warning: task charts, train: 67%" in capsys.readouterr().out


def test_rows_of_an_evaluation_that_are_learned_too_are_counted(tmp_path, charts, capsys):
    """Another picture of one colour and another question are another row; another answer is not."""
    Image.new("RGB", (84, 84), "red").save(tmp_path / "red.png")
    overlay = charts(("good.png", "1"), ("red.png", "2"))
    (tmp_path / "test.json").write_text(
        json.dumps(
            [
                {"images": ["good.png"], "problem": "How many?", "answer": "7"},
                {"images": ["good.png"], "problem": "How many more?", "answer": "1"},
                {"images": ["narrow.png"], "problem": "How many?", "answer": "1"},
            ]
        )
    )
    skipping = "--data.tasks.charts.bad_images=skip"
    assert inspect(*overlay, skipping, f"--data.tasks.charts.source.init_args.test={tmp_path / 'test.json'}") == 0
    by_split = {split["split"]: split["num_learned"] for split in report_of(tmp_path)["tasks"][0]["splits"]}
    assert by_split["train"] == 0 and by_split["test"] == 1
    assert "task charts, test: 1 of 3 measured rows stand in train too" in capsys.readouterr().out


def test_a_task_whose_file_is_missing_is_reported_and_the_others_inspected(tmp_path, charts, capsys):
    args = charts(("good.png", "1"))
    (tmp_path / "rows.json").unlink()
    assert inspect(*args) == 1
    charts_report, facts = report_of(tmp_path)["tasks"]
    assert all("rows.json' does not exist" in split["error"] for split in charts_report["splits"])
    assert facts["splits"][2]["num_rows"] == 2
    assert [problem.split(":")[0] for problem in report_of(tmp_path)["problems"]] == ["task charts, train, test"]
    said = capsys.readouterr().out
    assert "train, val, test cannot be opened" in said
    assert said.count("tokens: min · median · p95 · max") == 1  # of the other's table: nothing to explain in this one


def test_the_bar_says_which_set_is_being_opened():
    tasks = {"a": Task(HubRows("me/set", {"train": "train"})), "b": Task(Listed([]))}
    progress = Progress(disable=True)
    for name, said in (("a", "opening a (me/set)"), ("b", "opening b")):
        with opening(SimpleNamespace(everything=tasks), name, progress):
            assert [task.description for task in progress.tasks] == [said]
    assert progress.tasks == []


def test_a_split_that_is_not_needed_may_be_missing(tmp_path, charts, capsys):
    assert inspect(*charts(("good.png", "1"))) == 0
    assert "no val split" in report_of(tmp_path)["tasks"][0]["splits"][1]["error"]
    assert "val cannot be opened: no val split" in capsys.readouterr().out


def test_a_target_that_its_own_reward_finds_wrong_is_said_loudly(tmp_path, charts, capsys):
    args = [*charts(("good.png", "12"), ("good.png", "13")), "--data.tasks.charts.target=no more than 1{answer}"]
    assert inspect(*args) == 1
    split = report_of(tmp_path)["tasks"][0]["splits"][0]
    assert [(c["what"], c["count"]) for c in split["wrong_targets"]] == [
        ("the SFT target earns accuracy 0 under the task's own reward", 2)
    ]
    assert "target 'no more than 112', answer '12'" in split["wrong_targets"][0]["first"]
    assert "WRONG DATA: 2 of 2 train rows" in capsys.readouterr().out


# -- mistakes read as those of `cpt fit` -------------------------------------------------------------------------------


def test_a_misspelt_option_is_named_as_by_fit(config, capsys):
    messages = []
    for verb in ("fit", "inspect"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "-c", str(config), "--data.prompts_per_stp=3"])
        assert stop.value.code == 2
        messages.append(capsys.readouterr().err.split("error:")[-1])
    assert all("prompts_per_stp" in message for message in messages)
    with pytest.raises(SystemExit):
        main(["inspect", "-c", str(config), "--data.stages=[wrd2]"])
    assert "cpt inspect: error: data.stages names 'wrd2'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--inspect.max_rows=0", "--inspect.num_examples=-1", "--inspect.split=tset"])
def test_an_option_of_its_own_out_of_range_is_named(config, capsys, option):
    with pytest.raises((SystemExit, ValueError)) as stop:
        main(["inspect", "-c", str(config), option])
    name, value = option.removeprefix("--").split("=")
    said = f"{stop.value} {capsys.readouterr().err}"
    assert name in said and value in said


def test_a_backbone_without_files_is_named_with_a_way_out(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "-c", str(config), f"--model.backbone.path={tmp_path}/none"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/none" in said and "--model.backbone.path tiny" in said


def test_a_backbone_of_another_kind_is_named_likewise(config, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "-c", str(config), f"--model.backbone.path={tmp_path}"])
    assert stop.value.code == 2 and "is a model of type 'qwen2_vl'" in capsys.readouterr().err


def test_the_saved_config_of_a_run_can_be_inspected(config, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(config), "--print_config"])
    (tmp_path / "saved.yaml").write_text(capsys.readouterr().out)
    assert inspect("-c", tmp_path / "saved.yaml", "--inspect.max_rows=2") == 0


def test_help_teaches_and_comes_first(capsys):
    code = "from cpt_lightning.cli import main; main(['-h'])"
    assert "inspect" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code in (0, None)
    assert "cpt inspect -c configs/demo/grpo.yaml" in shown and "contact sheet" in shown
    assert shown.index("--inspect.max_rows") < shown.index("--trainer.devices")


# -- parts -------------------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_encoded_prompts(processor):
    pictures = [Image.new("RGB", size) for size in ((84, 84), (56, 112), (300, 100), (700, 500))]
    rows = [Row(f"r:{n}", "<image> and <image>?", "x", [picture, pictures[0]]) for n, picture in enumerate(pictures)]
    rows.append(Row("r:text", "No picture?", "y"))
    for example in Task(Listed(rows), Prompt(style="direct")).examples("test", "t"):
        prompt = processor.encode([example.messages], [example.images])
        counted = processor.count_tokens(example.messages, [image.size for image in example.images])
        num_image_tokens = int((prompt.input_ids == processor.image_token_id).sum())
        assert counted == (prompt.input_ids.shape[1], num_image_tokens)


def test_the_baseline_is_what_the_reward_gives_the_most_frequent_answer(processor):
    """ "yes" is said by 2 of 4 rows and, in other words, by a third; the vote among people counts as one answer."""
    golds = ["yes", "yes", "Yes.", ["no", "no", "yes"]]
    rows = [Row(f"r:{n}", "Is it?", gold) for n, gold in enumerate(golds)]
    found = measure_split("test", Task(Listed(rows), reward=Reward(kind="yes_no")).examples("test", "t"), processor)
    assert found.answers.num_distinct == 3
    assert found.answers.most_frequent[0] == ("yes", 0.5)
    assert found.answers.baseline == 1.0  # of several reference answers any will do


def test_soft_accuracy_below_one_is_no_fault_where_people_disagree(processor):
    """Of ten answers the best is given by two: its accuracy is 2/3 at most, and the target has it."""
    golds = ["cat", "cat", *"abcdefgh"]
    rows = [Row("r:0", "What?", golds), Row("r:1", "What?", golds, target="dog")]
    found = measure_split("test", Task(Listed(rows), reward=Reward(kind="vqa")).examples("test", "t"), processor)
    assert [(complaint.count, complaint.first.split(":")[1].strip()) for complaint in found.wrong_targets] == [(1, "1")]


def test_a_row_that_the_reward_cannot_grade_is_a_fault(processor):
    rows = [Row("r:0", "Which?", "none of these")]
    found = measure_split("test", Task(Listed(rows), reward=Reward(kind="letter")).examples("test", "t"), processor)
    assert [complaint.what for complaint in found.wrong_targets] == ["the reward cannot grade the row"]
    assert found.answers.baseline == 0


def test_an_example_is_shown_as_its_ids_decode(processor):
    example = Task(ToyWorld("colour")).examples("test", "colour")[0]
    shown = show(example, processor)
    assert shown.prompt.startswith("<|im_start|>user\n<|vision_start|><|image_pad|> x 9<|vision_end|>")
    assert collapse_images("<|image_pad|>" * 2 + "a<|image_pad|>") == "<|image_pad|> x 2a<|image_pad|> x 1"


def test_a_spread_is_of_numbers_that_are_there():
    assert Spread.of([]) is None
    assert Spread.of(range(1, 101)) == Spread(1, 50, 95, 100)
    assert Spread.of([4, 1]) == Spread(1, 1, 4, 4)


def test_the_reason_of_an_error_has_no_names():
    said = "task 'a b', my file.jsonl:17: image 'x 3.png' does not exist; correct the path"
    assert reason(said) == "image does not exist; correct the path"
    said = "task 'a', rows.jsonl:17: column 'q1' holds 'a or b', which is no list of 12 options"
    assert reason(said) == "column 'q1' holds , which is no list of N options"


def test_a_contact_sheet_has_room_for_every_row():
    reward = Reward()
    long = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "word " * 300 + "x" * 900}]}]
    images = [Image.new("RGB", (3000, 30), "red"), Image.new("RGB", (30, 3000), "blue")]
    examples = [Example("t", f"r:{n}", long, ["a", "b"], reward, images * n) for n in range(6)]
    sheet = contact_sheet("a task", examples)
    assert sheet.height > 2 * PICTURE[1]
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours
    lines = wrap("word " * 300, 200, 3)
    assert len(lines) == 3 and lines[-1].endswith("...")


@pytest.mark.parametrize("licence", ["CC BY-NC-SA 4.0", None])
def test_a_tasks_licence_is_shown_where_it_is_known(licence, capsys):
    report = TaskReport("a", "task", {"style": "none"}, {}, "text", target=None, licence=licence)
    console().print(task_section(report))
    shown = capsys.readouterr().out
    assert ("licence" in shown) == (licence is not None) and (licence or "") in shown


def test_at_a_glance_numbers_are_whole_on_a_narrow_terminal(config, capsys, monkeypatch):
    """80 columns; a style and a kind of answer with long names are folded instead."""
    monkeypatch.setattr("cpt_lightning.cli.inspect.tables.MIN_WIDTH", 80)
    monkeypatch.setenv("COLUMNS", "80")
    inspect("-c", config, "--data.tasks.word2.reward.kind=letter_or_short_answer", "--data.style=think_boxed")
    said = capsys.readouterr().out.split("at a glance")[1]
    assert "longest" in said and "one answer" in said and "…" not in said
    assert [line for line in said.splitlines() if "%" in line and len(line) == 80 and "word2" in line]
