"""A run's checkpoints, its exports and its matrix agree: the same weights, the same answers, the same scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from cpt_lightning.callbacks.cards import model_card
from cpt_lightning.callbacks.exports import TaskExport, weights_of_model
from cpt_lightning.checkpoint_io import read_checkpoint
from cpt_lightning.cli import main
from cpt_lightning.export import export, push
from cpt_lightning.models import Backbone, Lora
from cpt_lightning.models.folders import save_folder
from cpt_lightning.models.processor import TINY
from cpt_lightning.models.quantization import Quantization, settle_quantized
from cpt_lightning.modules import SFT
from cpt_lightning.records import AccuracyMatrix
from cpt_lightning.report.summary import what_next
from cpt_lightning.rollouts import Sampling
from cpt_lightning.rollouts.prefixes import prefixes_of
from cpt_lightning.sharded_checkpoints import save_shards

# peft 0.21 asks transformers 5.23 by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STREAM = """
tasks:
  word2: {source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: word2}}, num_test: 12}
  bars2: {source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: bars2}}, num_test: 12}
probes:
  facts: {source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: facts}}, num_test: 6}
prompts_per_step: 3
steps: 2
"""
OPTIONS = [
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false",
    "--trainer.accelerator=cpu", "--model.evaluation.max_new_tokens=16", "--export.when=every_task",
]  # fmt: skip
MODELS = {
    "full": [
        "--model=RFT", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3", "--model.group_size=4",
        "--model.kl_coef=0.05", "--model.sampling.max_new_tokens=12", "--model.backbone.freeze=[vision_tower]",
        "--model.sampling.prefix=<answer>",
    ],
    "lora": [
        "--model=SFT", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=5e-3",
        "--model.backbone.tuning=lora", "--model.backbone.lora.rank=4",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run with full tuning and a KL term, and one of adapters, both with exports on the way."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "stream.yaml").write_text(STREAM)
    for name, options in MODELS.items():
        main(["fit", f"--data={folder / 'stream.yaml'}", *options, *OPTIONS, f"--run_dir={folder / name}"])
    return {name: folder / name for name in MODELS}


def rows(run: Path) -> list[dict]:
    return [row["scores"] for row in json.loads((run / "accuracy_matrix.json").read_text())["rows"]]


def scores_of_test(run: Path, folder: Path, *options: str) -> dict:
    """What ``cpt test`` writes with the configuration of the run."""
    main(["test", "-c", str(run / "config.yaml"), f"--run_dir={folder}", *options])
    return json.loads((folder / "test_scores.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(model, prompts) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            pixel_values=prompts.pixel_values,
            image_grid_thw=prompts.image_grid_thw,
            mm_token_type_ids=(prompts.input_ids == model.config.image_token_id).int(),
        ).logits


def plain(folder: Path):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="float32")


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_and_exported_folder_score_what_the_matrix_says(runs, tmp_path, name, capsys):
    """Row by row, answer by answer; the rows differ, so that no folder could pass for another."""
    run = runs[name]
    assert rows(run)[0] != rows(run)[1] != rows(run)[2]
    for stage, task in ((1, "word2"), (2, "bars2")):
        checkpoint = scores_of_test(run, tmp_path / f"checkpoint{stage}", f"--ckpt_path={run / f'{stage}_{task}.ckpt'}")
        folder = f"--model.init_args.backbone.path={run / 'exports' / f'{stage}_{task}'}"
        exported = scores_of_test(run, tmp_path / f"export{stage}", folder)
        assert checkpoint["scores"] == exported["scores"] == rows(run)[stage]
        said = [line["completion"] for line in lines(run / "samples.jsonl") if line["stage"] == stage]
        for kind in ("checkpoint", "export"):
            assert [line["completion"] for line in lines(tmp_path / f"{kind}{stage}" / "test.jsonl")] == said
        assert (checkpoint["backbone"], exported["checkpoint"]) == ("tiny", None)
    matrix = json.loads((run / "accuracy_matrix.json").read_text())
    assert exported["fingerprints"] == matrix["fingerprints"]
    assert "accuracy in %" in capsys.readouterr().out


def test_predict_and_validate_take_an_export(runs, tmp_path):
    run = runs["lora"]
    folder = f"--model.init_args.backbone.path={run / 'exports' / '1_word2'}"
    expected = [line for line in lines(run / "samples.jsonl") if line["stage"] == 1]
    for verb, file in (("validate", "validate.jsonl"), ("predict", "predictions.jsonl")):
        main([verb, "-c", str(run / "config.yaml"), f"--run_dir={tmp_path / verb}", folder])
        answers = [(line["row_id"], line["completion"]) for line in lines(tmp_path / verb / file)]
        assert answers == [(line["row_id"], line["completion"]) for line in expected]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", MODELS)
def test_the_command_makes_of_a_checkpoint_what_the_callback_made_of_the_live_model(runs, tmp_path, name, capsys):
    main(["export", str(runs[name]), "--task", "word2", "--output", str(tmp_path / "1_word2")])
    assert f"exported: {tmp_path / '1_word2'}" in capsys.readouterr().out
    one, other = files(tmp_path / "1_word2"), files(runs[name] / "exports" / "1_word2")
    cards = [part.pop("README.md").decode().partition("\n# ")[2].partition("\n")[2] for part in (one, other)]
    assert one == other
    assert cards[0] == cards[1]


def test_a_card_says_what_was_learned_and_how_well(runs):
    card = (runs["lora"] / "exports" / "2_bars2" / "README.md").read_text()
    row, base = rows(runs["lora"])[2], rows(runs["lora"])[0]
    assert "Learned, in this order: word2, bars2." in card
    for name, label in (("word2", "word2"), ("facts", "probe facts")):
        cell = row[name]
        assert (
            f"| {label} | {100 * cell['accuracy']:.1f} | {100 * base[name]['accuracy']:.1f} | {cell['num_samples']} |"
            in card
        )
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft"
    assert "base_model" not in header  # tiny is nothing that the hub knows
    assert "rank: 4" in card and "## Licence" in card


@pytest.mark.parametrize(
    ("prefixes", "said"),
    [
        (
            {"sampling.prefix": "<a>", "evaluation.prefix": "<a>"},
            "Every reply was made to begin in rollouts and evaluations with `<a>`. The scores are those of replies",
        ),
        (
            {"sampling.prefix": "<a>", "evaluation.prefix": "b"},
            "made to begin in rollouts with `<a>`, and in evaluations with `b`. The scores are those",
        ),
        ({"evaluation.prefix": "b"}, "made to begin in evaluations with `b`. The scores are those of replies that go"),
        ({"sampling.prefix": "<a>"}, "made to begin in rollouts with `<a>`. It was evaluated without"),
    ],
)
def test_a_card_says_in_words_what_replies_were_made_to_begin_with(prefixes, said):
    assert said in model_card("x", "full", Backbone(), "float32", ["a"], prefixes=prefixes)
    in_config = {"sampling": None, "evaluation": {"prefix": ""}}
    in_config |= {option.removesuffix(".prefix"): {"prefix": text} for option, text in prefixes.items()}
    in_module = {option: given and Sampling(**given) for option, given in in_config.items()}
    assert prefixes_of(in_config) == prefixes_of(in_module) == prefixes


def test_a_run_without_a_forced_beginning_has_a_card_without_a_word_of_it(runs):
    """Of the two the one with rollouts forces one in them alone; both are exported by callback and command alike."""
    cards = {name: (run / "exports" / "2_bars2" / "README.md").read_text() for name, run in runs.items()}
    assert "made to begin in rollouts with `<answer>`. It was evaluated without" in cards["full"]
    assert "made to begin" not in cards["lora"]


def test_the_cards_code_loads_the_trained_adapter(runs, mixed_prompts):
    folder = runs["lora"] / "exports" / "2_bars2"
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {"FOLDER": str(folder)}
    exec(code, names)
    checkpoint = torch.load(runs["lora"] / "2_bars2.ckpt", weights_only=True)["state_dict"]
    adapter = load_file(folder / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 4
    for name, weight in adapter.items():
        own = "model." + name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(weight, checkpoint[own])
    alone = PeftModel.from_pretrained(plain(folder / "base"), folder)
    assert torch.equal(logits(names["model"], mixed_prompts), logits(alone, mixed_prompts))


def test_a_merged_export_is_the_adapted_model_to_1e_5(runs, mixed_prompts, tmp_path):
    """Computed in float64, so that only the rounding of the merged weights shows: in float32 either model is by itself
    further than that from its float64 logits."""
    merged = plain(export(runs["lora"], merge=True, output=tmp_path / "merged"))
    adapter = runs["lora"] / "exports" / "2_bars2"
    adapted = PeftModel.from_pretrained(plain(adapter / "base"), adapter)
    single = (logits(merged, mixed_prompts) - logits(adapted, mixed_prompts)).abs().max()
    double = (logits(merged.double(), mixed_prompts) - logits(adapted.double(), mixed_prompts)).abs().max()
    print(f"largest difference {single:.1e} in float32, {double:.1e} in float64")
    assert double < 1e-5
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_an_adapter_that_was_exported_goes_on_being_trained(runs, tmp_path):
    folder = runs["lora"] / "exports" / "1_word2"
    options = ["-c", str(runs["lora"] / "config.yaml"), f"--model.init_args.backbone.path={folder}"]
    main(["fit", *options, f"--run_dir={tmp_path / 'on'}", "--data.stages=[bars2]", "--export.when=end"])
    assert rows(tmp_path / "on")[0] == rows(runs["lora"])[1]
    config = json.loads((tmp_path / "on" / "exports" / "1_bars2" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


def test_a_checkpoint_within_a_task_does_not_claim_its_scores(runs, tmp_path):
    shutil.copytree(runs["full"], tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    record = checkpoint["callbacks"]["ContinualLearning"]
    record["rows"] = record["rows"][:1]
    torch.save(checkpoint, tmp_path / "run" / "last.ckpt")
    card = (export(tmp_path / "run") / "README.md").read_text()
    assert "Learned, in this order: word2, and bars2 at least in part." in card
    assert "Not measured at this point." in card


def test_what_cannot_be_exported_is_said_in_a_line(runs, tmp_path, capsys):
    run = runs["full"]
    python = tmp_path / "python"
    python.mkdir()
    shutil.copy(run / "last.ckpt", python)
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shutil.copy(run / "config.yaml", damaged)
    (damaged / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:1000])
    before = files(run)
    for arguments, message in (
        ([tmp_path / "nowhere"], "there is no such folder"),
        ([tmp_path / "empty"], "is no run's folder: it has no config.yaml"),
        ([python], "made from Python: export there with the callback TaskExport"),
        ([run / "1_word2.ckpt"], "is a checkpoint; give its run's folder, and --task 1_word2"),
        ([damaged], "last.ckpt"),
        ([run, "--task", "bar2"], "did you mean bars2? there are last, 1_word2, 2_bars2"),
        ([run, "--task", "facts"], "no checkpoint of that name; there are last, 1_word2, 2_bars2"),
        ([run, "--merge"], "there is no adapter to merge"),
        ([run, "--task", "word2"], "1_word2 exists already; --overwrite replaces it"),
        ([run, "--output", run, "--overwrite"], "is not the folder of a model alone, and all that is in it would"),
        ([run, "--output", run / "config.yaml", "--overwrite"], "config.yaml is a file; --output names a folder"),
        ([run, "--push", "me/model"], "HF_HUB_OFFLINE is set"),
        ([run, "--push", "me/my/model"], "--push me/my/model"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", *map(str, arguments)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert files(run) == before
    main(["export", str(run), "--task", "1_word2", "--overwrite"])
    assert files(run).keys() == before.keys()
    assert len({file.stat().st_mode for file in (run / "exports/1_word2").iterdir()}) == 1  # who reads one reads all


@pytest.fixture(scope="module")
def streams(runs, tmp_path_factory) -> dict[str, Path]:
    """Runs over three stages whose adapters are renewed, or each task's own; the former exports itself merged."""
    folder = tmp_path_factory.mktemp("streams")
    for name, options in {"renewed": ["--export.merge=true"], "per_task": []}.items():
        main([
            "fit", f"--data={runs['lora'].parent / 'stream.yaml'}", *MODELS["lora"], *OPTIONS, *options,
            f"--model.backbone.lora.along_stream={name}", "--data.stages=[word2,bars2,facts_too]",
            "--data.tasks.facts_too={source: {class_path: ToyWorld, init_args: {family: facts}}, num_test: 3}",
            f"--run_dir={folder / name}",
        ])  # fmt: skip
    return {name: folder / name for name in ("renewed", "per_task")}


