"""A checkpoint holds what was trained, and is taken only by the model that it belongs to."""

import re
from contextlib import nullcontext

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from cpt_lightning.models import Backbone
from cpt_lightning.models.adapters import Lora
from cpt_lightning.modules import RFT, SFT
from cpt_lightning.modules.compatibility import KEY
from cpt_lightning.modules.random_states import random_state, set_random_state
from tests.training import fit, sgd, weights, with_examples

ADAPTERS = {"tuning": "lora", "lora": Lora(rank=2, dropout=0.2)}


@pytest.fixture
def batch(processor, mixed_prompts):
    return with_examples(mixed_prompts, processor)


def trained(batch, path, kind=SFT, folder="tiny", **options):
    """A module after a step, and what it saved."""
    module = kind(backbone=Backbone(folder, **options), optimizer=sgd)
    fit(module, [batch]).save_checkpoint(path)
    return module, torch.load(path, weights_only=True)


def evaluate(batch, path, folder="tiny", **options):
    """A module of these options that has loaded the checkpoint."""
    module = SFT(backbone=Backbone(folder, **options))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(**quiet, inference_mode=False)
    loader = DataLoader([batch], batch_size=None)
    trainer.predict(module, loader, ckpt_path=path, weights_only=True)
    return module


def test_of_a_model_with_adapters_only_these_are_kept_and_the_rest_comes_from_the_backbone(
    tmp_path, batch, small_folder
):
    path = tmp_path / "lora.ckpt"
    module, saved = trained(batch, path, folder=small_folder, **ADAPTERS)
    names = {f"model.{name}" for name, weight in module.model.named_parameters() if weight.requires_grad}
    assert set(saved["state_dict"]) == names
    assert all("lora_" in name for name in names)
    loaded, before = weights(evaluate(batch, path, small_folder, **ADAPTERS)), weights(module)
    assert all(torch.equal(loaded[name], before[name]) for name in before)


@pytest.mark.parametrize("frozen", [[], ["vision_tower"]])
def test_of_a_fully_tuned_model_all_but_frozen_parts_is_kept(tmp_path, batch, small_folder, frozen):
    path = tmp_path / "full.ckpt"
    module, saved = trained(batch, path, folder=small_folder, freeze=frozen)
    all_names = set(module.state_dict())
    assert all_names - set(saved["state_dict"]) == {
        name for name in all_names if frozen and re.match(r"model\.model\.visual\.(patch_embed|blocks)", name)
    }
    loaded, before = weights(evaluate(batch, path, small_folder, freeze=frozen)), weights(module)
    assert all(torch.equal(loaded[name], before[name]) for name in before)


