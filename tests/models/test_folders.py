"""What is exported is, for plain transformers and PEFT, the model that was trained: bit for bit, merged to 1e-5."""

from __future__ import annotations

import json
import os

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from cpt_lightning.models import Backbone, Lora
from cpt_lightning.models.adapter_folders import WEIGHTS_FILE, merge_and_unload
from cpt_lightning.models.decoder import use_patterns
from cpt_lightning.models.folders import load_weights, refuse_filled, save_folder, whole_folder
from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.vision import use_fast_vision

# peft 0.21 asks transformers 5.23 by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FULL = {"tuning": "full"}
FROZEN = {"tuning": "full", "freeze": ["vision_tower"]}
LORA = {"tuning": "lora", "lora": Lora(rank=2, alpha=6, parts=["language_model", "vision_tower", "projector"])}


def trained(path: str, **options):
    """A backbone whose trainable weights have moved."""
    model = Backbone(path, **options).load_model()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    return model.eval()


def save(model, *args, **options) -> None:
    """Saves a model whose layers were swapped for faster ones, which round otherwise, as a run does."""
    use_patterns(model)
    use_fast_vision(model)
    save_folder(model, *args, **options)


def logits(model, prompts) -> torch.Tensor:
    """Of the plain forward of transformers over texts and images."""
    with torch.no_grad():
        return model(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            pixel_values=prompts.pixel_values.to(model.dtype),
            image_grid_thw=prompts.image_grid_thw,
            mm_token_type_ids=(prompts.input_ids == model.config.image_token_id).int(),
        ).logits


def plain(folder, dtype="float32"):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [FULL, FROZEN], ids=["full", "frozen vision"])
def test_a_whole_model_reloads_bit_for_bit(small_folder, processor, mixed_prompts, tmp_path, options, dtype):
    model = trained(small_folder, dtype=dtype, **options)
    expected = logits(model, mixed_prompts)
    save(model, processor, tmp_path / "out", small_folder, "card")
    again = plain(tmp_path / "out", "auto")
    assert again.dtype == model.dtype
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again, mixed_prompts), expected)
    assert not torch.equal(expected, logits(plain(small_folder, dtype), mixed_prompts))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_reloads_bit_for_bit_in_peft(small_folder, processor, mixed_prompts, tmp_path, dtype):
    """PEFT turns 16-bit adapters into float32 unless told otherwise, which trains and computes something else."""
    model = trained(small_folder, dtype=dtype, **LORA)
    expected = logits(model, mixed_prompts)
    save(model, processor, tmp_path / "out", small_folder, "card")
    base = plain(small_folder, dtype)
    before = logits(base, mixed_prompts)
    again = PeftModel.from_pretrained(base, tmp_path / "out", autocast_adapter_dtype=False).eval()
    assert torch.equal(logits(again, mixed_prompts), expected)
    assert not torch.equal(before, expected)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (small_folder, 2, 6)


def test_an_adapter_folder_alone_is_enough_for_plain_transformers(small_folder, processor, mixed_prompts, tmp_path):
    model = trained(small_folder, **LORA)
    expected = logits(model, mixed_prompts)
    save(model, processor, tmp_path / "out", small_folder, "card")
    assert torch.equal(logits(plain(tmp_path / "out"), mixed_prompts), expected)


def test_a_merged_model_is_the_adapted_one_to_1e_5(small_folder, processor, mixed_prompts, tmp_path):
    model = trained(small_folder, **LORA)
    adapted = logits(model, mixed_prompts)
    merge_and_unload(model)
    expected = logits(model, mixed_prompts)
    save(model, processor, tmp_path / "out", small_folder, "card")
    merged = logits(plain(tmp_path / "out"), mixed_prompts)
    print(f"largest difference {(merged - adapted).abs().max():.1e} of logits up to {adapted.abs().max():.1f}")
    assert (merged - adapted).abs().max() < 1e-5
    assert torch.equal(merged, expected)


def test_weights_given_apart_are_the_ones_that_are_written(small_folder, processor, mixed_prompts, tmp_path):
    """As where the model's own are spread over ranks."""
    for name, options in {"full": FULL, "lora": LORA}.items():
        model, other = trained(small_folder, **options), Backbone(small_folder, **options).load_model().eval()
        gathered = {weight: tensor.clone() for weight, tensor in model.state_dict().items()}  # no longer tied
        save(other, processor, tmp_path / name, small_folder, "card", weights=gathered)
        assert torch.equal(logits(plain(tmp_path / name), mixed_prompts), logits(model, mixed_prompts))
    assert "lm_head.weight" not in load_file(tmp_path / "full" / "model.safetensors")


def test_tokenizer_images_and_generation_settings_come_along(small_folder, processor, tmp_path):
    bounded = PromptProcessor.load("tiny", min_pixels=784, max_pixels=3136)
    for name, options in {"full": FULL, "lora": LORA}.items():
        model = Backbone(small_folder, **options).load_model()
        save_folder(model, bounded, tmp_path / name, small_folder, "the card")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>3 + 4?"
        assert tokenizer(text).input_ids == processor.tokenizer(text).input_ids
        assert tokenizer.chat_template == processor.tokenizer.chat_template
        size = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / name).size
        assert (size["shortest_edge"], size["longest_edge"]) == (784, 3136)
        generation = GenerationConfig.from_pretrained(tmp_path / name)
        assert generation.eos_token_id == model.generation_config.eos_token_id
        assert (tmp_path / name / "README.md").read_text() == "the card"
        assert Backbone(str(tmp_path / name)).load_processor().image_processor.size["longest_edge"] == 3136


