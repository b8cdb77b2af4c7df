"""Every shipped YAML parses with the command in its first comment, and the demos learn."""

import csv
import json
import math
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from cpt_lightning.cli import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "studies")  # see test_study.py
PARTS = (
    "analysis",
    "backbone",
    "filter",
    "methods",
    "objective",
    "optimizers",
    "rollouts",
    "strategy",
    "streams",
    "studies",
    "tasks",
)
RUNS = [path for path in CONFIGS if path.parent.name not in PARTS]
DEMOS = sorted(
    path for path in (ROOT / "configs" / "demo").glob("*.yaml") if path.stem != "rollout_sft"
)  # which wants a file of rollouts: see test_rollouts.py


def command_of(path: Path) -> list[str]:
    """The command in a config's first comment, without ``cpt``."""
    found = re.match(r"# cpt ((?:fit|predict) [^\n,:]*)", path.read_text(encoding="utf-8"))
    return shlex.split(found[1]) if found else []


PRINTED: dict[tuple[str, ...], str] = {}
"""What ``--print_config`` printed, by folder and arguments: what several tests look at is parsed once."""


def resolved(args: list[str], capsys) -> dict:
    """What ``--print_config`` prints."""
    key = (os.getcwd(), *args)
    if key not in PRINTED:
        with pytest.raises(SystemExit) as stop:
            main([*args, "--print_config"])
        output = capsys.readouterr()
        assert stop.value.code in (0, None), output.err
        PRINTED[key] = output.out
    return yaml.safe_load(PRINTED[key])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([], {"lr": 1e-5, "weight_decay": 0.01, "momentum": 0.0}),
        (["--model.optimizer.weight_decay=0", "--model.optimizer.lr=0.1"], {"lr": 0.1, "weight_decay": 0.0}),
    ],
)
def test_an_optimizer_that_is_named_takes_over_what_the_default_has_too(options, kept, capsys):
    """As the help of ``optimizer`` says; torch's own SGD has lr 1e-3 and decays nothing."""
    config = resolved(["fit", "--model=SFT", "--model.optimizer=torch.optim.SGD", *options], capsys)
    found = config["model"]["init_args"]["optimizer"]
    assert found["class_path"] == "torch.optim.SGD"
    assert {name: found["init_args"][name] for name in kept} == kept


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_parses_with_its_command(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = command_of(path)
    assert str(path.relative_to(ROOT)) in command, "the first comment is the command"
    config = resolved(command, capsys)
    assert config["run_dir"] == f"runs/{path.parent.name}_{path.stem}"
    assert config["data"]["tasks"] and config["data"]["probes"]


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in RUNS], ids=lambda path: path.stem)
def test_a_part_is_used_and_says_by_whom(path):
    """Another config names it, or a command that is tested below."""
    first, *_ = text = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and len(text) < 80
    name = f"{path.parent.name}/{path.name}"
    users = [other for other in CONFIGS if other != path and name in other.read_text(encoding="utf-8")]
    assert users or name in " ".join(command_of(path))


