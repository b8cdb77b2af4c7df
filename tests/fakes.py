"""A tiny stream and a module of one linear layer that meet as the real ones do, so that a Trainer runs in
milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from torch import nn
from torchmetrics import MeanMetric, SumMetric

from cpt_lightning.callbacks import ContinualLearning, SampleLog, TaskCheckpoint
from cpt_lightning.data import TaskStream
from cpt_lightning.tasks import Row, Source, Split, Task
from cpt_lightning.types import Batch, Completions, Evaluation, Prompts

NUM_FEATURES = 4


class NumberSource(Source):
    """Rows whose question is their number; the answer is whether it is odd."""

    def __init__(self, name: str, num_train: int = 10, num_test: int = 6) -> None:
        self.name = name
        self.sizes = {"train": num_train, "val": num_test, "test": num_test}

    def split(self, split: Split) -> Sequence[Row]:
        return [Row(f"{self.name}/{split}/{i}", f"question {i}", str(i % 2)) for i in range(self.sizes[split])]


class WordProcessor:
    """A token per word of the question: its length is the prompt's length."""

    def encode(self, messages, images, row_ids) -> Prompts:
        words = [chat[-1]["content"][-1]["text"].split() for chat in messages]
        width = max(map(len, words))
        ids = [[0] * (width - len(row)) + [1 + sum(map(ord, word)) % 97 for word in row] for row in words]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in words]
        return Prompts(torch.tensor(ids), torch.tensor(mask), images_per_prompt=[0] * len(words))

    def encode_targets(self, texts, ids=None, row_ids=None) -> Completions:
        ids = torch.tensor([[ord(text[0])] for text in texts])
        return Completions(ids, torch.ones_like(ids, dtype=torch.bool))


class LinearModule(L.LightningModule):
    """Classifies odd and even by a linear layer; answers are graded by the rows' own rewards, as everywhere."""

    def __init__(self, manual: bool = False, lr: float = 0.1) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.lr = lr
        self.processor = WordProcessor()
        self.layer = nn.Linear(NUM_FEATURES, 2)
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.zeros_(self.layer.bias)
        self.seen: list[list[str]] = []
        self.rates: list[float] = []
        self.metrics = nn.ModuleDict()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def logits(self, batch: Batch) -> torch.Tensor:
        return self.layer(torch.sin(batch.prompts.input_ids[:, -1:] * torch.arange(1.0, 1 + NUM_FEATURES)))

    def training_step(self, batch: Batch, batch_idx: int):
        self.seen.append([example.row_id for example in batch.prompts.examples])
        optimizer = self.trainer.optimizers[0]
        self.rates.append(optimizer.param_groups[0]["lr"])
        labels = torch.tensor([int(example.gold) for example in batch.prompts.examples])
        loss = nn.functional.cross_entropy(self.logits(batch), labels)
        self.log("train/loss", loss, batch_size=len(batch))
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()
        return None

    def drawn(self, batch: Batch, sampling, *key) -> Batch:
        """A drawn answer is odd, whatever the key."""
        return Batch(batch.prompts, self.processor.encode_targets(["1"] * len(batch)))

    def log_likelihoods(self, batch: Batch) -> torch.Tensor:
        """Of the answer that is the target."""
        labels = batch.targets.ids - ord("0")
        return self.logits(batch).log_softmax(dim=1).gather(1, labels).squeeze(1)

    def validation_step(self, batch: Batch, batch_idx: int) -> Evaluation:
        examples = batch.prompts.examples
        texts = [str(answer) for answer in self.logits(batch).argmax(dim=1).tolist()]
        scores = [example.reward(text, example.gold) for example, text in zip(examples, texts, strict=True)]
        valid = batch.prompts.valid.tolist()
        for example, score, counts in zip(examples, scores, valid, strict=True):
            self._metric(f"{example.task}/accuracy", MeanMetric).update(score["accuracy"], weight=float(counts))
            self._metric(f"{example.task}/num_samples", SumMetric).update(float(counts))
        return Evaluation(examples, texts, scores, valid)

    test_step = validation_step
    predict_step = validation_step

    def _metric(self, name: str, kind):
        if name not in self.metrics:
            self.metrics[name] = kind()
        return self.metrics[name]

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": metric.compute() for name, metric in self.metrics.items()})
        self.metrics.clear()

    def on_test_epoch_end(self) -> None:
        self.metrics.clear()


def number_stream(**options) -> TaskStream:
    """Tasks ``a``, ``b``, ``c`` and a probe ``p``, four rows a batch."""
    tasks = {name: Task(NumberSource(name), prompt=_prompt(name)) for name in "abc"}
    probes = {"p": Task(NumberSource("p", num_test=5), prompt=_prompt("p"))}
    return TaskStream(**{"tasks": tasks, "probes": probes, "prompts_per_step": 4, "eval_prompts_per_step": 4} | options)


def _prompt(name: str):
    from cpt_lightning.tasks import Prompt

    return Prompt(suffix=name)


def make_trainer(folder, stream: TaskStream, callbacks=(), continual=None, checkpoint=None, **options):
    """A Trainer with the settings that ``cpt`` gives it."""
    continual = continual or ContinualLearning(print_table=False)
    checkpoint = checkpoint or TaskCheckpoint(every_n_steps=1)
    defaults = {
        **stream.trainer_options,
        "default_root_dir": str(folder),
        "logger": False,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [continual, SampleLog(), checkpoint, *callbacks],
    }
    return L.Trainer(**(defaults | options))


class Killed(Exception):
    """What stops a run in the middle."""


class KillAt(L.Callback):
    """Stops a run by raising, at a hook of a stage (and batch).

    Args:
        stage: Index of the stage.
        hook: Where in the stage: ``on_train_batch_start``, ``on_validation_batch_start``, or ``on_train_epoch_end``,
            which comes before the checkpoint is saved.
        batch: Index of the batch.
    """

    def __init__(self, stage: int, hook: str = "on_train_batch_start", batch: int = 0) -> None:
        self.stage, self.hook, self.batch = stage, hook, batch

    def _maybe(self, hook: str, trainer: L.Trainer, batch_idx: int) -> None:
        here = trainer.state.fn, trainer.current_epoch, hook, batch_idx
        if here == ("fit", self.stage, self.hook, self.batch):
            raise Killed(f"{hook} of stage {self.stage}, batch {self.batch}")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._maybe("on_train_batch_start", trainer, batch_idx)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self._maybe("on_validation_batch_start", trainer, batch_idx)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._maybe("on_train_epoch_end", trainer, 0)
