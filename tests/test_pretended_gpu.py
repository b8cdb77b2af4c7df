"""What runs on the CPU runs on a GPU: nothing is on the wrong device, and the host seldom waits."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from cpt_lightning.cli import main
from cpt_lightning.models import Backbone, Lora
from cpt_lightning.models.qwen_vl import encode_images
from cpt_lightning.modules import RFT, SFT, MultiTask, OnPolicySFT
from cpt_lightning.records import RunFolder
from cpt_lightning.rollouts import Sampling, completion_logprobs, sample_groups
from tests.naive import random_completions
from tests.pretend_gpu import pretended_gpu
from tests.training import fit, largest_difference, sgd, weights, with_examples

GROUPS = {"optimizer": sgd, "group_size": 4, "sampling": Sampling(max_new_tokens=5)}
DEVICES = {"cpu": {"accelerator": "cpu"}, "gpu": {"accelerator": "auto", "strategy": "pretended_gpu"}}
EVERYTHING = ["language_model", "projector", "vision_tower"]
MODULES = {
    "sft": (partial(SFT, optimizer=sgd), {"gradient_checkpointing": ["vision_tower", "language_model"]}),
    "sft dora kl": (
        partial(SFT, optimizer=sgd, kl_coef=0.1), {"tuning": "lora", "lora": Lora(parts=EVERYTHING, use_dora=True)}
    ),
    "grpo": (partial(RFT, **GROUPS), {}),
    "grpo kl updates": (
        partial(RFT, **GROUPS, kl_coef=0.1, updates_per_rollout=2, passes_per_rollout=2),
        {"freeze": ["vision_tower"], "gradient_checkpointing": ["language_model"]},
    ),
    "gspo remax": (partial(RFT, **GROUPS, advantage="remax", policy_loss="gspo", micro_batch_prompts=1), {}),
    "dapo full kl": (
        partial(RFT, **GROUPS, informative_prompts=2, rollout_batch_prompts=2, overlong_margin=2,
            learn_truncated=False, kl_coef=0.1, kl_estimator="full"),
        {"tuning": "lora"},
    ),
    "multitask": (partial(MultiTask, **GROUPS, objectives={"odd": "rft"}), {}),
    "on-policy sft": (partial(OnPolicySFT, **GROUPS), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_a_step_and_an_evaluation_on_a_gpu_are_those_of_the_cpu(small_folder, processor, mixed_prompts, name):
    """Nothing meets a tensor or generator of the other device, and weights and accuracies come out the same."""
    batch = with_examples(mixed_prompts, processor)
    batch.prompts.examples[1].task = "odd"
    make, backbone = MODULES[name]
    found = []
    for device, options in DEVICES.items():
        torch.manual_seed(0)
        module = make(backbone=Backbone(small_folder, **backbone), evaluation=Sampling(5, temperature=0.8, top_p=0.9))
        with pretended_gpu() if device == "gpu" else nullcontext():
            fit(module, [batch], limit_val_batches=1, **options)
        found.append(weights(module))
    assert largest_difference(*found) < 1e-6


def test_a_tensor_of_the_cpu_and_a_generator_of_the_cpu_are_refused(small_model, processor, mixed_prompts):
    """The pretended GPU would see it."""
    with pretended_gpu():
        model, prompts = small_model.to("cuda"), mixed_prompts.to("cuda")
        with pytest.raises(RuntimeError, match="expected all tensors to be on cuda:0"):
            sample_groups(model, processor, mixed_prompts, 2, Sampling(4))
        with pytest.raises(RuntimeError, match="expected a 'cuda' generator"):
            sample_groups(model, processor, prompts, 2, Sampling(4), torch.Generator())
        with pytest.raises(TypeError, match="to numpy"):
            prompts.input_ids.numpy()


@pytest.mark.parametrize("sampling", [Sampling(20), Sampling(20, top_p=0.9), Sampling(20, top_k=7)])
def test_sampling_is_deterministic_on_a_gpu(small_model, processor, mixed_prompts, sampling):
    """As ``Trainer(deterministic=True)`` asks for, which refuses sums along a row of floating-point numbers."""
    torch.use_deterministic_algorithms(True)
    try:
        with pretended_gpu():
            model, prompts = small_model.to("cuda"), mixed_prompts.to("cuda")
            model.tie_weights()
            with pytest.raises(RuntimeError, match="deterministic"):
                torch.ones(3, device="cuda").cumsum(0)
            assert len(sample_groups(model, processor, prompts, 2, sampling)) == 8
    finally:
        torch.use_deterministic_algorithms(False)


def test_while_decoding_the_host_waits_once_a_token(small_model, processor, mixed_prompts):
    """To see who has ended; the number of layers does not matter."""
    waited = []
    for length in (4, 9):
        with pretended_gpu() as waits:
            model, prompts = small_model.to("cuda"), mixed_prompts.to("cuda")
            model.tie_weights()
            completions = sample_groups(model, processor, prompts, 4, Sampling(length, temperature=0.1), None)
            assert completions.ids.shape[1] == length
            waited.append(sum(waits.values()))
    assert waited[1] - waited[0] == 5


def test_the_host_never_waits_for_the_vision_tower_and_seldom_for_a_pass(small_model, mixed_prompts):
    """However many images there are; features are those of the tower alone, which asks sizes as it goes."""
    targets = random_completions(4, 5, 256, torch.Generator().manual_seed(0))
    expected = small_model.model.get_image_features(mixed_prompts.pixel_values, mixed_prompts.image_grid_thw)
    waited = []
    for rows in ([0, 1, 2, 3], [0, 1]):
        with pretended_gpu() as waits:
            model, prompts = small_model.to("cuda"), mixed_prompts.select(rows).to("cuda")
            model.tie_weights()
            features = encode_images(model, prompts)
            assert not waits.total(), waits
            completion_logprobs(model, prompts, targets.select(rows).to("cuda")).sum().backward()
            waited.append(waits.total())
            features = features.detach().cpu()
        part = torch.cat(expected.pooler_output)[: len(features)]
        torch.testing.assert_close(features, part, atol=1e-5, rtol=1e-5)
    assert waited[0] == waited[1] <= 8


STREAM = """
model:
  class_path: cpt_lightning.modules.RFT
  init_args:
    backbone: {path: BACKBONE, tuning: TUNING, lora: {along_stream: ALONG}}
    group_size: 2
    kl_coef: 0.01
    forced_prefix: <think>
    sampling: {max_new_tokens: 4}
    evaluation: {max_new_tokens: 4, temperature: 0}
