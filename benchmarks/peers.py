"""TRL's trainers in their fastest setting: one batch per optimizer step, nothing shown, logged or saved."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from measure import StepMeter
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from workload import CLIP_HIGH, CLIP_LOW, MAX_GRAD_NORM, Setup, Workload, make_optimizer, reward

from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.types import Example


class MeteredGRPOTrainer(GRPOTrainer):
    """GRPO with a meter."""

    def _generate_and_score_completions(self, inputs):
        scored = super()._generate_and_score_completions(inputs)
        self.workload.check_lengths(scored["completion_mask"].sum(dim=1).tolist())
        self.meter.end("rollout")
        return scored


class MeteredSFTTrainer(SFTTrainer):
    """SFT with a meter, which also keeps the loss of the first step."""

    first_loss: float | None = None

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.first_loss is None:
            self.first_loss = (loss[0] if isinstance(loss, tuple) else loss).item()
        return loss


class EndOfUpdate(TrainerCallback):
    """Tells the meter that the optimizer has made its step."""

    def __init__(self, meter: StepMeter) -> None:
        self.meter = meter

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.meter.end("update")


def grpo(workload: Workload) -> dict[str, float]:
    """Measures GRPO steps."""
    model, processor = load(workload)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            **common_options(workload, folder),
            per_device_train_batch_size=workload.micro_size,
            gradient_accumulation_steps=workload.prompts * workload.group_size // workload.micro_size,
            num_generations=workload.group_size,
            max_completion_length=workload.new_tokens,
            generation_kwargs={"suppress_tokens": processor.banned_token_ids},
            shuffle_dataset=False,
            beta=0.0,
            loss_type="bnpo",  # the mean over the tokens of the batch
            epsilon=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
        )
        trainer = MeteredGRPOTrainer(
            model,
            text_reward,
            args=config,
            train_dataset=picture_rows(workload, processor),
            processing_class=processor,
            optimizers=(make_optimizer(model.parameters()), None),
        )
        trainer.workload = workload
        return train(trainer, workload)


def sft(setup: Setup, rows: Sequence[Example], **options: Any) -> dict[str, float]:
    """Measures SFT steps on a batch of all rows; ``options`` are TRL's own."""
    model, processor = load(setup)
    dataset = Dataset.from_list([tokenized(row, processor) for row in rows] * setup.num_steps)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            **common_options(setup, folder),
            per_device_train_batch_size=len(rows),
            train_sampling_strategy="sequential",
            max_length=None,
            **options,
        )
        trainer = MeteredSFTTrainer(
            model,
            args=config,
            train_dataset=dataset,
            processing_class=processor.tokenizer,
            optimizers=(make_optimizer(model.parameters()), None),
        )
        return {**train(trainer, setup), "first_loss": trainer.first_loss}


def load(setup: Setup) -> tuple[QwenVL, PromptProcessor]:
    """Model and processor; gradient checkpointing is switched on by TRL itself."""
    backbone = replace(setup.backbone, gradient_checkpointing=[])
    return backbone.load_model(), backbone.load_processor()


def common_options(setup: Setup, folder: str) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": folder,
        "max_steps": setup.num_steps,
        "max_grad_norm": MAX_GRAD_NORM,
        "gradient_checkpointing": setup.gradient_checkpointing,
        "bf16": False,  # no autocast: the weights have the precision that was asked for
        "use_cpu": setup.device == "cpu",
        "dataloader_pin_memory": setup.device == "cuda",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train(trainer: GRPOTrainer | SFTTrainer, setup: Setup) -> dict[str, float]:
    """Trains, and gives what the meter found."""
    trainer.remove_callback(PrinterCallback)
    trainer.meter = StepMeter(setup.device, setup.warm_up)
    trainer.add_callback(EndOfUpdate(trainer.meter))
    trainer.train()
    return trainer.meter.results()


def picture_rows(workload: Workload, processor: PromptProcessor) -> Dataset:
    """The workload's prompts for every step; pictures stay in memory, for TRL would decode one per completion."""
    examples = workload.examples(processor)

    def rows(batch: dict[str, list[int]]) -> dict[str, list]:
        chosen = [examples[number] for number in batch["row"]]
        texts = [example.messages[0]["content"][1]["text"] for example in chosen]
        return {
            "prompt": [[{"role": "user", "content": text}] for text in texts],
            "image": [example.images[0] for example in chosen],
        }

    return Dataset.from_dict({"row": [*range(len(examples))] * workload.num_steps}).with_transform(rows)


def tokenized(row: Example, processor: PromptProcessor) -> dict[str, list[int]]:
    """A row as TRL prepares it, of our tokens: without the newline that a chat template puts behind an answer."""
    prompt = processor.encode([row.messages]).input_ids[0].tolist()
    target = processor.encode_targets([row.target or ""]).ids[0].tolist()
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}


def text_reward(completions: list[list[dict]], **_: Any) -> list[float]:
    """The reward of every arm."""
    return [reward(completion[0]["content"], "")["total"] for completion in completions]
