"""``cpt plan`` against what real steps take, and what its options change."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from cpt_lightning.callbacks import EWC, L2, Drift, GradientRisk, Influence, ModelMerging, WeightChange, WeightDistance
from cpt_lightning.callbacks.analysis import base_model
from cpt_lightning.cli import main
from cpt_lightning.cli.plan.command import PlanCLI
from cpt_lightning.cli.plan.devices import Devices, gpu_bytes
from cpt_lightning.cli.plan.memory import make_plan
from cpt_lightning.cli.plan.phases import Plan, Workload
from cpt_lightning.cli.plan.weights import weightless_model
from cpt_lightning.cli.plan.worst_batch import full_completions, longest_prompts
from cpt_lightning.cli.rehearse.command import RehearseCLI
from cpt_lightning.data import TaskStream
from cpt_lightning.models import Backbone
from cpt_lightning.models.memory import LiveBytes
from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.modules import RFT, SFT, OnPolicySFT, PostTraining
from cpt_lightning.rollouts import Sampling, Selection
from cpt_lightning.tasks import Task, ToyWorld
from cpt_lightning.types import Batch
from tests.fakes import make_trainer
from tests.training import fit, with_examples

PARTS = ["vision_tower", "language_model"]
WORKLOAD = Workload(prompt_tokens=75, target_tokens=16, prompts_per_step=4, eval_prompts_per_step=4)
CPU = Devices(foreach=False)


class Endless(PromptProcessor):
    """Under which no completion ends before its last token."""

    @property
    def stop_token_ids(self) -> list[int]:
        """None."""
        return []


def measured_peak(module: PostTraining) -> int:
    """Most bytes that live in two steps of a real Trainer on the plan's worst batch, without its weights and pixels."""
    module.__dict__["processor"] = Endless.load("tiny")
    module.configure_model()
    prompts = longest_prompts(module.model, 4, WORKLOAD.prompt_tokens, None)
    prompts.pixel_values = torch.rand(prompts.pixel_values.shape)
    batch = with_examples(prompts, module.processor)
    batch = Batch(batch.prompts, full_completions(module.model, 4, WORKLOAD.target_tokens))
    with LiveBytes() as live:
        fit(module, [batch, batch])
    return live.peak


