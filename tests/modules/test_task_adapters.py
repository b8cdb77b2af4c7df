"""What becomes of the adapters from task to task: merged without an effect, or kept for their own task."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from cpt_lightning.models import Backbone
from cpt_lightning.models.adapted_layers import begin_adapters_anew, merge_into_base
from cpt_lightning.models.adapters import Lora, adapter_weights, adapters_off
from cpt_lightning.modules import RFT, SFT
from cpt_lightning.rollouts import Sampling, completion_logprobs
from tests.training import with_examples

NAMES = ["a", "b", "c"]
STEPS = 2


class Stream(L.LightningDataModule):
    """Three tasks on the same prompts: each wants its own name, over and over."""

    stages = [[name] for name in NAMES]  # noqa: RUF012

    def __init__(self, prompts, processor):
        super().__init__()
        self.batches = {name: with_examples(prompts, processor, task=name) for name in [*NAMES, "probe"]}
        for name, batch in self.batches.items():
            batch.targets = processor.encode_targets([name * 8] * len(batch))

    def train_dataloader(self):
        return loader([self.batches[NAMES[self.trainer.current_epoch]]] * STEPS)

    def val_dataloader(self):
        return loader(list(self.batches.values()))


def loader(batches):
    """One that draws nothing from the global generator, as the stream's."""
    return DataLoader(batches, batch_size=None, generator=torch.Generator())


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


def test_the_reference_after_a_renewal_is_the_policy_that_the_task_began_with(tmp_path, small_folder, stream):
    """So its adapters are the fresh ones, which do nothing, over the weights that took in the ones before."""
    module, record = run(tmp_path, small_folder, stream, "renewed", RFT, **KL)
    batch = stream.batches["a"]
    with module.reference.model(module.model) as reference:
        logps = completion_logprobs(reference, batch.prompts, batch.targets)
    torch.testing.assert_close(logps, record.ends[1], atol=1e-5, rtol=0)
    assert (logps - record.ends[2]).abs().max() > 1e-2


def test_a_task_is_evaluated_with_its_own_adapter_and_all_else_with_the_newest(tmp_path, small_folder, stream):
    """The answers at the end of the stream are those of models that have one of the adapters alone."""
    module, record = run(tmp_path, small_folder, stream, "per_task")
    base = [weight.clone() for name, weight in module.model.named_parameters() if "lora_" not in name]
    alone = module_of(small_folder, SFT, "shared")
    alone.configure_model()
    assert all(
        torch.equal(weight, other)
        for weight, other in zip(base, (w for n, w in alone.model.named_parameters() if "lora_" not in n), strict=True)
    )
    said = set()
    for name, stage in {"a": 0, "b": 1, "c": 2, "probe": 2}.items():
        for weight, value in zip(adapter_weights(alone.model), record.weights[stage], strict=True):
            weight.data.copy_(value)
        texts = alone.evaluate(stream.batches[name]).texts
        assert record.answers[-1][name] == texts
        said.add(tuple(texts))
        with module.adapters_of(name):
            pairs = list(zip(adapter_weights(module.model), record.weights[stage], strict=True))
            assert all(torch.equal(weight, value) for weight, value in pairs)
    assert len(said) > 1, "or the answers would not tell adapters apart"
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pairs = list(zip(record.weights[one], record.weights[other], strict=True))
        assert not any(torch.equal(weight, value) for weight, value in pairs), "no two stages have the same adapter"
    assert record.answers[0]["b"] == alone_after(alone, record.weights[0], stream.batches["b"]), "not yet learned"
    assert record.answers[0]["a"] == record.answers[2]["a"], "nothing is forgotten"