# -- adapter folders as backbones --------------------------------------------------------------------------------------


@pytest.fixture
def adapter(small_folder, processor, tmp_path):
    """A trained model and the adapter folder written from it."""
    model = trained(small_folder, **LORA)
    save_folder(model, processor, tmp_path / "adapter", small_folder, "card")
    return model, str(tmp_path / "adapter")


def test_an_adapter_folder_goes_on_being_trained_or_is_merged(adapter, mixed_prompts):
    model, path = adapter
    again = Backbone(path, **LORA).load_model()
    own = dict(model.named_parameters())
    for name, weight in again.named_parameters():
        assert torch.equal(weight, own[name])
        assert weight.requires_grad == own[name].requires_grad
    merged = Backbone(path).load_model().eval()
    assert all(weight.requires_grad for weight in merged.parameters())
    assert (logits(merged, mixed_prompts) - logits(model, mixed_prompts)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(rank=4, alpha=6, parts=LORA["lora"].parts), r"an adapter with r=2, but backbone.lora asks for 4"),
        (Lora(rank=2, alpha=2, parts=LORA["lora"].parts), r"lora_alpha=6, but backbone.lora asks for 2"),
        (Lora(rank=2, alpha=6), r"\d+ weights are in the file or in the model only, such as model.visual"),
    ],
)
def test_other_settings_than_the_adapters_are_refused(adapter, lora, message):
    with pytest.raises(ValueError, match=message):
        Backbone(adapter[1], tuning="lora", lora=lora).load_model()


def test_an_adapter_of_tiny_lies_beside_its_base(mixed_prompts, processor, tmp_path):
    """Nobody can get ``tiny`` by that name, so the folder holds it too; here the name is enough."""
    model = trained("tiny", **LORA)
    save_folder(model, processor, tmp_path / "out", "tiny", "card")
    base = plain(tmp_path / "out" / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert torch.equal(logits(again, mixed_prompts), logits(model, mixed_prompts))
    ours = Backbone(str(tmp_path / "out"), **LORA).load_model().eval()
    assert torch.equal(logits(ours, mixed_prompts), logits(model, mixed_prompts))


def test_what_is_wrong_with_an_adapter_folder_is_said(adapter, tmp_path):
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    for name, value, message in (
        ("base_model_name_or_path", "/nowhere/model", "its base '/nowhere/model': no config.json there"),
        ("base_model_name_or_path", None, "an adapter of an unknown model"),
        ("peft_type", "IA3", "holds a IA3 adapter; only LoRA"),
    ):
        config.write_text(json.dumps({**settings, name: value}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Backbone(adapter[1], **LORA).load_model()
    config.write_text(json.dumps(settings))
    os.remove(tmp_path / "adapter" / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=f"has no {WEIGHTS_FILE}"):
        Backbone(adapter[1], **LORA).load_model()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
def test_adapters_on_shared_embeddings_are_not_merged(small_folder):
    model = Backbone(small_folder, tuning="lora", lora=Lora(rank=2, targets="lm_head")).load_model()
    with pytest.raises(ValueError, match="shared by embeddings and output matrix"):
        merge_and_unload(model)


# -- weights of a checkpoint, and whole folders ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FROZEN, LORA], ids=["full", "lora"])
def test_all_weights_or_the_trained_ones_are_loaded_and_nothing_less(small_folder, options):
    model = trained(small_folder, **options)
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for weights in (model.state_dict(), {name: model.state_dict()[name] for name in names}):
        again = Backbone(small_folder, **options).load_model()
        load_weights(again, weights, "a.ckpt")
        for name, weight in again.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name])
    one = sorted(names)[0]
    with pytest.raises(ValueError, match=f"a.ckpt: 1 trained weights are missing, such as {one}"):
        load_weights(again, {name: weights[name] for name in names - {one}}, "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt: 1 weights have no place in the model, such as odd"):
        load_weights(again, {**weights, "odd": weights[one]}, "a.ckpt")
    with pytest.raises(ValueError, match=f"a.ckpt: {one} is"):
        load_weights(again, {**weights, one: weights[one][:1]}, "a.ckpt")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "out"

    def fail(part):
        (part / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as part:
        fail(part)
    assert list(folder.parent.iterdir()) == []
    with whole_folder(folder) as part:
        (part / "config.json").write_text("")
    with pytest.raises(FileExistsError, match="out exists already; --overwrite"), whole_folder(folder):
        pass
    with pytest.raises(KeyboardInterrupt), whole_folder(folder, overwrite=True) as part:
        fail(part)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    with whole_folder(folder, overwrite=True) as part:
        (part / "two").write_text("")
    assert [path.name for path in folder.iterdir()] == ["two"]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="all that is in it would be lost"), whole_folder(folder, overwrite=True):
        pass
    assert [path.name for path in folder.iterdir()] == ["two"]


def test_an_adapter_with_the_embedded_base_beside_it_is_the_folder_of_a_model_alone(tmp_path):
    """And may be replaced by the next export; with any other folder in it, or in the base, it may not."""
    base = tmp_path / "out" / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text("")
    (tmp_path / "out" / "adapter_config.json").write_text("")
    refuse_filled(tmp_path / "out", overwrite=True)
    (base / "mine").mkdir()
    with pytest.raises(FileExistsError, match="all that is in it would be lost"):
        refuse_filled(tmp_path / "out", overwrite=True)
