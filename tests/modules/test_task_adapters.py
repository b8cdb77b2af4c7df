"""What becomes of the adapters from task to task: merged without an effect, or kept for their own task."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from cpt_lightning.models import Backbone
from cpt_lightning.models.adapters import Lora, adapter_weights, adapters_off, begin_adapters_anew, merge_adapters
from cpt_lightning.modules import RFT, SFT
from cpt_lightning.rollouts import Sampling, completion_logprobs
from tests.training import with_examples

NAMES = ["a", "b", "c"]
STEPS = 2


class Stream(L.LightningDataModule):
    """Three tasks on the same prompts, with targets and answers of their own rows' names."""

    stages = [[name] for name in NAMES]  # noqa: RUF012

    def __init__(self, prompts, processor):
        super().__init__()
        self.batches = {name: with_examples(prompts, processor, task=name) for name in [*NAMES, "probe"]}

    def train_dataloader(self):
        return DataLoader([self.batches[NAMES[self.trainer.current_epoch]]] * STEPS, batch_size=None)

    def val_dataloader(self):
        return DataLoader(list(self.batches.values()), batch_size=None)


class Record(L.Callback):
    """Checkpoints after every step and stage; what the model gives around the change of task; what it answers."""

    def __init__(self, folder):
        self.folder = folder
        self.ends, self.starts, self.bare = [], [], []
        self.answers, self.weights = [], []

    def logps(self, module):
        batch = module.trainer.datamodule.batches["a"]
        with torch.no_grad():
            return completion_logprobs(module.model.eval(), batch.prompts, batch.targets)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.starts.append(self.logps(module))
            with adapters_off(module.model):
                self.bare.append(self.logps(module))
            module.model.train()

    def on_train_batch_end(self, trainer, *_):
        if not trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")

    def on_validation_epoch_start(self, *_):
        self.answers.append({})

    def on_validation_batch_end(self, trainer, module, outputs, *_):
        self.answers[-1][outputs.examples[0].task] = outputs.texts

    def on_train_epoch_end(self, trainer, module):
        self.ends.append(self.logps(module))
        self.weights.append([weight.detach().clone() for weight in adapter_weights(module.model)])
        trainer.save_checkpoint(self.folder / f"stage={trainer.current_epoch}.ckpt")


def trainer_of(record):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(
        max_epochs=3, **quiet, callbacks=[record], enable_checkpointing=False, num_sanity_val_steps=0,
        inference_mode=False, reload_dataloaders_every_n_epochs=1,
    )  # fmt: skip


def module_of(folder, kind, along_stream, **options):
    lora = {"rank": 2, "along_stream": along_stream, "dropout": 0.1, **options.pop("lora", {})}
    backbone = Backbone(folder, tuning=options.pop("tuning", "lora"), lora=Lora(**lora))
    greedy = Sampling(max_new_tokens=8, temperature=0.0)
    return kind(backbone=backbone, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-2), evaluation=greedy, **options)


@pytest.fixture
def stream(processor, mixed_prompts):
    return Stream(mixed_prompts, processor)


def run(tmp_path, folder, stream, along_stream, kind=SFT, checkpoint=None, **options):
    """A run over the stream, or the rest of one: module and record."""
    torch.manual_seed(0)
    module, record = module_of(folder, kind, along_stream, **options), Record(tmp_path)
    trainer = trainer_of(record)
    trainer.fit(module, stream, ckpt_path=checkpoint, weights_only=True)
    return module, record


KL = {"kl_coef": 0.5, "group_size": 4, "sampling": Sampling(max_new_tokens=8)}
RUNS = {
    "sft": (SFT, {}),
    "dora": (SFT, {"lora": {"use_dora": True}}),
    "kl": (RFT, KL),
}


@pytest.mark.parametrize("objective", RUNS)
def test_a_renewed_adapter_starts_without_effect_where_the_one_before_ended(tmp_path, small_folder, stream, objective):
    kind, options = RUNS[objective]
    module, record = run(tmp_path, small_folder, stream, "renewed", kind, **options)
    for stage in (1, 2):
        assert (record.ends[stage] - record.ends[stage - 1]).abs().max() > 1e-2, "each task changes the model"
        torch.testing.assert_close(record.starts[stage], record.ends[stage - 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(record.starts[stage], record.bare[stage], atol=1e-5, rtol=0)
    assert len(module.earlier) == 2