def base_with(state: dict, prefixes: list[str]):
    """The base plus ``alpha / rank * B A`` of every adapter that is named, 32 / 4 = 8 times, added up by hand.

    The adapters' weights come in the order of the model: A and B of one layer after the other.
    """
    model = plain(TINY)
    names = [name for name in state if name.startswith("model.") and "lora_" in name]
    with torch.no_grad():
        for prefix in prefixes:
            weights = [state[name] for name in names] if prefix == "model" else own(state, prefix)
            for name, a, b in zip(names[::2], weights[::2], weights[1::2], strict=True):
                layer = name.removeprefix("model.").partition(".lora_A")[0]
                model.get_parameter(f"{layer}.weight").add_(8 * b @ a)
    return model


def own(state: dict, prefix: str) -> list[torch.Tensor]:
    return [state[f"{prefix}.{number}"] for number in range(sum(name.startswith(f"{prefix}.") for name in state))]


@pytest.mark.parametrize("stem, stages", [("1_word2", 1), ("2_bars2", 2), ("3_facts_too", 3)])
def test_a_merged_export_of_renewed_adapters_holds_all_of_them(streams, mixed_prompts, tmp_path, stem, stages):
    """In the middle of the stream and at its end: the logits of the base with every adapter so far, which each matter;
    the folder of the command and the one that the run wrote are the same."""
    run = streams["renewed"]
    state = torch.load(run / f"{stem}.ckpt", weights_only=True)["state_dict"]
    prefixes = [*(f"earlier.{stage}" for stage in range(stages - 1)), "model"]
    folder = export(run, task=stem, merge=True, output=tmp_path / "merged")
    given = logits(plain(folder).double(), mixed_prompts)
    torch.testing.assert_close(given, logits(base_with(state, prefixes).double(), mixed_prompts), atol=1e-5, rtol=0)
    for left_out in prefixes:
        fewer = base_with(state, [prefix for prefix in prefixes if prefix != left_out])
        assert (logits(fewer.double(), mixed_prompts) - given).abs().max() > 1e-2
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == (run / "exports" / f"{stem}_merged" / "model.safetensors").read_bytes()
    assert "all of them are in these weights" in (folder / "README.md").read_text()


