"""``cpt study``: what is run, in which order, what is skipped; and the shipped studies."""

import csv
import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cpt_lightning.cli import main
from cpt_lightning.cli.export import _parser as export_parser
from cpt_lightning.cli.study import parsing
from cpt_lightning.cli.study.arms import Study
from cpt_lightning.cli.study.runner import DONE, Runner, is_finished
from cpt_lightning.records import RunFolder
from cpt_lightning.report import figures_of
from tests.test_configs import ROOT, resolved

STUDIES = sorted((ROOT / "configs/studies").glob("*.yaml"))


def study(tmp_path: Path, arms: dict, **content) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "arms": arms, **content}))
    return Study.load(path)


def test_options_lie_between_an_arm_s_configs_and_its_own_words(tmp_path):
    arms = {"a": 'fit -c x.yaml --data y.yaml --data.target "<a>{{answer}}</a>"'}
    (run,) = study(tmp_path, arms, options="--data.steps 4", seeds=[7]).runs()
    folder = str(tmp_path / "out/a/seed_7")
    assert run.commands == (
        ("fit", "-c", "x.yaml", "--data", "y.yaml", "--data.steps", "4", "--data.target", "<a>{answer}</a>",
         "--seed_everything", "7", "--run_dir", folder, "--ckpt_path", "last"),
    )  # fmt: skip


def test_an_arm_finds_the_folder_of_another_and_its_own(tmp_path):
    arms = {"grpo": "fit -c g.yaml", "more": ["predict --ckpt_path {grpo}/last.ckpt", "fit --data.rollouts {run}/r"]}
    *_, run = study(tmp_path, arms, seeds=[0, 1]).runs()
    assert run.needs == {"grpo"} and run.seed == 1
    assert run.commands[0][2] == str(tmp_path / "out/grpo/seed_1/last.ckpt")
    assert run.commands[1][2] == str(tmp_path / "out/more/seed_1/r") and "--run_dir" not in run.commands[0]


def test_an_arm_may_export_what_another_learned_as_the_help_says(tmp_path):
    """`cpt export` draws nothing, and knows no seed."""
    grpo, run = study(tmp_path, {"grpo": "fit -c g.yaml", "more": ["export {grpo} --output {run}/base", "fit"]}).runs()
    options = export_parser().parse_args(run.commands[0][1:])
    assert (options.run, options.output) == (str(grpo.folder), str(run.folder / "base"))
    assert run.commands[1][1:3] == ("--seed_everything", "0")


