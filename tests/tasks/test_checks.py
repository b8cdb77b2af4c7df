"""What the parser of ``cpt`` would refuse is refused of Python too, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpt_lightning.callbacks import EWC, L2, ModelMerging, RolloutFilter, StreamPictures, TaskExport
from cpt_lightning.models import Backbone, Lora, Quantization
from cpt_lightning.modules import RFT, SFT, MultiTask, OnPolicySFT
from cpt_lightning.rollouts import Sampling

WORDS = [
    (Backbone, "backbone.tuning", "Full"),  # got adapters, as all but "full" did
    (Backbone, "backbone.dtype", "bf16"),
    (Lora, "lora.along_stream", "each"),
    (Quantization, "quantization.quant_type", "nf3"),
    (Quantization, "quantization.compute_dtype", "bf16"),
    (SFT, "reduction", "mean"),
    (SFT, "reference", "start"),
    (RFT, "importance_sampling", "tokens"),
    (OnPolicySFT, "reduction", "mean"),
    (MultiTask, "objective", "SFT"),
    (MultiTask, "sft_reduction", "mean"),
    (EWC, "EWC: completions", "sample"),  # learned from targets, as all but "samples" did
    (EWC, "EWC: anchors", "all"),
    (L2, "L2: anchor", "start"),
    (ModelMerging, "ModelMerging: method", "mean"),
    (ModelMerging, "ModelMerging: start", "last"),
    (RolloutFilter, "filter.mode", "solveable"),
    (TaskExport, "export.when", "always"),
    (StreamPictures, "StreamPictures: when", "always"),
]


@pytest.mark.parametrize(("kind", "option", "word"), WORDS, ids=lambda value: str(value).rpartition(".")[2])
def test_a_word_that_an_option_does_not_know_is_refused_with_those_that_it_knows(kind, option, word):
    name = option.split(": ")[-1].split(".")[-1]
    with pytest.raises(ValueError, match=f"{option}='{word}' is unknown; there are "):
        kind(**{name: word})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Backbone(freeze="vision_tower"), "backbone.freeze='vision_tower' is a str; give a list of vision_"),
        (lambda: Backbone(gradient_checkpointing=True), "backbone.gradient_checkpointing=True is a bool; give a list"),
        (lambda: Backbone(lora={"rank": 4}), "backbone.lora={'rank': 4} is a dict; give a Lora"),
        (lambda: Lora(parts="projector"), "lora.parts='projector' is a str; give a list"),
        (lambda: SFT(backbone="tiny"), "backbone='tiny' is a str; give a Backbone"),
        (
            lambda: SFT(evaluation={"temperature": 0}),
            "evaluation={'temperature': 0} is a dict; give a Sampling",
        ),
        (lambda: SFT(attempts=4), "attempts=4 is an int; give an Attempts"),
        (lambda: RFT(sampling=64), "sampling=64 is an int; give a Sampling"),
        (lambda: SFT(optimizer="adamw"), "optimizer='adamw' is a str; give what makes one, such as lambda"),
        (lambda: SFT(optimizer=_optimizer()), "is an AdamW; give what makes one, such as lambda"),
        (lambda: SFT(lr_scheduler="cosine"), "lr_scheduler='cosine' is a str; give what makes one"),
    ],
)
def test_an_object_of_another_class_is_refused_with_the_class(make, said):
    with pytest.raises(TypeError) as error:
        make()
    assert said in str(error.value)


def test_a_part_that_the_backbone_does_not_have_is_refused():
    with pytest.raises(ValueError, match="backbone.freeze='vision' is unknown; there are vision_tower, projector, lan"):
        Backbone(freeze=["vision"])


@pytest.mark.parametrize("size", ["8", 2.5])
def test_a_count_that_is_no_whole_number_is_refused(size):
    with pytest.raises(ValueError, match="group_size=.* must be a whole number"):
        RFT(group_size=size, sampling=Sampling(4))


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed=-1 must not be negative"):
        SFT(seed=-1)


def test_a_path_may_be_one_of_pathlib(small_folder):
    assert Backbone(Path(small_folder)) == Backbone(str(small_folder))


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
