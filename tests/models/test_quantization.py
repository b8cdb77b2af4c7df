"""Four-bit backbones: the same numbers as plain transformers and PEFT, and nothing but adapters that moves."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.models import Backbone, Lora, Quantization, load_backbone
from cpt_lightning.models.adapters import adapter_weights
from cpt_lightning.models.flops import FlopCounter
from cpt_lightning.modules import RFT, SFT
from cpt_lightning.rollouts import Sampling, completion_logprobs
from tests.naive import naive_logprobs, random_completions
from tests.training import fit, sgd, with_examples

FLOAT32 = Quantization(compute_dtype="float32")
PARTS = ["language_model", "vision_tower", "projector"]


def randomized(model):
    """The model with adapters that say something: B is 0 when it is fresh, and DoRA's magnitudes are the weights'."""
    generator = torch.Generator().manual_seed(1)
    for weight in adapter_weights(model):
        noise = 0.1 * torch.randn(weight.shape, generator=generator)
        weight.data.copy_(noise if weight.ndim == 2 else weight + noise)
    return model.train()  # in eval mode bitsandbytes repacks four-bit weights on some CPUs, and fails for small layers


def plain_peft(folder, tuning, config):
    """The same by transformers and PEFT alone."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.visual"],
    )
    options = {"quantization_config": quantized} if tuning == "qlora" else {}
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv", "proj"]
    targets = rf"model\.(language_model|visual)\..*\.({'|'.join(names)})(?<!patch_embed\.proj)|.*merger\.mlp\.[02]"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **config)
    return randomized(inject_adapter_in_model(lora, model))


@pytest.mark.parametrize(
    ("tuning", "options"),
    [("lora", {}), ("lora", {"use_rslora": True}), ("lora", {"use_dora": True}), ("qlora", {})],
    ids=["lora", "rslora", "dora", "qlora"],
)
def test_logprobs_equal_those_of_plain_transformers_and_peft(small_folder, mixed_prompts, tuning, options):
    """To 1e-5, four bits included: weights and unpacking are the same. Adapters bind: without them it is 1e-2 off."""
    lora = Lora(rank=4, alpha=8, parts=PARTS, **options)
    model, _ = load_backbone(small_folder, tuning=tuning, lora=lora, quantization=FLOAT32)
    randomized(model)
    completions = random_completions(4, 3, 100, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = naive_logprobs(plain_peft(small_folder, tuning, options), mixed_prompts, completions)
        found = completion_logprobs(model, mixed_prompts, completions)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        model.disable_adapters()
        without = completion_logprobs(model, mixed_prompts, completions)
    assert (without - expected).abs().max() > 1e-2


def test_four_bits_are_the_language_models_linear_layers_and_near_the_whole(small_folder, mixed_prompts):
    from bitsandbytes.nn import Linear4bit

    model, _ = load_backbone(small_folder, tuning="qlora", quantization=FLOAT32)
    quantized = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert len([name for name in quantized if "language_model.layers" in name]) == len(quantized) == 2 * 7
    plain, _ = load_backbone(small_folder)
    completions = random_completions(4, 3, 100, torch.Generator().manual_seed(0))
    with torch.no_grad():
        off = naive_logprobs(model, mixed_prompts, completions) - naive_logprobs(plain, mixed_prompts, completions)
    assert 1e-4 < off.abs().mean() < 0.5


def test_flops_count_weights_and_not_the_bytes_they_are_packed_in(small_folder):
    shares = [
        FlopCounter(load_backbone(small_folder, tuning=tuning)[0]).text_passes.weight_gradient
        for tuning in ("lora", "qlora")
    ]
    assert shares[0] == shares[1] > 0


def test_sharded_strategies_are_refused_before_anything_loads():
    import lightning as L
    from lightning.pytorch.strategies import ModelParallelStrategy

    module = SFT(backbone=Backbone("nowhere", tuning="qlora"))
    module.trainer = L.Trainer(accelerator="cpu", devices=1, strategy=ModelParallelStrategy(), logger=False)
    with pytest.raises(
        ValueError, match=r"qlora: ModelParallelStrategy would split.*set trainer.strategy to auto or ddp"
    ):
        module.configure_model()


ARMS = {
    "full": {"freeze": ["vision_tower", "projector"]},
    "language model frozen": {"freeze": ["language_model"]},
    "lora": {"tuning": "lora"},
    "lora on the tower": {"tuning": "lora", "lora": Lora(parts=["vision_tower"])},
    "dora": {"tuning": "lora", "lora": Lora(use_dora=True)},
    "qlora": {"tuning": "qlora"},
    "qlora fp4": {"tuning": "qlora", "quantization": Quantization("fp4", double_quant=False), "dtype": "bfloat16"},
}


@pytest.mark.parametrize("objective", ["sft", "rft"])
@pytest.mark.parametrize("arm", ARMS)
def test_what_is_frozen_stays_bit_identical(small_folder, processor, mixed_prompts, arm, objective):
    """Rollouts, updates and the reference of a KL term leave all but the trained weights as they were."""
    options = {"backbone": Backbone(small_folder, **ARMS[arm]), "optimizer": sgd}
    rollouts = {"group_size": 4, "sampling": Sampling(max_new_tokens=4), "kl_coef": 0.1}
    module = SFT(**options) if objective == "sft" else RFT(**rollouts, **options)
    module.configure_model()
    before = {name: weight.clone() for name, weight in module.model.state_dict().items()}
    trained = {name for name, weight in module.model.named_parameters() if weight.requires_grad}
    fit(module, [with_examples(mixed_prompts, processor)] * 3)
    after = module.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    tied = {"lm_head.weight"}
    assert changed
    assert changed - tied <= trained
    assert all(after[name].dtype == before[name].dtype for name in before)