def test_a_grid_runs_an_arm_for_each_of_its_values_and_the_others_once(tmp_path):
    arms = {"a": "fit --lr {lr} --rank {rank}", "b": "fit -c x.yaml", "c": "fit --lr {lr} --from {a_lr_0.001_rank_8}"}
    whole = study(tmp_path, arms, grid={"lr": [1e-4, 0.001], "rank": [8]})
    runs = {run.arm: run for run in whole.runs()}
    assert list(runs) == ["a_lr_0.0001_rank_8", "a_lr_0.001_rank_8", "b", "c_lr_0.0001", "c_lr_0.001"]
    assert runs["a_lr_0.001_rank_8"].commands[0][:5] == ("fit", "--lr", "0.001", "--rank", "8")
    assert runs["c_lr_0.0001"].commands[0][2:5] == ("0.0001", "--from", str(tmp_path / "out/a_lr_0.001_rank_8/seed_0"))
    assert runs["c_lr_0.0001"].needs == {"a_lr_0.001_rank_8"} and not runs["b"].needs
    assert whole.values["a_lr_0.0001_rank_8"] == {"lr": "0.0001", "rank": "8"}
    assert list(whole.chosen(["c_lr_0.001"], None).arms) == ["a_lr_0.001_rank_8", "c_lr_0.001"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"arms": {"a": "fit {lr}"}, "grid": {"lr": 3}}, r"must give each of its names a list"),
        ({"arms": {"a": "fit {lr}"}, "grid": {"lr": [1], "rank": [2]}}, r"grid has rank, but no arm says \{rank\}"),
        ({"arms": {"a": "fit {a}"}, "grid": {"a": [1]}}, "grid has a, which stands for a folder"),
        ({"arms": {"a": "fit {lr}", "b": "fit {a}"}, "grid": {"lr": [1]}}, r"arm b names \{a\}, which is no earlier"),
        ({"arms": {}}, "a study has `arms`"),
        ({"arms": {"a": "fit"}, "sead": [1]}, "unknown sead"),
        ({"arms": {"a": "fit", "seeds": 3}}, "arm seeds must be a cpt command"),
        ({"arms": {"a": "fit"}, "seeds": ["x"]}, "must be a list of whole numbers"),
        ({"arms": {"a": "fit"}, "seeds": 3}, "seeds=3 must be a list of whole numbers"),
        ({"arms": {"a": "fit"}, "seeds": [True]}, "must be a list of whole numbers"),
        ({"arms": {"a": "fit"}, "seeds": [1, 2, 1]}, r"seeds=\[1, 2, 1\] has 1 twice, which is one run; leave one out"),
        ({"arms": {"a": "fit"}, "options": 3}, "options=3 must be text; quote it"),
        ({"arms": {"a": "fit"}, "out": 3}, "out=3 must be text; quote it"),
        ({"arms": {"a": "fit"}, "options": "--a 'b"}, 'options: No closing quotation in "--a \'b"'),
        ({"arms": {"a": "fit --a 'b"}}, 'arm a: No closing quotation in "fit --a \'b"'),
        ({"arms": {"a": "fit }"}}, "arm a: Single '}' encountered.*; braces that are meant as such are doubled"),
        ({"arms": {"a": ["fit", " "]}}, "arm a must be a cpt command"),
        ({"arms": {"a b/c": "fit"}}, r"'a b/c' cannot be the name of an arm .* '/' would begin another folder"),
        ({"arms": {"a": "fit -c {c}"}, "grid": {"c": ["x/y.yaml"]}}, "'a_c_x/y.yaml' cannot be the name of an arm"),
        ({"arms": {"..": "fit"}}, r"'\.\.' cannot be the name of an arm .* letters or digits"),
        ({"arms": {"": "fit"}}, "'' cannot be the name of an arm .* letters or digits"),
        ({"arms": {"run": "fit"}}, r"'run' cannot be the name .*: \{run\} stands for a run's own folder"),
        ({"arms": {"a\nb": "fit"}}, r"'a\\nb' cannot be the name .* a character that cannot be seen"),
        ({"arms": {"ä" * 101: "fit"}}, "cannot be the name .* 200 bytes are the most; shorten it"),
        ({"arms": {"a": "fit -c {b}", "b": "fit"}}, r"arm a names \{b\}, which is no earlier arm"),
        ({"arms": {"a": "predict -c x.yaml"}}, "no command that begins with fit"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(tmp_path, content, message):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        Study.load(path)


def test_an_arm_that_is_there_twice_is_not_dropped_in_silence(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("arms:\n  a: fit -c one.yaml\n  b: fit\n  a: fit -c two.yaml\n")
    with pytest.raises(ValueError, match=r"study.yaml: 'a' is there twice, in lines 2 and 4"):
        Study.load(path)


def test_the_verb_says_what_is_wrong_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(tmp_path / "none.yaml")])
    assert "none.yaml cannot be read: No such file" in capsys.readouterr().err


