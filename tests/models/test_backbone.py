"""Backbones load as named, train what is asked, and say what is wrong."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.models import Backbone, Lora, load_backbone
from cpt_lightning.models.adapters import parts_of
from cpt_lightning.models.qwen_vl import QwenVL


def test_a_local_folder_and_tiny_load_as_plain_transformers_models_in_train_mode(small_folder):
    from transformers import Qwen2_5_VLForConditionalGeneration

    for path in (small_folder, "tiny"):
        model, processor = load_backbone(path)
        assert type(model) is Qwen2_5_VLForConditionalGeneration
        assert model.training
        assert processor.image_token_id == model.config.image_token_id
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_the_dtype_is_an_option(small_folder):
    model, _ = load_backbone(small_folder, dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_the_parts_cover_every_weight_once(small_model):
    counted = [
        id(weight) for modules in parts_of(small_model).values() for each in modules for weight in each.parameters()
    ]
    tied = {id(small_model.lm_head.weight)}
    assert set(counted) == {id(weight) for weight in small_model.parameters()}
    assert len(counted) == len(set(counted)) + len(tied)


@pytest.mark.parametrize("frozen", [["vision_tower"], ["projector"], ["language_model"], ["vision_tower", "projector"]])
def test_freezing_a_part_freezes_it_alone(small_folder, frozen):
    model, _ = load_backbone(small_folder, freeze=frozen)
    for part, modules in parts_of(model).items():
        trainable = {weight.requires_grad for module in modules for weight in module.parameters()}
        assert trainable == {part not in frozen}


def test_lora_trains_adapters_of_the_language_model_alone_and_changes_nothing_at_first(small_folder, mixed_prompts):
    from tests.naive import naive_logprobs, random_completions

    plain, _ = load_backbone(small_folder)
    model, _ = load_backbone(small_folder, tuning="lora", lora=Lora(rank=2))
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trainable) == 2 * 7 * 2  # A and B of seven linear layers in each of two decoder layers
    assert all("language_model" in name and "lora_" in name for name in trainable)
    completions = random_completions(4, 3, 100, torch.Generator())
    torch.testing.assert_close(
        naive_logprobs(model, mixed_prompts, completions), naive_logprobs(plain, mixed_prompts, completions)
    )


def test_lora_on_the_vision_parts_binds_to_their_linear_layers(small_folder):
    model, _ = load_backbone(small_folder, tuning="lora", lora=Lora(rank=2, parts=["vision_tower", "projector"]))
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trainable) == 2 * (5 * 2 + 2)  # qkv, proj and three of the MLP in each of two blocks; two of the merger
    assert all(name.startswith("model.visual") for name in trainable)


def test_gradient_checkpointing_is_switched_for_each_part_alone(small_folder):
    def checkpointed(module) -> set[bool]:
        return {each.gradient_checkpointing for each in module.modules() if hasattr(each, "gradient_checkpointing")}

    model, _ = load_backbone(small_folder, gradient_checkpointing=["vision_tower"])
    assert True in checkpointed(model.model.visual)
    assert checkpointed(model.model.language_model) == {False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuning": "lora", "freeze": ["language_model"]}, "cannot be frozen and get LoRA adapters"),
        ({"freeze": ["vision_tower", "projector", "language_model"]}, "nothing would be trained"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Backbone(**options)


def test_impossible_adapters_are_refused(small_folder):
    with pytest.raises(ValueError, match=r"rank=0"):
        Lora(rank=0)
    with pytest.raises(ValueError, match=r"dropout=1.0"):
        Lora(dropout=1.0)
    with pytest.raises(ValueError, match=r"no module of the backbone matches 'nowhere'"):
        load_backbone(small_folder, tuning="lora", lora=Lora(targets="nowhere"))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json there"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("load", ["load_model", "load_processor"])
def test_a_model_of_another_kind_is_refused_by_its_name(tmp_path, load):
    """transformers would warn, and draw at random what it does not find."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(ValueError, match="is a model of type 'qwen2_vl'; give a Qwen2.5-VL, .* 'qwen2_5_vl'"):
        getattr(Backbone(str(tmp_path)), load)()


def test_a_hub_that_does_not_give_a_model_is_quoted_in_a_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("nobody/nothing is not a local folder\nand is not a valid model identifier\n")

    monkeypatch.setattr(QwenVL.config_class, "get_config_dict", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"^backbone.path='nobody/nothing' cannot be had: nobody/.* folder$"):
        Backbone("nobody/nothing").load_model()