data:
  tasks:
    word2: &toy
      source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: word2}}
      reward: {format: think_answer}
      num_train: 4
      num_test: 2
    bars: {<<: *toy, source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: bars}}}
  probes:
    facts:
      <<: *toy
      source: {class_path: cpt_lightning.tasks.ToyWorld, init_args: {family: existence}}
      reward: {kind: yes_no, format: think_answer}
  prompts_per_step: 2
  steps: 1
filter: {mode: solvable, completions_per_row: 2, lowest: 0}
trainer:
  enable_progress_bar: false
  callbacks: [CALLBACKS]
"""
MEASURED = """
    {class_path: cpt_lightning.callbacks.Drift, init_args: {num_rows: 1, max_new_tokens: 3}},
    {class_path: cpt_lightning.callbacks.Influence, init_args: {num_rows: 1, max_new_tokens: 3, every_n_steps: 1}},
    {class_path: cpt_lightning.callbacks.GradientRisk, init_args: {num_rows: 1, max_new_tokens: 3}},
    {class_path: cpt_lightning.callbacks.WeightChange},
    {class_path: cpt_lightning.callbacks.WeightDistance, init_args: {num_rows: 1, max_new_tokens: 3}},
    {class_path: cpt_lightning.callbacks.EWC, init_args: {strength: 1.0, num_rows: 2, max_new_tokens: 3}}
"""
RUNS = {"full": ("full", "shared", MEASURED), "per_task": ("lora", "per_task", ""), "renewed": ("lora", "renewed", "")}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore:.*holds tests.pretend_gpu.OnGPU")  # in the place of tensors
def test_a_stream_with_its_callbacks_runs_on_a_gpu_and_leaves_what_the_cpu_leaves(small_folder, tmp_path, name):
    """Filter, task switches, measurements, a penalty, checkpoints, and the matrix in the end."""
    (tuning, along, callbacks), stream = RUNS[name], STREAM
    for place, value in {"BACKBONE": small_folder, "TUNING": tuning, "ALONG": along, "CALLBACKS": callbacks}.items():
        stream = stream.replace(place, value)
    (tmp_path / "stream.yaml").write_text(stream)
    for device, options in DEVICES.items():
        command = ["fit", "-c", str(tmp_path / "stream.yaml"), "--run_dir", str(tmp_path / device)]
        with pretended_gpu() if device == "gpu" else nullcontext():
            main([*command, *(f"--trainer.{name}={value}" for name, value in options.items())])
    one, other = (RunFolder(tmp_path / device).matrix for device in DEVICES)
    assert one is not None and other == one