def test_a_study_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_bytes("arms: {é: fit}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"study.yaml is not UTF-8 at byte 7; save it as UTF-8"):
        Study.load(path)


def test_some_arms_bring_those_that_they_need(tmp_path):
    whole = study(tmp_path, {"a": "fit", "b": "fit -c {a}", "c": "fit -c {b}", "d": "fit"})
    assert list(whole.chosen(["c"], [5]).arms) == ["a", "b", "c"]
    assert [run.seed for run in whole.chosen(["d"], [5]).runs()] == [5]
    assert list(whole.chosen(["[ad]", "b*"], None).arms) == ["a", "b", "d"] and whole.chosen(None, None).seeds == [0]
    with pytest.raises(ValueError, match="has no arm e; there are a, b, c, d"):
        whole.chosen(["e"], None)
    with pytest.raises(ValueError, match=r"seeds=\[1, 1\] has 1 twice"):
        whole.chosen(None, [1, 1])


class Recorded(Runner):
    """Runs nothing, and notes what it would have; some commands fail."""

    def __init__(self, *args, failing: str = "none") -> None:
        super().__init__(*args)
        self.failing = failing
        self.seen: list[tuple[str, str]] = []

    def _execute(self, command, log, gpu):
        self.seen.append((" ".join(command), gpu))
        return int(self.failing in command)


def test_runs_come_after_those_that_they_need_and_finished_ones_are_skipped(tmp_path):
    runs = list(study(tmp_path, {"a": "fit -c a", "b": "fit -c {a}/x", "c": "fit -c c"}).runs())
    runner = Recorded(2, ["3", "5"])
    assert runner(runs) == []
    places = {
        arm: next(i for i, (words, _) in enumerate(runner.seen) if f"/{arm}/seed_0 --ckpt" in words) for arm in "abc"
    }
    assert places["a"] < places["b"] and {gpu for _, gpu in runner.seen} <= {"3", "5"}
    again = Recorded()
    assert again(runs) == [] and again.seen == []


def test_a_failed_run_takes_with_it_what_needs_it_and_nothing_else(tmp_path, capsys):
    runs = list(study(tmp_path, {"a": "fit -c bad", "b": "fit -c {a}/x", "c": "fit -c c"}).runs())
    lost = Recorded(1, failing="bad")(runs)
    assert [run.arm for run in lost] == ["a", "b"]
    assert [is_finished(run) for run in runs] == [False, False, True]
    assert "a, seed 0: failed with 1" in capsys.readouterr().out


def test_of_a_failed_run_its_own_last_complaint_is_shown(tmp_path, capsys):
    """A command that cannot be parsed ends with 2 and two lines of usage before its complaint."""
    runs = list(study(tmp_path, {"a": "fit --data.stepps 3"}).runs())
    assert Runner(1)(runs) == runs
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "a, seed 0: failed with 2" in first and second.startswith("  error: ") and "stepps" in second


def test_the_last_lines_say_why_each_run_is_lost(tmp_path, capsys, monkeypatch):
    arms = {"a": "fit -c bad", "b": "fit -c {a}/x", "c": "fit -c {b}/x", "d": "fit"}
    path = study(tmp_path, arms).path
    monkeypatch.setattr("cpt_lightning.cli.study.parsing.check_commands", lambda path, runs: None)
    monkeypatch.setattr(Runner, "_execute", lambda runner, command, log, gpu: int("--run_dir" in command))
    with pytest.raises(SystemExit, match="1"):
        main(["study", str(path), "--arms", "c"])
    assert capsys.readouterr().err.splitlines() == [
        "cpt study: 3 of 3 runs did not get to their end:",
        f"  a, seed 0: failed or was stopped, see {tmp_path}/out/a/seed_0/study.log",
        "  b, seed 0: not begun, for it needs a, seed 0",
        "  c, seed 0: not begun, for it needs b, seed 0",
    ]


@pytest.mark.parametrize(
    ("later", "said"),
    [
        (
            "fit -c configs/demo/sft.yaml --data.stepz 3",
            "cpt fit: unrecognized arguments: --data.stepz 3; did you mean data.steps\\?$",
        ),
        (["predict -c none.yaml", "fit"], 'cpt predict: Parser key "config": File does not exist: .*none.yaml'),
        (["predct -c none.yaml", "fit"], "unknown verb 'predct'; there are fit, "),
    ],
)
def test_an_arm_that_could_not_begin_is_named_before_another_has_run(tmp_path, monkeypatch, capsys, later, said):
    monkeypatch.chdir(ROOT)
    path = study(tmp_path, {"good": "fit -c configs/demo/sft.yaml", "later": later}, seeds=[0, 1]).path
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(path)])
    error = capsys.readouterr().err
    assert error.startswith(f"cpt study: error: {path}: arm later") and re.search(said, error.strip()), error
    assert not (tmp_path / "out").exists()


def test_what_is_parsed_beforehand_is_each_arm_once_and_only_what_is_left(tmp_path, monkeypatch):
    """Arm a has its first command behind it, b asks for a config that a writes; export is left to its turn."""
    arms = {"a": ["predict -c p", "fit -c a"], "b": ["export {a}", "fit -c {a}/config.yaml"], "c": "fit -c c"}
    runs = list(study(tmp_path, arms, seeds=[0, 1]).runs())
    Recorded(failing="a")(runs[:1])
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(parsing, "_complaint", seen.append)
    parsing.check_commands(tmp_path / "study.yaml", runs)
    assert [command[:3] for command in seen] == [("fit", "-c", "a"), ("fit", "-c", "c")]
    (tmp_path / "out/a/seed_0/config.yaml").write_text("")
    parsing.check_commands(tmp_path / "study.yaml", runs)
    assert [command[2] for command in seen[2:]] == ["a", f"{tmp_path}/out/a/seed_0/config.yaml", "c"]