def test_a_merged_export_of_renewed_adapters_scores_what_the_matrix_says(streams, tmp_path):
    run = streams["renewed"]
    folder = f"--model.init_args.backbone.path={run / 'exports' / '2_bars2_merged'}"
    tuning = "--model.init_args.backbone={tuning: full, lora: {along_stream: shared}}"
    assert scores_of_test(run, tmp_path / "scores", tuning, folder)["scores"] == rows(run)[2]
    said = [line["completion"] for line in lines(run / "samples.jsonl") if line["stage"] == 2]
    assert [line["completion"] for line in lines(tmp_path / "scores" / "test.jsonl")] == said


def test_a_renewed_adapter_alone_is_not_passed_off_as_the_model(streams, tmp_path, capsys):
    """But the first is all that there is."""
    with pytest.raises(SystemExit):
        main(["export", str(streams["renewed"]), "--task", "bars2", "--output", str(tmp_path / "second")])
    assert "2_bars2.ckpt: adapters were merged into the weights" in (said := capsys.readouterr().err)
    assert "--merge exports it" in said
    assert f"  cpt export {streams['renewed']} --merge" in what_next(streams["renewed"])
    assert f"  cpt export {streams['per_task']}" in what_next(streams["per_task"])
    export(streams["renewed"], task="word2", output=tmp_path / "first")
    refused = SFT(backbone=Backbone(tuning="lora", lora=Lora(along_stream="renewed")))
    with pytest.raises(ValueError, match="along_stream=renewed .* set export.merge to true"):
        TaskExport().setup(None, refused, "fit")


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_of_adapters_per_task_is_the_tasks_own(streams, mixed_prompts, tmp_path, merge):
    run = streams["per_task"]
    state = torch.load(run / "2_bars2.ckpt", weights_only=True)["state_dict"]
    folder = export(run, task="bars2", merge=merge, output=tmp_path / "export")
    model = plain(folder) if merge else PeftModel.from_pretrained(plain(folder / "base"), folder)
    given = logits(model.double(), mixed_prompts)
    torch.testing.assert_close(given, logits(base_with(state, ["model"]).double(), mixed_prompts), atol=1e-5, rtol=0)
    assert (given - logits(base_with(state, ["earlier.0"]).double(), mixed_prompts)).abs().max() > 1e-2
    assert "This is the last one alone" in (folder / "README.md").read_text()
    if not merge:
        name = "adapter_model.safetensors"
        assert (folder / name).read_bytes() == (run / "exports" / "2_bars2" / name).read_bytes()


