"""Evaluation counts every row once, and schedules last as long as a task."""

from __future__ import annotations

import itertools
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from cpt_lightning.models import Backbone
from cpt_lightning.modules import RFT, SFT, TaskSchedule
from cpt_lightning.rewards import Reward, score
from cpt_lightning.rollouts import Sampling
from tests.training import fit, with_examples

ANSWERS = Sampling(max_new_tokens=5, temperature=0)


def verdict(completion: str, gold: str | list[str]) -> dict[str, float]:
    """Right for the gold answers of rows 0 and 3 of :func:`with_examples`, whatever was said."""
    right = float(gold in ("0", "3333"))
    return {"total": right / 2, "accuracy": right}


def validate(module: L.LightningModule, batches: list) -> dict[str, float]:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, inference_mode=False
    )
    trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_accuracies_are_means_over_rows_not_over_batches_and_fillers_do_not_count(
    small_folder, processor, mixed_prompts
):
    """Rows 0..3 are right, wrong, wrong, right; then rows 0 and 1 again, of which row 1 is a filler.

    Task demo: 3 right of 5 rows (the mean of the two batches' means would be .75). Task other: row 0 alone, right.
    """
    whole = with_examples(mixed_prompts, processor, verdict)
    part = with_examples(mixed_prompts.select([0, 1]), processor, verdict)
    part.prompts.valid = torch.tensor([True, False])
    other = with_examples(mixed_prompts.select([0]), processor, verdict, task="other")
    shown = validate(SFT(backbone=Backbone(small_folder), evaluation=ANSWERS), [whole, part, other])
    assert shown["val/demo/accuracy"] == pytest.approx(3 / 5)
    assert shown["val/demo/total"] == pytest.approx(3 / 10)
    assert shown["val/demo/num_samples"] == 5
    assert shown["val/other/accuracy"] == 1
    assert shown["val/other/num_samples"] == 1


def test_a_forced_prefix_is_measured_beside_the_free_answer(small_folder, processor, mixed_prompts):
    """A reward that asks for the prefix: a random model never says it by itself, and always when it is forced."""

    def reward(completion, gold):
        right = float(completion.startswith("<think>so</think><answer>"))
        return {"total": right, "accuracy": right}

    module = SFT(backbone=Backbone(small_folder), evaluation=ANSWERS, forced_prefix="<think>so</think><answer>")
    shown = validate(module, [with_examples(mixed_prompts, processor, reward)])
    assert shown["val/demo/accuracy"] == 0
    assert shown["val/demo/forced_accuracy"] == 1


@pytest.mark.parametrize("objective", [SFT, RFT])
def test_a_trainer_that_would_clip_too_is_refused_before_anything_is_loaded_or_evaluated(objective):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=1.0)
    with pytest.raises(ValueError, match="trainer.gradient_clip_val: set model.init_args.max_grad_norm instead"):
        trainer.validate(objective(backbone=Backbone("there/is/no/such")), DataLoader([]))


def test_precision_recall_f1_and_yes_ratio_are_those_of_the_whole_set_however_it_is_batched(
    small_folder, processor, mixed_prompts
):
    """Ten answers by hand, in batches of 4 + 4 + 2, of 1 and of 4 + 3 + 3, with a filler that must not count.

    References yes: 6, of which yes is said to 3 (TP), no to 2, "a dog" to 1. References no: 4, of which yes is said to
    1 (FP), no to 3. Accuracy (3 + 3)/10, precision 3/4, recall 3/6, F1 = 2 * (3/4 * 1/2) / (3/4 + 1/2) = 3/5, yes-ratio
    4/10. The mean of the first batches' precisions, 1, 1/2 and 1, would be .83.
    """
    said = ["yes", "Yes.", "no", "a dog", "Yes, it is", "yes", "no", "No.", "no", "no"]
    gold = ["yes", "yes", "yes", "yes", "yes", "no", "no", "no", "yes", "no"]
    expected = {
        "accuracy": 0.6,
        "precision": 0.75,
        "recall": 0.5,
        "f1": 0.6,
        "yes_ratio": 0.4,
        "total": 0.6,
        "num_samples": 10,
    }
    for sizes in ([4, 4, 2], [1] * 10, [4, 3, 3]):
        batches, starts = [], [sum(sizes[:index]) for index in range(len(sizes))]
        for start, size in zip(starts, sizes, strict=True):
            batch = with_examples(mixed_prompts.select(range(size)), processor, Reward("yes_no"))
            for row, example in enumerate(batch.prompts.examples, start):
                example.gold = gold[row]
            batches.append(batch)
        filler = with_examples(mixed_prompts.select([0]), processor, Reward("yes_no"))
        filler.prompts.examples[0].gold, filler.prompts.valid = "no", torch.tensor([False])
        answers = iter([*said, "yes"])

        class Scripted(SFT):
            def attempt(self, prompts, group_size, sampling, *key, answers=answers):
                texts = [next(answers) for _ in prompts.examples]
                return None, texts, score(texts, prompts.examples)

        shown = validate(Scripted(backbone=Backbone(small_folder)), [*batches, filler])
        assert shown == pytest.approx({f"val/demo/{name}": value for name, value in expected.items()})