def test_classes_of_the_working_directory_are_found_beforehand_as_they_are_later(tmp_path, monkeypatch, capsys):
    (tmp_path / "beside_the_study.py").write_text(
        "from lightning import Callback\n\n\nclass Mine(Callback):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    config = f"fit -c {ROOT}/configs/demo/sft.yaml --trainer.callbacks+=beside_the_study."
    path = study(tmp_path, {"a": f"{config}Mine", "b": f"{config}Other"}).path
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(path)])
    assert "arm b could not begin" in capsys.readouterr().err


def test_a_command_that_came_to_its_end_is_not_given_again(tmp_path):
    runs = list(study(tmp_path, {"a": ["predict -c a", "fit -c bad"]}).runs())
    first, second = Recorded(1, failing="bad"), Recorded()
    assert first(runs) == runs and len(first.seen) == 2
    assert second(runs) == [] and [words.split()[0] for words, _ in second.seen] == ["fit"]


def test_a_run_by_other_commands_is_not_taken_for_this_one(tmp_path):
    Recorded()(list(study(tmp_path, {"a": "fit -c old"}).runs()))
    with pytest.raises(ValueError, match="a, seed 0 was made by other commands"):
        Recorded()(list(study(tmp_path, {"a": "fit -c new"}).runs()))


def test_a_process_of_its_own_gets_its_gpu_and_log(tmp_path, monkeypatch):
    """What is really started: this Python, with the GPU's number; its output and status come back."""
    program = tmp_path / "cpt_lightning.py"
    program.write_text("import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[1:]); sys.exit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert Runner(1, ["4"])._execute(["fit", "x"], tmp_path / "log", "4") == 3
    assert (tmp_path / "log").read_text().splitlines() == ["$ cpt fit x", "4 ['fit', 'x']"]


def test_sigterm_ends_what_runs_and_begins_nothing(tmp_path, monkeypatch, capsys):
    """The process that runs says that it was asked to end; the arm that would come next is not begun."""
    program = tmp_path / "cpt_lightning.py"
    program.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        Runner()(list(study(tmp_path, {"a": ["fit -c x", "fit -c y"], "b": "fit -c x"}).runs()))
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert "a, seed 0: stopped by a signal" in capsys.readouterr().out
    assert (tmp_path / "out/a/seed_0/study.log").read_text().count("$ cpt") == 1
    assert not (tmp_path / "out/b").exists()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_command_s_last_moment_does_not_begin_the_next(tmp_path, monkeypatch, capsys):
    """It ends as if nothing had been, for it came too late to stop it; the person has pressed Ctrl-C all the same."""
    program = tmp_path / "cpt_lightning.py"
    program.write_text("import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(0.2)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        Runner()(list(study(tmp_path, {"a": ["fit -c x", "fit -c y"], "b": "fit -c x"}).runs()))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "a, seed 0: stopped by a signal" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/a/seed_0" / DONE).read_text())["commands"][0][:3] == ["fit", "-c", "x"]
    assert (tmp_path / "out/a/seed_0/study.log").read_text().count("fit -c y") == 0
    assert not (tmp_path / "out/b").exists()


@pytest.mark.parametrize("status", [-signal.SIGTERM, -signal.SIGINT, 143, 130])
def test_what_a_signal_ended_is_not_said_to_have_failed(tmp_path, monkeypatch, capsys, status):
    """Also where nothing caught it, as in `export`, or in `fit` before its first batch."""
    monkeypatch.setattr(Runner, "_execute", lambda runner, command, log, gpu: int(status))
    assert len(Runner()(list(study(tmp_path, {"a": "fit"}).runs()))) == 1
    assert "a, seed 0: stopped by a signal" in capsys.readouterr().out


def test_an_arm_s_name_is_text_brackets_and_all(tmp_path, monkeypatch, capsys):
    """Not markup, which the terminal would leave out."""
    monkeypatch.setattr(Runner, "_execute", lambda runner, command, log, gpu: 1)
    Runner()(list(study(tmp_path, {"[red]": "fit"}).runs()))
    said = capsys.readouterr().out
    assert "[red], seed 0: begins" in said and "[red], seed 0: failed" in said


# -- the shipped studies -----------------------------------------------------------------------------------------------


def fits(path: Path) -> list:
    """The fits of the first seed of a study; of a grid one for each of its arms."""
    shipped = Study.load(path)
    first = {id(commands): arm for arm, commands in reversed(shipped.arms.items())}
    runs = [run for run in shipped.runs() if run.seed == shipped.seeds[0] and run.arm in first.values()]
    return [pytest.param(c, id=f"{path.stem}-{run.arm}") for run in runs for c in run.commands if c[0] == "fit"]