def planned_peak(module: PostTraining) -> int:
    """The same by the plan."""
    phases = [phase for phase in make_plan(module, WORKLOAD, CPU).phases if phase.name != "evaluation"]
    return max(phase.total - phase.kinds["weights"] - phase.kinds.get("batch", 0) for phase in phases)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("parts", [[], PARTS], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("objective", ["sft", "rft", "rft_in_parts"])
def test_a_plan_is_what_a_real_step_takes(objective, parts, tuning):
    backbone = Backbone(tuning=tuning, gradient_checkpointing=parts)
    in_parts = {"updates_per_rollout": 2, "micro_batch_prompts": 1, "rollout_batch_prompts": 2, "kl_coef": 0.01}
    options = in_parts if objective == "rft_in_parts" else {}
    sampling = Sampling(max_new_tokens=16)
    module = (
        SFT(backbone=backbone)
        if objective == "sft"
        else RFT(group_size=4, sampling=sampling, backbone=backbone, **options)
    )
    assert planned_peak(module) == pytest.approx(measured_peak(module), rel=0.15)


def test_on_policy_sft_is_planned_as_it_is_measured():
    """Every completion is kept, which is the most there can be."""
    everything = Selection(correct_only=False, finished_only=False, distinct=False)
    module = OnPolicySFT(selection=everything, group_size=4, sampling=Sampling(max_new_tokens=16))
    assert planned_peak(module) == pytest.approx(measured_peak(module), rel=0.15)


@pytest.mark.parametrize("objective", ["sft", "rft"])
def test_a_divergence_over_the_whole_vocabulary_is_planned(objective):
    module = SFT(kl_coef=0.1) if objective == "sft" else RFT(
        group_size=4, sampling=Sampling(max_new_tokens=16), kl_coef=0.1, kl_estimator="full"
    )  # fmt: skip
    assert planned_peak(module) == pytest.approx(measured_peak(module), rel=0.15)


def kinds(module: PostTraining, devices: Devices = CPU, phase: str = "update", **sizes: int) -> dict[str, int]:
    plan: Plan = make_plan(module, replace(WORKLOAD, **sizes), devices)
    return next(each.kinds for each in plan.phases if each.name == phase)


NUM_WEIGHTS = 3_035_008
"""Of the embedded base."""


def test_standing_memory_is_arithmetic():
    """AdamW keeps two numbers beside each weight of 4 bytes, momentum one, plain SGD none; a reference is a copy."""
    found = kinds(RFT(group_size=4, kl_coef=0.1))
    assert (found["weights"], found["gradients"], found["reference"]) == (4 * NUM_WEIGHTS,) * 3
    assert found["optimizer"] == 8 * NUM_WEIGHTS
    assert kinds(SFT(optimizer=lambda p: torch.optim.SGD(p, lr=1, momentum=0.9)))["optimizer"] == 4 * NUM_WEIGHTS
    assert "optimizer" not in kinds(SFT(optimizer=lambda p: torch.optim.SGD(p, lr=1)))


def test_shards_are_shares_and_whole_weights_are_gathered():
    """Each of two devices keeps half of weights and optimizer; all weights are gathered, in bfloat16 half as large."""
    found = kinds(SFT(), Devices("fsdp2", world_size=2, precision="bf16-mixed", foreach=False))
    assert found["weights"] == 2 * NUM_WEIGHTS and found["optimizer"] == 4 * NUM_WEIGHTS
    assert found["gathered weights"] == 2 * NUM_WEIGHTS
    offloaded = kinds(SFT(), Devices("fsdp2_offload", world_size=2, foreach=False))
    assert "weights" not in offloaded and "optimizer" not in offloaded


def test_gradients_of_decoder_layers_are_exchanged_as_they_come():
    """What waits is vision and embeddings; unless the update goes back through the rollout's pass."""
    devices = Devices("fsdp2", world_size=2, foreach=False)
    weights = weightless_model(Backbone(), devices).named_parameters()
    layers = sum(weight.numel() for name, weight in weights if ".layers." in name)
    assert kinds(SFT(), devices)["gradients"] == 4 * (NUM_WEIGHTS - layers) + 2 * layers
    assert kinds(RFT(group_size=4, micro_batch_prompts=1), devices)["gradients"] < 4 * NUM_WEIGHTS
    phases = {phase.name: phase.kinds for phase in make_plan(RFT(group_size=4, kl_coef=0.1), WORKLOAD, devices).phases}
    assert phases["update"]["gradients"] == 4 * NUM_WEIGHTS
    assert phases["optimizer step"]["gradients"] == 2 * NUM_WEIGHTS
    gathered = {name: phase.get("gathered weights", 0) / NUM_WEIGHTS for name, phase in phases.items()}
    assert gathered == {"rollout": 4, "reference": 8, "update": 4, "optimizer step": 0, "evaluation": 4}


def test_sft_held_to_a_reference_has_one():
    assert kinds(SFT(kl_coef=0.1))["reference"] == 4 * NUM_WEIGHTS


def test_ddp_has_buckets_and_mixed_precision_smaller_activations():
    found, mixed = (kinds(SFT(), Devices("auto", 2, precision, False)) for precision in ("32-true", "bf16-mixed"))
    assert found["gradient buckets"] == 4 * NUM_WEIGHTS
    name = "activations and log probs"
    assert 0.4 * found[name] < mixed[name] < 0.9 * found[name]


def test_mixed_precision_is_planned_as_it_is_measured():
    """On the CPU real autocast casts what the plan's own does."""
    module = SFT()
    devices = replace(CPU, precision="bf16-mixed")
    planned = make_plan(module, WORKLOAD, devices).phases[0]
    module.configure_model()
    prompts = longest_prompts(module.model, 4, WORKLOAD.prompt_tokens, None)
    prompts.pixel_values = torch.rand(prompts.pixel_values.shape)
    batch = Batch(prompts, full_completions(module.model, 4, WORKLOAD.target_tokens))
    with LiveBytes() as live:
        fit(module, [batch, batch], precision="bf16-mixed")
    ours = planned.total - planned.kinds["weights"] - planned.kinds["batch"]
    assert ours == pytest.approx(live.peak, rel=0.15)


def test_what_the_options_limit_gets_smaller():
    whole = kinds(RFT(group_size=4), phase="rollout")["KV cache"]
    assert kinds(RFT(group_size=4, rollout_batch_prompts=1), phase="rollout")["KV cache"] < whole / 2
    assert kinds(RFT(group_size=8), phase="rollout")["KV cache"] > whole
    name = "activations and log probs"
    assert kinds(RFT(group_size=4, micro_batch_prompts=1))[name] < kinds(RFT(group_size=4, micro_batch_prompts=2))[name]


def test_what_replies_are_made_to_begin_with_makes_prompts_longer():
    """A prompt of the plan has so many tokens more: keys and values of each are kept once a group."""
    forced = Sampling(max_new_tokens=64, prefix="<answer>" * 30)
    module = RFT(group_size=4, sampling=forced, evaluation=forced)
    num_tokens = len(module.processor.encode_prefix(forced.prefix))
    longer = replace(WORKLOAD, prompt_tokens=WORKLOAD.prompt_tokens + num_tokens)
    plain = RFT(group_size=4, sampling=Sampling(64), evaluation=Sampling(64))
    for ours, theirs in zip(make_plan(module, WORKLOAD, CPU).phases, make_plan(plain, longer, CPU).phases, strict=True):
        assert (ours.name, ours.kinds) == (theirs.name, theirs.kinds)


def test_the_verb_prints_a_plan_and_a_verdict(capsys):
    args = ["plan", "-c", "configs/demo/grpo.yaml", "--plan.prompt_tokens", "75"]
    main([*args, "--plan.gpu", "H100"])
    assert "fits" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        main([*args, "--plan.gpu", "0.1GB"])
    out = capsys.readouterr().out
    assert "WILL NOT FIT" in out and "micro_batch_prompts" in out
    with pytest.raises(SystemExit, match="2"):
        main(args[:3])
    assert "--plan.prompt_tokens" in capsys.readouterr().err


def test_the_line_of_tokens_counts_what_replies_are_made_to_begin_with(capsys):
    """Once a prompt, as keys and values of it are kept: 16 prompts of 75 + prefix + 8 x 16 tokens, or without it."""
    forced = "<think></think><answer>"
    num_tokens = len(PromptProcessor.load("tiny").encode_prefix(forced))
    args = ["plan", "-c", "configs/demo/grpo.yaml", "--plan.prompt_tokens=75", "--model.sampling.max_new_tokens=16"]
    for options, said, length in (
        ([f"--model.sampling.prefix={forced}"], f"75 + {num_tokens} of sampling.prefix", 75 + num_tokens),
        ([], "75", 75),
    ):
        main([*args, *options])
        total = f"{16 * (length + 8 * 16):,}"
        assert f"up to {said} + 8 x 16 tokens a prompt, {total} on a device" in capsys.readouterr().out


def test_a_gpu_is_a_size_or_a_name():
    assert gpu_bytes("a100-40") == gpu_bytes("40GB") == gpu_bytes("40") == 40 * 10**9
    with pytest.raises(ValueError, match=r"plan.gpu='big'"):
        gpu_bytes("big")


# -- beside steps and evaluations --------------------------------------------------------------------------------------

KEEPERS = {
    "EWC": lambda: EWC(num_rows=2, max_new_tokens=4),
    "EWC of targets": lambda: EWC(num_rows=2, completions="targets"),
    "L2": L2,
    "merging": ModelMerging,
    "merging from the base": lambda: ModelMerging(start="base"),
    "risk": lambda: GradientRisk(num_rows=2, max_new_tokens=4),
    "risk to tasks": lambda: GradientRisk(num_rows=2, max_new_tokens=4, with_probes=False),
    "change": WeightChange,
    "distance": lambda: WeightDistance(num_rows=2, max_new_tokens=4),
    "distance alone": lambda: WeightDistance(num_rows=0),
}


@pytest.mark.parametrize("make", KEEPERS.values(), ids=KEEPERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_callback_keeps_in_the_end_is_what_it_says(make, dtype, small_folder, tmp_path):
    """After two tasks, with a probe; F is in float32 whatever the weights are."""
    callback = make()
    stream = TaskStream(
        tasks={name: Task(ToyWorld(name), num_train=4, num_test=2) for name in ("bars2", "facts")},
        probes={"colour": Task(ToyWorld("colour"), num_test=2)},
        prompts_per_step=2,
        steps=1,
    )
    module = SFT(backbone=Backbone(small_folder, dtype=dtype), evaluation=Sampling(2))
    trainer = make_trainer(tmp_path, stream, callbacks=[callback])
    trainer.validate(module, stream, verbose=False)
    trainer.fit(module, stream)
    own = getattr(torch, dtype)
    kept = [{tensor.dtype for tensor in weights.values()} for weights in callback.kept.values()]
    assert sorted(map(str, kept)) == sorted(str({dtype or own}) for dtype in callback.sets)


FEW = ["--trainer.callbacks.num_rows=2"]
MANY = ["--trainer.callbacks.num_rows=24", "--trainer.callbacks.max_new_tokens=12"]
BESIDE = {
    "EWC": ["--trainer.callbacks+=EWC", *FEW],
    "EWC, targets": ["--trainer.callbacks+=EWC", *FEW, "--trainer.callbacks.completions=targets"],
    "GradientRisk": ["--trainer.callbacks+=GradientRisk", *FEW],
    "update, WeightDistance": ["--trainer.callbacks+=WeightDistance", *FEW],
    "Drift": ["--trainer.callbacks+=Drift", *MANY],
    "Influence": ["--trainer.callbacks+=Influence", *MANY, "--trainer.callbacks.every_n_steps=1"],
    "filter": ["--filter.mode=solvable", "--filter.completions_per_row=64", "--data.eval_prompts_per_step=8"],
}  # fmt: skip
"""Options, by the phase that takes most."""


@pytest.mark.parametrize("name", BESIDE)
def test_what_callbacks_and_filter_take_is_planned_as_it_is_rehearsed(name, monkeypatch):
    """Where they take more than steps of one short completion a prompt; the peak of all live bytes of a rehearsal.

    Without images, which callbacks have in main memory too, and that is the device here; with the probes of the demo.
    """
    # Weights are on the meta device for a moment while they are read, which LiveBytes takes for a plan.
    monkeypatch.setattr(base_model, "_load", lambda _, module: deepcopy(module.model).requires_grad_(False))
    args = [
        "-c=configs/demo/grpo.yaml", "--data.stages=[word2, bars2]", "--data.prompts_per_step=1",
        "--data.eval_prompts_per_step=1", "--model.group_size=2", "--model.sampling.max_new_tokens=4",
        "--model.evaluation.max_new_tokens=4", "--model.backbone.freeze=[vision_tower, projector]", *BESIDE[name],
    ]  # fmt: skip
    sizes = ["prompt_tokens=150", "target_tokens=64", "images=0"]
    cli = PlanCLI([*args, *(f"--plan.{each}" for each in sizes)])
    plan = make_plan(cli.model, cli.workload(cli.config_init.plan), CPU, *cli.beside)
    assert plan.peak.name == name.split(",")[0]
    rehearsal = RehearseCLI([*args, *(f"--rehearse.{each}" for each in sizes)])
    rehearsal.model.configure_model()
    with LiveBytes() as live:
        rehearsal.rehearse()
    assert plan.peak.total - plan.peak.kinds["weights"] == pytest.approx(live.peak, rel=0.15)


def test_what_callbacks_keep_is_in_shards_and_with_adapters_small():
    """EWC keeps an anchor and F; Drift a frozen base, unless adapters can be switched off."""
    callbacks = [EWC(num_rows=2), Drift(), Drift(num_rows=2)]  # whose base is one
    devices = Devices("fsdp2", world_size=2, foreach=False)
    kinds = {phase.name: phase.kinds for phase in make_plan(SFT(), WORKLOAD, devices, callbacks).phases}
    assert {name: found["callbacks"] for name, found in kinds.items()} == dict.fromkeys(kinds, 6 * NUM_WEIGHTS)
    assert kinds["Drift"]["gathered weights"] == 2 * kinds["EWC"]["gathered weights"] == 8 * NUM_WEIGHTS
    assert kinds["EWC"]["new estimate"] == 2 * NUM_WEIGHTS
    assert kinds["EWC"]["gradients"] == kinds["update"]["gradients"]
    adapters = make_plan(SFT(backbone=Backbone(tuning="lora")), WORKLOAD, devices, callbacks)
    drift = next(phase.kinds for phase in adapters.phases if phase.name == "Drift")
    assert drift["callbacks"] == (4 + 4) * adapters.num_trainable // 2
    assert drift["gathered weights"] == adapters.phases[0].kinds["gathered weights"]


def test_what_is_not_planned_is_refused_with_what_knows_it():
    with pytest.raises(ValueError, match="Influence: what exact=true takes.*cpt rehearse"):
        make_plan(SFT(), WORKLOAD, CPU, [Influence(exact=True)])
