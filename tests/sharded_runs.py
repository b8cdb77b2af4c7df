"""The runs that ``test_sharded`` compares: ``python -m tests.sharded_runs FOLDER STRATEGY NUM_PROCESSES [RUN ...]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import distributed
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from torch.utils.data import DataLoader, Dataset

from cpt_lightning import strategy as strategies
from cpt_lightning.callbacks import RolloutWriter
from cpt_lightning.data import TaskStream
from cpt_lightning.models import Backbone, Quantization
from cpt_lightning.models.adapters import Lora
from cpt_lightning.models.sharding import all_whole
from cpt_lightning.modules import RFT, SFT, MultiTask, OnPolicySFT, group_rollouts
from cpt_lightning.rollouts import VLLM, Attempts, Sampling, Selection
from cpt_lightning.strategy import FSDP2
from cpt_lightning.tasks import Task, ToyWorld
from cpt_lightning.types import Batch
from tests.fake_engine import FakeVLLM, engines_from_a_server
from tests.training import length_reward, sgd, with_examples

ENGINE = partial(VLLM if find_spec("vllm") else FakeVLLM, tolerance=1e-3, enforce_eager=True, max_model_len=512)
"""vLLM itself where it is installed."""
RUNS = {
    "sft_full": partial(SFT, max_grad_norm=0.05),
    "sft_lora": partial(SFT, max_grad_norm=0.05),
    "rft_full": partial(
        RFT,
        group_size=4,
        sampling=Sampling(max_new_tokens=8),
        micro_batch_prompts=1,
        kl_coef=0.1,
        passes_per_rollout=2,
        clip_low=0.01,
        clip_high=0.01,
    ),
    "rft_lora": partial(
        RFT, group_size=4, sampling=Sampling(max_new_tokens=8), kl_coef=0.1, reference="base", reduction="constant"
    ),
    "sft_qlora": partial(SFT, max_grad_norm=0.05),
    "rft_qlora": partial(RFT, group_size=4, sampling=Sampling(max_new_tokens=8), kl_coef=0.1, reference="base"),
    "mixed_sft_full": partial(SFT, max_grad_norm=0.05),  # in bf16-mixed
    "mixed_rft_full": partial(
        RFT, group_size=4, sampling=Sampling(max_new_tokens=8), micro_batch_prompts=1, kl_coef=0.1
    ),
    "on_policy_full": partial(
        OnPolicySFT, group_size=4, sampling=Sampling(max_new_tokens=8), selection=Selection(finished_only=False)
    ),
    "multitask_full": partial(MultiTask, group_size=4, sampling=Sampling(max_new_tokens=8), objectives={"even": "rft"}),
    "engine_full": partial(RFT, group_size=4, sampling=Sampling(max_new_tokens=8), kl_coef=0.1, sampler=ENGINE()),
    "engine_lora": partial(RFT, group_size=4, sampling=Sampling(max_new_tokens=8), kl_coef=0.1, sampler=ENGINE()),
    "shared_full": partial(
        RFT, group_size=4, sampling=Sampling(max_new_tokens=8), kl_coef=0.1, sampler=ENGINE(tensor_parallel_size=2)
    ),
    "resumed_full": SFT,
    "resumed_lora": partial(RFT, group_size=4, sampling=Sampling(max_new_tokens=8), kl_coef=0.1),
}
OFFLOADED = ["sft_full", "rft_lora", "mixed_sft_full", "resumed_full"]
"""Runs that the launch of fsdp2 repeats with its shards in main memory."""

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
FLOAT32 = Quantization(compute_dtype="float32")
GATHERS = [0]
SEEN: dict[str, Any] = {"gathers_while_sampling": [], "lengths": [], "waiting_gradients": [], "kept": [], "logged": []}


class Share(Dataset):
    """Four batches of the same four prompts, this rank's share of each: one rank may have text alone, the other images.

    In every other batch a rank has three of the rows, as where rows are left out. Only the second row has no image: it
    makes up a micro-batch of RFT alone.
    """

    def __init__(self, whole: Batch, trainer: L.Trainer) -> None:
        self.whole, self.trainer = whole, trainer

    def __len__(self) -> int:
        return 4

    def __getitem__(self, step: int) -> Batch:
        rows = [[1, 1, 2, 3], [2, 3, 1, 0]][step % 2]
        first = len(rows) // self.trainer.world_size + step % 2 if self.trainer.world_size > 1 else len(rows)
        mine = rows[first:] if self.trainer.global_rank else rows[:first]
        return Batch(self.whole.prompts.select(mine), self.whole.targets.select(mine))


class Noted(L.Callback):
    """Keeps what was logged of each batch."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        shown = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        SEEN["logged"].append(shown)


def runs_by(strategy: str) -> list[str]:
    """Names of the runs by a strategy: shards cannot be made of four-bit weights, and one process shares no engine."""
    if strategy == "fsdp2_offload":
        return OFFLOADED
    left_out = {"fsdp2": "qlora", "auto": "shared_full"}.get(strategy, "nothing")
    return [name for name in RUNS if not name.endswith(left_out)]


def make_trainer(strategy: str | FSDP2, devices: int, max_epochs: int = 1, **options: Any) -> L.Trainer:
    return L.Trainer(
        **QUIET, **options, max_epochs=max_epochs, accelerator="cpu", limit_val_batches=0, inference_mode=False,
        use_distributed_sampler=False, strategy=strategy, devices=devices, callbacks=[Noted()],
    )  # fmt: skip