def test_a_fresh_optimizer_holds_only_what_is_trained(small_folder):
    module = SFT(backbone=Backbone(small_folder, freeze=["vision_tower"]))
    module.configure_model()
    optimizer = module.configure_optimizers()
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in module.parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Warm-up over 4 steps: 1/5, 2/5, 3/5, 4/5, then the full rate.
        ({"warmup": 4}, [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1]),
        # A fifth of 10 steps is 2: 1/3, 2/3, then eight steps down to 1/8.
        ({"warmup": 0.2, "decay": "linear"}, [1 / 3, 2 / 3, *[1 - step / 8 for step in range(8)]]),
        ({"decay": "cosine", "floor": 0.5}, [0.75 + 0.25 * math.cos(math.pi * step / 10) for step in range(10)]),
    ],
)
def test_a_schedule_lasts_as_long_as_its_task(small_folder, processor, mixed_prompts, options, expected):
    """Ten batches, so ten steps; the rate of a step is what its update was made with."""
    rates = []

    class Watched(SFT):
        def on_before_zero_grad(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    batch = with_examples(mixed_prompts.select([1]), processor)
    fit(
        Watched(
            backbone=Backbone(small_folder),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
            lr_scheduler=lambda optimizer: TaskSchedule(optimizer, **options),
            max_grad_norm=1e-6,
        ),
        [batch] * 10,
    )
    assert rates == pytest.approx(expected, abs=1e-6)


def test_what_no_image_reached_neither_decays_nor_goes_on_by_its_moments(small_folder, processor, mixed_prompts):
    """An image, then text alone whose gradient of the tower is made the zero that the loss of several ranks leaves."""
    towers = []

    class OfSeveralRanks(SFT):
        def on_train_batch_start(self, batch, batch_idx):
            towers.append({name: weight.detach().clone() for name, weight in self.model.named_parameters()})

        def anchored(self, loss):
            return loss + sum(weight.sum() for weight in self.parameters()) * 0

    image, text = (with_examples(mixed_prompts.select([row]), processor) for row in (0, 1))
    assert [batch.prompts.images_per_prompt for batch in (image, text)] == [[1], [0]]
    module = OfSeveralRanks(
        backbone=Backbone(small_folder),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    )
    fit(module, [image, text, image, text])
    moved = [{name for name in one if not one[name].equal(two[name])} for one, two in itertools.pairwise(towers)]
    tower = {name for name in towers[0] if ".visual." in name}
    assert [names & tower for names in moved] == [tower, set(), tower]
    assert moved[1] == towers[0].keys() - tower


def test_impossible_schedules_are_refused():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match=r"warmup=1.5"):
        TaskSchedule(optimizer, warmup=1.5)
    with pytest.raises(ValueError, match=r"floor=2"):
        TaskSchedule(optimizer, floor=2)


def test_a_schedule_begins_anew_with_each_task_even_if_the_optimizer_is_kept():
    """Linear over 4 steps, twice; and a resume in the middle of the second task goes on where it was."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = TaskSchedule(optimizer, decay="linear")
    rates = []
    for _ in range(2):
        schedule.start_task(4)
        for _ in range(4):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25] * 2)
    schedule.start_task(4)
    optimizer.step()
    schedule.step()
    resumed = TaskSchedule(optimizer, decay="linear")
    resumed.load_state_dict(schedule.state_dict())
    resumed.start_task(4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.75)


def test_an_evaluation_of_fillers_alone_says_which_task_has_no_rows(small_folder, processor, mixed_prompts):
    """Every image of the task was refused; an accuracy of 0/0 would be written nowhere."""
    whole = with_examples(mixed_prompts, processor, verdict)
    none = with_examples(mixed_prompts.select([0]), processor, verdict, task="other")
    none.prompts.valid = torch.tensor([False])
    with pytest.raises(ValueError, match="task 'other': no row is left to evaluate"):
        validate(SFT(backbone=Backbone(small_folder), evaluation=ANSWERS), [whole, none])


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_other_strategies_that_split_weights_are_refused_before_anything_loads(kind):
    """Lightning makes them only for GPUs, or where deepspeed is installed: here one stands in the Trainer unmade."""
    module = SFT(backbone=Backbone("nowhere"))
    module._trainer = type("Trainer", (), {"strategy": kind.__new__(kind)})()
    with pytest.raises(ValueError, match=f"trainer.strategy={kind.__name__}: .*set trainer.strategy to fsdp2"):
        module.configure_model()


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_end_with_each_call_are_refused_before_anything_loads(name):
    """What ``fit`` learns in them is gone when ``test`` starts others, and so is the base that ``validate`` scored."""
    trainer = L.Trainer(strategy=name, devices=2, accelerator="cpu", logger=False)
    module = SFT(backbone=Backbone("nowhere"))
    module._trainer = trainer
    with pytest.raises(ValueError, match="trainer.strategy=ddp_spawn and its like .*set trainer.strategy to ddp"):
        module.configure_model()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_a_module_that_wraps_its_model_is_refused_as_it_is_loaded(small_folder):
    class Wrapped(SFT):
        def load_model(self):
            return get_peft_model(super().load_model(), LoraConfig(r=2, target_modules=["q_proj"]))

    with pytest.raises(TypeError, match="the model is a PeftModel; .* backbone.tuning=lora"):
        Wrapped(backbone=Backbone(small_folder)).configure_model()