@pytest.mark.parametrize("path", [p for p in CONFIGS if p not in RUNS and command_of(p)], ids=lambda path: path.stem)
def test_the_command_of_a_part_parses(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = resolved(command_of(path), capsys)
    if path.parent.name == "streams":
        stream = yaml.safe_load(path.read_text())
        for group in ("tasks", "probes"):
            assert list(config["data"][group]) == list(stream[group])
        # What the replaced stream said of its tasks would otherwise still stand.
        passes = config["data"]["passes"]
        assert set(passes if isinstance(passes, dict) else ()) <= {*stream["tasks"], *stream["probes"]}


@pytest.mark.parametrize("path", sorted((ROOT / "configs/tasks").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_task_of_the_papers_says_where_it_is_from_and_on_what_terms(path):
    task = yaml.safe_load(path.read_text())
    assert task["licence"]
    assert "arXiv" in path.read_text().splitlines()[0]
    assert task["prompt"]["style"] == task["reward"]["format"], "what is rewarded is what was asked for"


def test_sequential_and_joint_demo_learn_the_same():
    sequential, joint = (
        yaml.safe_load((ROOT / f"configs/streams/toy_{name}.yaml").read_text()) for name in ("five", "joint")
    )
    for part in ("tasks", "probes", "prompts_per_step"):
        assert sequential[part] == joint[part]
    assert joint["stages"] == [list(sequential["tasks"])]
    assert joint["steps"] == sequential["steps"] * len(sequential["tasks"])


ARMS = {
    "grpo": {"kl_coef": 0.01},
    "grpo_no_kl": {"kl_coef": 0.0},
    "grpo_no_cot": {"style": "direct", "max_new_tokens": 128},
    "multitask_rft": {"num_stages": 1, "kl_coef": 0.01},
    "sft": {"style": "direct", "tuning": "full"},
    "multitask_sft": {"num_stages": 1, "style": "direct"},
    "lora_sft": {"tuning": "lora", "style": "direct"},
    "rollout_sft": {"style": None, "tuning": "full"},
    "on_policy_sft": {"style": None, "max_new_tokens": 1024},
}


@pytest.mark.parametrize("backbone", ["qwen2_5_vl_7b", "qwen2_5_vl_3b"])
@pytest.mark.parametrize("arm", ARMS)
def test_the_arms_of_the_paper_are_configs(arm, backbone, capsys, monkeypatch):
    """Each differs from its neighbours in what it is named after, and the 3B model is one more overlay."""
    monkeypatch.chdir(ROOT)
    overlay = [] if backbone == "qwen2_5_vl_7b" else ["-c", f"configs/backbone/{backbone}.yaml"]
    config = resolved([*command_of(ROOT / f"configs/qwen2_5_vl_7b/{arm}.yaml"), *overlay], capsys)
    model, data = config["model"]["init_args"], config["data"]
    found = {
        "kl_coef": model.get("kl_coef"),
        "tuning": model["backbone"]["tuning"],
        "max_new_tokens": model.get("sampling", {}).get("max_new_tokens"),
        "style": data["style"],
        "num_stages": len(data["stages"] or data["tasks"]),
    }
    assert {name: found[name] for name in ARMS[arm]} == ARMS[arm]
    assert found["num_stages"] == (1 if "multitask" in arm else 7)
    assert (
        model["backbone"]["path"]
        == {"7b": "Qwen/Qwen2.5-VL-7B-Instruct", "3b": "Qwen/Qwen2.5-VL-3B-Instruct"}[backbone[-2:]]
    )


def test_paper_settings_reach_the_module(capsys, monkeypatch):
    """Paper A (arXiv 2507.05386): 512 prompts x 8 per rollout, 128 prompts per update, lr 1e-6, clip .2/.3, KL .01."""
    monkeypatch.chdir(ROOT)
    config = resolved(command_of(ROOT / "configs/qwen2_5_vl_7b/grpo.yaml"), capsys)
    model = config["model"]["init_args"]
    assert config["data"]["prompts_per_step"] // model["updates_per_rollout"] == 128
    assert model["group_size"] == 8 and model["optimizer"]["init_args"]["lr"] == 1e-6
    assert (model["clip_low"], model["clip_high"], model["dual_clip"], model["kl_coef"]) == (0.2, 0.3, 3.0, 0.01)
    assert list(config["data"]["tasks"]) == [
        "scienceqa", "textvqa", "vizwiz", "gqa", "geometry3k", "pathvqa", "super_clevr",
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "configs/objective").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_objective_learns_a_step(path, tmp_path, monkeypatch):
    """The command of its comment, one task and one step."""
    monkeypatch.chdir(ROOT)
    args = ["--data.steps=1", "--data.prompts_per_step=4", f"--run_dir={tmp_path / 'run'}", "--data.stages=[bars2]"]
    stream = yaml.safe_load((ROOT / "configs/streams/toy_five.yaml").read_text())
    args += [f"--data.tasks.{name}.num_test=1" for name in stream["tasks"]]
    quiet = ["--data.probes=null", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    main(
        [
            *command_of(path),
            *args,
            *quiet,
            "--trainer.logger.class_path=CSVLogger",
            f"--trainer.logger.save_dir={tmp_path}",
        ]
    )
    (metrics,) = tmp_path.rglob("metrics.csv")
    logged = next(row for row in csv.DictReader(metrics.read_text().splitlines()) if row.get("train/loss"))
    assert math.isfinite(float(logged["train/loss"]))
    assert 0 < float(logged["train/reward/accuracy"]) < 1, "otherwise nothing was learned here"


def test_the_filter_judges_and_its_rows_are_learned(tmp_path, monkeypatch):
    """The command of its comment, one task of eight rows and one step."""
    monkeypatch.chdir(ROOT)
    args = ["--data.steps=1", "--data.prompts_per_step=2", "--data.stages=[word2]", "--data.tasks.word2.num_train=8"]
    stream = yaml.safe_load((ROOT / "configs/streams/toy_five.yaml").read_text())
    args += [f"--data.tasks.{name}.num_test=1" for name in stream["tasks"]]
    args += ["--data.probes=null", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    main([*command_of(ROOT / "configs/filter/rif.yaml"), *args, f"--run_dir={tmp_path / 'run'}"])
    header, *rows = map(json.loads, (tmp_path / "run/filter/word2.jsonl").read_text().splitlines())
    assert (header["completions_per_row"], header["sampling"]["temperature"]) == (8, 1.0)
    assert len(rows) == 8 and [row["kept"] for row in rows] == [row["pass_count"] > 0 for row in rows]


def test_rif_settings_of_the_paper_reach_the_filter(capsys, monkeypatch):
    """RIF-RFT (arXiv 2507.05386): 8 attempts of up to 1,024 tokens at temperature 1, one of them right or more."""
    monkeypatch.chdir(ROOT)
    chosen = resolved(command_of(ROOT / "configs/qwen2_5_vl_7b/rif_grpo.yaml"), capsys)["filter"]
    assert (chosen["mode"], chosen["completions_per_row"], chosen["lowest"]) == ("solvable", 8, 1)
    assert (chosen["highest"], chosen["threshold"], chosen["cap"]) == (None, 1.0, None)
    assert (chosen["sampling"]["max_new_tokens"], chosen["sampling"]["temperature"]) == (1024, 1.0)


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_a_demo_learns_a_few_steps(path, tmp_path, monkeypatch):
    """The command of its comment with two steps per stage and two rows per evaluation."""
    monkeypatch.chdir(ROOT)
    base = ROOT / command_of(path)[2]  # itself, or what it is laid over
    stream = yaml.safe_load((base.parent / yaml.safe_load(base.read_text())["data"]).read_text())
    args = ["--data.steps=2", "--data.prompts_per_step=5", f"--run_dir={tmp_path / 'run'}"]
    args += [f"--data.{group}.{name}.num_test=2" for group in ("tasks", "probes") for name in stream[group]]
    main([*command_of(path), *args, "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"])
    matrix = json.loads((tmp_path / "run" / "accuracy_matrix.json").read_text())
    num_stages = len(stream.get("stages", stream["tasks"]))
    assert [row["after"] is None for row in matrix["rows"]] == [True] + [False] * num_stages
    assert all(cell["num_samples"] == 2 for row in matrix["rows"] for cell in row["scores"].values())