def run(name: str, folder: Path, strategy: str, devices: int, shards: bool = False) -> dict:
    """The weights after the run, and what was seen on the way; perhaps resumed from shards in place of one file."""
    torch.manual_seed(0)
    tuning = name.rpartition("_")[2]
    backbone = Backbone(str(folder / "backbone"), tuning=tuning, lora=Lora(rank=4), quantization=FLOAT32)
    optimizer = partial(torch.optim.AdamW, lr=1e-2, eps=1e-3) if name.startswith("resumed") else sgd
    module = RUNS[name](backbone=backbone, optimizer=optimizer)
    batch = with_examples(torch.load(folder / "prompts.pt", weights_only=False), module.processor)
    if name.startswith("multitask"):  # in the first step one rank has rows of SFT alone
        for row, example in enumerate(batch.prompts.examples):
            example.task = "odd" if row % 2 else "even"
    if name == "rft_full":  # a task with a part that others have not; either rank is without it in one of two steps
        batch.prompts.examples[2].reward = lambda text, gold: {**length_reward(text, gold), "own": len(text) % 3}
    fit = partial(_fit, module, batch)
    if name.startswith("resumed"):
        checkpoint = str(folder / f"{name}_{strategy}{'_shards' if shards else ''}.ckpt")
        trainers = [
            make_trainer(FSDP2(save_distributed_checkpoint=True) if shards else strategy, devices, max_epochs=epochs)
            for epochs in (1, 2)
        ]
        fit(trainers[0]).save_checkpoint(checkpoint)
        module = RUNS[name](backbone=backbone, optimizer=optimizer)
        trainer = _fit(module, batch, trainers[1], checkpoint)
    else:
        options = {"precision": "bf16-mixed"} if name.startswith("mixed") else {}
        accumulate = 2 if "sft" in name else 1
        trainer = fit(make_trainer(strategy, devices, accumulate_grad_batches=accumulate, **options))
    local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in module.parameters())
    weights = all_whole(trainer.strategy.lightning_module_state_dict(), keep=True)
    weights = {key: weight.clone() for key, weight in weights.items()}
    return {"weights": weights, "local": local, **SEEN}


def _fit(module: L.LightningModule, batch: Batch, trainer: L.Trainer, checkpoint: str | None = None) -> L.Trainer:
    trainer.fit(module, DataLoader(Share(batch, trainer), batch_size=None), ckpt_path=checkpoint, weights_only=True)
    return trainer


def collect(folder: Path, strategy: str, devices: int) -> None:
    """Rollouts of five rows with pictures and three without, four rows a batch: ranks have unequally many."""
    attempts = Attempts(group_size=3, sampling=Sampling(max_new_tokens=6))
    module = SFT(backbone=Backbone(str(folder / "backbone")), attempts=attempts)
    tasks = {"bars": Task(ToyWorld("bars"), num_train=5), "facts": Task(ToyWorld("facts"), num_train=3)}
    stream = TaskStream(tasks, predict_on="train", eval_prompts_per_step=4)
    writer = RolloutWriter(f"{strategy}/rollouts.jsonl", Selection(correct_only=False, finished_only=False))
    trainer = L.Trainer(
        **QUIET, accelerator="cpu", inference_mode=False, use_distributed_sampler=False, strategy=strategy,
        devices=devices, callbacks=[writer], default_root_dir=folder,
    )  # fmt: skip
    trainer.predict(module, datamodule=stream)


def watch() -> None:
    """Counts what is gathered in sampling and what waits to be exchanged, and notes what a rank's load holds."""
    gather, sample, load = param_group.foreach_all_gather, group_rollouts.sample_groups, Backbone.load_model
    exchange, learn = strategies.exchange_gradients, OnPolicySFT.losses

    def noted_exchange(model: Any) -> None:
        layers = model.model.language_model.layers
        SEEN["waiting_gradients"].append(sum(p.grad.numel() for p in layers.parameters() if p.grad is not None))
        exchange(model)

    def counted_gather(*args: Any, **kwargs: Any) -> Any:
        GATHERS[0] += 1
        return gather(*args, **kwargs)

    def counted_sample(*args: Any, **kwargs: Any) -> Any:
        before = GATHERS[0]
        completions = sample(*args, **kwargs)
        SEEN["gathers_while_sampling"].append(GATHERS[0] - before)
        SEEN["lengths"].append(completions.lengths.tolist())
        return completions

    def counted_losses(module: OnPolicySFT, rollout: Any, kept: torch.Tensor) -> Any:
        SEEN["kept"].append(int(kept.sum()))
        return learn(module, rollout, kept)

    def noted_load(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        SEEN["loaded"] = sum(p.numel() for p in model.parameters() if not p.is_meta)
        return model

    strategies.exchange_gradients = noted_exchange
    OnPolicySFT.losses = counted_losses
    param_group.foreach_all_gather, group_rollouts.sample_groups, Backbone.load_model = (
        counted_gather, counted_sample, noted_load,
    )  # fmt: skip


def all_runs(launched: str) -> list[tuple[str, str, str]]:
    """Name, strategy and label of what one launch runs."""
    runs = [(name, launched, launched) for name in runs_by(launched)]
    if launched == "fsdp2":
        runs += [(name, "fsdp2_offload", "fsdp2_offload") for name in OFFLOADED]
        runs += [(name, "fsdp2", "shards") for name in RUNS if name.startswith("resumed")]
    return runs


def main(folder: Path, launched: str, devices: int, names: Sequence[str] = ()) -> None:
    watch()
    if not find_spec("vllm"):
        engines_from_a_server().start()
    for name, strategy, label in [(name, launched, launched) for name in names] or all_runs(launched):
        seen = run(name, folder, strategy, devices, shards=label == "shards")
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        torch.save({**seen, "gathers": GATHERS[0]}, folder / f"{name}_{label}_{rank}.pt")
        SEEN.update({what: [] for what in SEEN if what != "loaded"})
    if not names:
        collect(folder, launched, devices)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