def test_the_reference_is_no_part_of_the_model():
    weights = {"model.a": torch.zeros(1), "reference.copy.a": torch.ones(1), "earlier.0.0": torch.ones(1)}
    assert weights_of_model(weights) == {"a": torch.zeros(1)}


def test_an_upload_is_of_the_whole_folder_to_a_private_repository(runs, monkeypatch):
    """The hub is replaced by a stand-in that keeps what it is asked for."""
    asked = {}

    class Repository:
        repo_id = "me/model"

    def create_repo(api, repo_id, **options):
        asked["create"] = (repo_id, options)
        return Repository()

    def upload_folder(api, **options):
        asked["upload"] = options
        return "https://hub/me/model"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    folder = runs["lora"] / "exports" / "1_word2"
    assert push(folder, "model") == "https://hub/me/model"
    assert asked["create"] == ("model", {"private": True, "exist_ok": True})
    assert (asked["upload"]["repo_id"], asked["upload"]["folder_path"]) == ("me/model", folder)

    def refuse(api, **options):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", refuse)
    with pytest.raises(ConnectionError, match=r"no route\n.* is complete; .* hf upload me/model"):
        push(folder, "me/model")


def test_shards_are_exported_as_the_file_is(runs, tmp_path):
    """The optimizer's stay on the disk."""
    for name, weights in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        run = tmp_path / name
        run.mkdir()
        shutil.copy(runs[name] / "config.yaml", run)
        save_shards(read_checkpoint(runs[name] / "last.ckpt"), run / "last.ckpt")
        exported = [
            export(source, output=tmp_path / f"{name}_{number}") for number, source in enumerate((runs[name], run))
        ]
        one, other = ((folder / weights).read_bytes() for folder in exported)
        assert one == other