@pytest.mark.parametrize("command", [command for path in STUDIES for command in fits(path)])
def test_an_arm_of_a_shipped_study_parses(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = resolved(command[: command.index("--ckpt_path")], capsys)
    assert config["seed_everything"] == 0
    assert config["data"]["evaluate_on"] == ("val" if "_on_val" in " ".join(command) else "test")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_of_a_study_differs_from_the_others(path):
    shipped = Study.load(path)
    commands = [json.dumps(run.commands).replace(str(run.folder), "") for run in shipped.runs()]
    assert len(set(commands)) == len(commands) == len(shipped.arms) * len(shipped.seeds)


class Here(Runner):
    """Runs commands in this process: starting Python takes longer than a step."""

    def _execute(self, command, log, gpu):
        main(list(command))
        return 0


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings(
    "ignore:.*callbacks used to create the checkpoint need to be provided"
)  # predict has no Drift
def test_every_arm_on_the_toy_stream_learns_a_step_of_two_tasks(tmp_path, monkeypatch):
    """The commands of the shipped study as they are, but for their length: all come to their end and are compared."""
    monkeypatch.chdir(ROOT)
    toy = replace(Study.load(ROOT / "configs/studies/toy.yaml"), out=tmp_path, seeds=[0])
    names = ("word2", "bars2", "polygon2", "single", "digit2")
    sizes = [
        f"--data.tasks.{name}.num_{split}={count}" for name in names for split, count in (("train", 8), ("test", 2))
    ]
    short = [*sizes, "--data.passes=null", "--data.steps=1", "--data.prompts_per_step=2", "--data.probes=null"]
    # Of Drift, which is the last of every arm's callbacks. Rollouts are as long as they are: else none is right.
    short += ["--model.init_args.evaluation.max_new_tokens=4", "--trainer.callbacks.max_new_tokens=8"]
    short += ["--data.num_workers=0"]
    runs = []
    for run in toy.runs():
        more = short if "multitask" in run.arm else [*short, "--data.stages=[[word2],[bars2]]"]
        commands = tuple((*words, *(more if words[0] == "fit" else sizes)) for words in run.commands)
        runs.append(replace(run, commands=commands))
    assert Here()(runs) == []
    found = {run.arm: figures_of(RunFolder(run.folder)) for run in runs}
    assert list(found) == list(toy.arms)
    assert {arm for arm, figures in found.items() if not figures["rollouts"]} == {
        "sft", "sft_house", "lora_sft", "replay", "ewc", "lwf", "multitask_sft",
    }  # fmt: skip
    assert all(figures["KL"] > 0 for figures in found.values())


def test_a_real_study_runs_resumes_and_compares(tmp_path, monkeypatch, capsys):
    """Two arms with a step per task, in processes of their own; the second call runs nothing."""
    monkeypatch.chdir(ROOT)
    small = "--data.stages [[bars2],[word2]] --data.steps 1 --data.prompts_per_step 4 --data.probes null"
    small += "".join(f" --data.tasks.{name}.num_test 4" for name in ("word2", "bars2", "polygon2", "single", "digit2"))
    arms = {"sft": "fit -c configs/demo/sft.yaml", "grpo": "fit -c configs/demo/grpo.yaml"}
    path = study(tmp_path, arms, options=f"{small} --trainer.enable_progress_bar false").path
    main(["study", str(path), "--jobs", "2"])
    out = tmp_path / "out"
    with (out / "comparison.csv").open() as file:
        found = {row["arm"]: row for row in csv.DictReader(file)}
    assert (float(found["grpo"]["rows"]), float(found["grpo"]["rollouts"])) == (0.008, 0.064)
    assert float(found["sft"]["rollouts"]) == 0
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "| grpo | 1 |" in (out / "comparison.md").read_text()
    stamp = (out / "grpo/seed_0" / DONE).stat().st_mtime
    main(["study", str(path)])
    assert (out / "grpo/seed_0" / DONE).stat().st_mtime == stamp
    assert "2 finished already" in capsys.readouterr().out
    main(["report", *map(str, out.glob("*/seed_*")), "--images", "-o", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "samples.jsonl" not in page, "what was said adds up to what was scored"
    assert "model.class_path" in page and "cpt_lightning.modules.RFT" in page
    with (tmp_path / "page.csv").open() as file:
        assert {row["arm"]: row["AvgAcc"] for row in csv.DictReader(file)} == {a: found[a]["AvgAcc"] for a in found}