def alone_after(module, weights, batch):
    """What a model answers with these adapters."""
    for weight, value in zip(adapter_weights(module.model), weights, strict=True):
        weight.data.copy_(value)
    return module.evaluate(batch).texts


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    "along_stream, kind, options",
    [
        ("renewed", SFT, {}),
        ("renewed", RFT, KL),
        ("renewed", SFT, {"lora": {"use_dora": True}}),
        ("per_task", RFT, KL),
        ("per_task", SFT, {"tuning": "qlora"}),
    ],
    ids=["renewed", "renewed kl", "renewed dora", "per task kl", "per task qlora"],
)
def test_a_resumed_run_ends_bit_for_bit_alike(tmp_path, small_folder, stream, along_stream, kind, options):
    """From the end of the first task, and from within the third, with two adapters behind it."""
    whole, record = run(tmp_path / "whole", small_folder, stream, along_stream, kind, **dict(options))
    saved = torch.load(tmp_path / "whole" / "step=5.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if "lora_" not in name and not name.startswith(("earlier.", "reference."))]
    for place in ("stage=0", "step=5"):
        checkpoint = tmp_path / "whole" / f"{place}.ckpt"
        resumed, rest = run(
            tmp_path / place, small_folder, stream, along_stream, kind, checkpoint=checkpoint, **dict(options)
        )
        ends = [module.state_dict() for module in (whole, resumed)]
        assert ends[0].keys() == ends[1].keys() and whole.stages_begun == resumed.stages_begun == [["a"], ["b"], ["c"]]
        different = [n for n, value in ends[0].items() if torch.is_tensor(value) and not torch.equal(value, ends[1][n])]
        assert (place, different) == (place, [])
        assert record.answers[-1] == rest.answers[-1]


@pytest.mark.parametrize("along_stream", ["renewed", "per_task"])
def test_checkpoints_are_evaluated_in_any_order_by_one_module(tmp_path, small_folder, stream, along_stream):
    """A module that went further goes back: weights that took in adapters are the backbone's again."""
    module, record = run(tmp_path, small_folder, stream, along_stream)
    later = {}
    for stage in (2, 0, 1):
        again = Record(tmp_path)
        trainer_of(again).validate(
            module, stream, ckpt_path=tmp_path / f"stage={stage}.ckpt", verbose=False, weights_only=True
        )
        later[stage] = again.answers[-1]
    assert later == dict(enumerate(record.answers))


def test_a_new_adapter_depends_on_seed_and_stage_and_on_nothing_else(small_folder):
    model = Backbone(small_folder, tuning="lora").load_model()
    weights = []
    for seed in (1, 2, 1):
        torch.rand(1)
        state = torch.get_rng_state()
        begin_adapters_anew(model, seed)
        assert torch.equal(state, torch.get_rng_state())
        weights.append([weight.clone() for weight in adapter_weights(model)])
    same = [torch.equal(one, other) for one, other in zip(weights[0], weights[1], strict=True)]
    assert not all(same)
    assert all(torch.equal(one, other) for one, other in zip(weights[0], weights[2], strict=True))


def test_a_merge_adds_the_scaled_product_of_the_matrices(small_folder):
    """``W + alpha / rank * B A``, here 8 / 2 = 4 times."""
    model = Backbone(small_folder, tuning="lora", lora=Lora(rank=2, alpha=8)).load_model()
    layer = model.model.language_model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.clone()
    a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data.normal_()
    merge_into_base(model)
    torch.testing.assert_close(layer.base_layer.weight.data, before + 4 * b @ a)
    b.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        merge_into_base(model)


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"tuning": "full", "lora": Lora(along_stream="renewed")}, "along_stream=renewed needs adapters: set .*lora"),
        ({"tuning": "full", "lora": Lora(along_stream="per_task")}, "along_stream=per_task needs adapters"),
        ({"tuning": "qlora", "lora": Lora(along_stream="renewed")}, "four-bit weights cannot take in .* per_task"),
    ],
)
def test_a_backbone_that_cannot_is_refused_by_its_constructor(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Backbone(**options)


def test_a_reference_of_the_base_is_refused_where_the_base_changes():
    backbone = Backbone(tuning="lora", lora=Lora(along_stream="renewed"))
    with pytest.raises(ValueError, match="reference=base: .*set reference to task_start"):
        RFT(backbone=backbone, kl_coef=0.1, reference="base")
    RFT(backbone=backbone, reference="base")  # which is not asked without a KL term


def test_a_trainer_without_a_stream_is_refused(tmp_path, small_folder, stream):
    module = module_of(small_folder, SFT, "per_task")
    batches = loader([stream.batches["a"]])
    with pytest.raises(ValueError, match="along_stream=per_task needs a stream of tasks"):
        trainer_of(Record(tmp_path)).fit(module, batches, batches)


def test_strategies_that_split_weights_are_refused_before_anything_is_loaded(small_folder):
    from cpt_lightning.strategy import FSDP2

    module = module_of(small_folder, SFT, "renewed")
    module._trainer = type("Trainer", (), {"strategy": FSDP2()})()
    with pytest.raises(ValueError, match="along_stream=renewed: FSDP2 splits .*set trainer.strategy to auto or ddp"):
        module.configure_model()
    assert "model" not in module._modules