def test_names_of_tasks_are_text_in_the_card():
    row = {"a|b_": {"accuracy": 0.5, "num_samples": 4}}
    card = model_card(
        "x", "full", Backbone(), "float32", ["a|b_"], matrix=AccuracyMatrix(["a|b_"], [], [["a|b_"]], row, [row])
    )
    assert r"| a\|b\_ | 50.0 | 50.0 | 4 |" in card and r"in this order: a\|b\_." in card


def test_the_card_of_a_qlora_adapter_loads_its_base_in_four_bits(mixed_prompts, tmp_path):
    """As it was scored: over the base as it is the same adapter gives other logits, by a half."""
    backbone = Backbone(tuning="qlora", quantization=Quantization(compute_dtype="float32"))
    model = backbone.load_model()
    card = model_card("a", "adapter", backbone, "float32", ["word2"])
    save_folder(model, backbone.load_processor(), tmp_path / "a", "tiny", card)
    names = {"FOLDER": str(tmp_path / "a")}
    exec(card.split("```python\n")[1].split("```")[0], names)
    settle_quantized(names["model"])  # some CPUs would multiply otherwise
    expected = logits(model, mixed_prompts)
    torch.testing.assert_close(logits(names["model"], mixed_prompts), expected, atol=1e-4, rtol=0)
    whole = PeftModel.from_pretrained(plain(tmp_path / "a" / "base"), tmp_path / "a")
    assert (logits(whole, mixed_prompts) - expected).abs().max() > 0.5
    merged = model_card("a", "merged", backbone, "float32", ["word2"])
    assert (
        "in four bits (nf4), and is merged into the base as it is: answers differ from those that were scored" in merged
    )