def test_the_reference_is_kept(tmp_path, batch, small_folder):
    options = {"kl_coef": 0.1, "group_size": 2}
    module = RFT(backbone=Backbone(small_folder), optimizer=sgd, **options)
    fit(module, [batch]).save_checkpoint(tmp_path / "kl.ckpt")
    saved = torch.load(tmp_path / "kl.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == set(module.state_dict())
    assert any(name.startswith("reference.") for name in saved)


KL = {"kl_coef": 0.1}


@pytest.mark.parametrize(
    "tuning, before, now, complaint",
    [
        ("full", KL, {**KL, "reference": "base"}, "with reference=task_start, now it is base: .*restore reference, or"),
        ("full", {}, {**KL, "reference": "base"}, "with kl_coef=0, now it is 0.1: it does not hold the reference"),
        ("lora", {}, KL, "with kl_coef=0, now it is 0.1"),
        ("lora", {}, {**KL, "reference": "base"}, None),  # the model without its adapters
        ("full", KL, {"kl_coef": 0.2}, None),
        ("full", KL, {}, None),
    ],
)
def test_a_run_goes_on_with_the_reference_that_its_checkpoint_holds(
    tmp_path, batch, small_folder, tuning, before, now, complaint
):
    backbone = Backbone(small_folder, tuning=tuning, lora=Lora(rank=2))
    fit(RFT(backbone=backbone, group_size=2, **before), [batch]).save_checkpoint(tmp_path / "kl.ckpt")
    saved = torch.load(tmp_path / "kl.ckpt", weights_only=True)
    module = RFT(backbone=backbone, group_size=2, **now)
    module.check_checkpoint("kl.ckpt", saved, is_fitting=False)
    with pytest.raises(ValueError, match=complaint) if complaint else nullcontext():
        module.check_checkpoint("kl.ckpt", saved, is_fitting=True)


@pytest.mark.parametrize(
    "now, complaint",
    [
        ({"tuning": "full"}, "belongs to backbone.tuning=lora, now it is full; restore it, or begin a new run"),
        ({"tuning": "lora", "lora": Lora(rank=4, dropout=0.2)}, "belongs to backbone.lora.rank=2, now it is 4"),
        ({"tuning": "lora", "lora": Lora(rank=2, alpha=8)}, "belongs to backbone.lora.alpha=32, now it is 8"),
        ({**ADAPTERS, "freeze": ["vision_tower"]}, r"backbone.freeze=\[\], now it is \['vision_tower'\]"),
        ({**ADAPTERS, "dtype": "bfloat16"}, "trained on other frozen weights: .*float32, now .* bfloat16"),
        ({**ADAPTERS, "folder": "tiny"}, "trained on other frozen weights: backbone.path=.*now it is tiny"),
    ],
    ids=["tuning", "rank", "alpha", "frozen part", "precision", "backbone"],
)
def test_a_checkpoint_of_another_backbone_is_refused(tmp_path, batch, small_folder, now, complaint):
    trained(batch, tmp_path / "lora.ckpt", folder=small_folder, **ADAPTERS)
    with pytest.raises(ValueError, match=complaint) as refusal:
        evaluate(batch, tmp_path / "lora.ckpt", **{"folder": small_folder, **now})
    assert "\n" not in str(refusal.value)


def test_the_same_backbone_in_another_folder_is_taken(tmp_path, batch, small_folder):
    import shutil

    trained(batch, tmp_path / "lora.ckpt", folder=small_folder, **ADAPTERS)
    shutil.copytree(small_folder, tmp_path / "moved")
    evaluate(batch, tmp_path / "lora.ckpt", str(tmp_path / "moved"), **ADAPTERS)


@pytest.mark.parametrize(
    "before, now",
    [
        (ADAPTERS, {"tuning": "lora", "lora": Lora(rank=2, dropout=0.0)}),
        ({}, {"lora": Lora(rank=4)}),
        ({}, {"cuda_graphs": False}),
    ],
    ids=["dropout", "adapters that there are none of", "how it is computed"],
)
def test_what_weights_do_not_depend_on_may_change(tmp_path, batch, small_folder, before, now):
    trained(batch, tmp_path / "last.ckpt", folder=small_folder, **before)
    evaluate(batch, tmp_path / "last.ckpt", small_folder, **now)


def spoil(saved: dict, kind: str) -> None:
    some = next(iter(saved["state_dict"]))
    match kind:
        case "missing":
            del saved["state_dict"][some]
        case "renamed":
            saved["state_dict"][some.replace("default", "other")] = saved["state_dict"].pop(some)
        case "strange":
            saved["state_dict"]["model.head.weight"] = torch.ones(1)
        case "shape":
            saved["state_dict"][some] = torch.ones(3, 5)
        case "foreign":
            del saved[KEY]


@pytest.mark.parametrize(
    "kind, complaint",
    [
        ("missing", r"checkpoint .*lora.ckpt lacks model\..*lora_A"),
        ("renamed", r"checkpoint .*lora.ckpt lacks model\.model\.language_model\.layers\.0\..*lora_A.default.weight;"),
        ("strange", r"lora.ckpt holds model.head.weight, which the model does not have"),
        ("shape", r"has the shape \[3, 5\], the model's \[2, 32\]"),
        ("foreign", "was not written by cpt_lightning"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, batch, small_folder, kind, complaint):
    path = tmp_path / "lora.ckpt"
    _, saved = trained(batch, path, folder=small_folder, **ADAPTERS)
    spoil(saved, kind)
    torch.save(saved, path)
    with pytest.raises(ValueError, match=complaint):
        evaluate(batch, path, small_folder, **ADAPTERS)


def test_random_numbers_go_on_where_they_were(tmp_path):
    """Python's, numpy's and torch's global generators, through a file."""
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002 the global one is meant

    draw()
    device = torch.device("cpu")
    torch.save(random_state(device), tmp_path / "state")
    expected = draw()
    draw()
    set_random_state(torch.load(tmp_path / "state", weights_only=True), device)
    assert draw() == expected


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_adapters_and_the_reference_of_the_tasks_start_go_on_from_a_checkpoint(tmp_path, batch, small_folder, tuning):
    """Killed in the middle of the second task, whose reference is neither the base nor the model of now."""

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"step={trainer.global_step}.ckpt")

    def fitted(checkpoint=None):
        backbone = Backbone(small_folder, tuning=tuning, lora=Lora(rank=2))
        module = RFT(backbone=backbone, group_size=4, kl_coef=0.5, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
        options = {"max_epochs": 2, "limit_val_batches": 0, "logger": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = L.Trainer(**options, **quiet, callbacks=[Keep()], enable_checkpointing=False)
        loader = DataLoader([batch] * 3, batch_size=None)
        trainer.fit(module, loader, loader, ckpt_path=checkpoint, weights_only=True)
        return module

    whole = fitted()
    names = set(torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"])
    assert names and all("lora_" in name or name.startswith("reference.adapters.") for name in names)
    resumed = fitted(tmp_path / "step=4.ckpt")  # after the first batch of the second task
    ends = [each.state_dict() for each in (whole, resumed)]
    for name in names:
        assert torch.equal(ends[0][name], ends[1][name]), name
    start = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    adapters = [weight for name, weight in start.items() if "lora_" in name]
    kept = [ends[0][name] for name in ends[0] if name.startswith("reference.adapters.")]
    assert sum(float(weight.abs().sum()) for weight in kept) > 0
    assert {tuple(weight.shape) for weight in kept} == {tuple(weight.shape) for weight in adapters}


def test_an_optimizer_that_takes_matrices_alone_goes_on_within_a_task(tmp_path, batch, small_folder):
    """Muon, of adapters; and AdamW does not go on with what it left."""
    options = {"backbone": Backbone(small_folder, **ADAPTERS)}
    module = SFT(optimizer=lambda parameters: torch.optim.Muon(parameters, lr=1e-3), **options)
    fit(module, [batch]).save_checkpoint(tmp_path / "muon.ckpt")
    saved = torch.load(tmp_path / "muon.ckpt", weights_only=True)
    saved["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{"step": 1, "num_steps": 2}]
    module.check_checkpoint("muon.ckpt", saved, is_fitting=True)
    with pytest.raises(ValueError, match="middle of a task by another optimizer than AdamW"):
        SFT(**options).check_checkpoint("muon.ckpt", saved, is_fitting=True)


def test_a_module_that_saves_its_hyperparameters_is_loaded_all_the_same(tmp_path, batch, small_folder):
    """They are objects, such as a Sampling, which a checkpoint that is read as data cannot hold."""

    class Weighed(SFT):
        def __init__(self, factor: float = 1.0, **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters()
            self.factor = factor

    path = tmp_path / "weighed.ckpt"
    module, saved = trained(batch, path, Weighed, small_folder)
    assert module.hparams.backbone == module.backbone and "hyper_parameters" not in saved
    loaded = Weighed.load_from_checkpoint(path, factor=2.0)
    assert loaded.factor == 2.0
    assert all(torch.equal(weight, weights(loaded)[name]) for name, weight in weights(module).items())


def test_a_compiled_module_is_refused_in_a_line(batch, small_folder):
    module = torch.compile(SFT(backbone=Backbone(small_folder)), backend="eager")
    with pytest.raises(ValueError, match=r"torch\.compile\(module\): .*a module that was not compiled"):
        fit(module, [batch])
