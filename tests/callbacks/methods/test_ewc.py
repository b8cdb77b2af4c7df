"""The Fisher information of a linear classifier by hand, how tasks add up, and what the penalty does to a model."""

from __future__ import annotations

import pytest
import torch

from cpt_lightning.callbacks import EWC
from cpt_lightning.models import Backbone
from cpt_lightning.modules import RFT, SFT
from cpt_lightning.rollouts import Sampling
from tests.fakes import NUM_FEATURES, LinearModule, number_stream
from tests.naive import naive_logprobs
from tests.training import with_examples


@pytest.mark.parametrize("completions", ["samples", "targets"])
def test_the_fisher_information_of_a_linear_classifier(completions):
    """d log p(y) / d W = (onehot(y) - p) x': squared per row, then averaged. Drawn answers are odd in this fake."""
    module, stream = LinearModule(), number_stream()
    torch.nn.init.normal_(module.layer.weight)
    stream.processor = module.processor
    batch = stream.rows_of_stage(0, 7)
    fisher = EWC(completions=completions).fisher(module, batch, stage=0)
    expected = torch.zeros(2, NUM_FEATURES)
    for ids, example in zip(batch.prompts.input_ids, batch.prompts.examples, strict=True):
        features = torch.sin(ids[-1] * torch.arange(1.0, 1 + NUM_FEATURES))
        odd = 1 if completions == "samples" else int(example.gold)
        residual = torch.eye(2)[odd] - module.layer(features).softmax(dim=0)
        expected += residual.detach()[:, None].square() * features.square() / 7
    torch.testing.assert_close(fisher["layer.weight"], expected)
    assert module.layer.weight.grad is None, "nothing is left for the next step"


def tensor(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.tensor([value])}


@pytest.mark.parametrize(
    "options, precision, anchor",
    [
        ({}, 4.0, 5.0),
        ({"decay": 0.5}, 3.5, 5.0),
        ({"anchors": "every_task"}, 4.0, 4.0),
        ({"anchors": "every_task", "decay": 0.5}, 3.5, (0.5 * 1 + 3 * 5) / 3.5),
    ],
)
def test_tasks_add_up(options, precision, anchor):
    """F = 1 at weight 1, then F = 3 at weight 5. Two penalties (w - 1)^2 + 3 (w - 5)^2 pull like 4 (w - 4)^2."""
    ewc = EWC(**options)
    ewc.remember(tensor(1.0), tensor(1.0))
    ewc.remember(tensor(3.0), tensor(5.0))
    assert ewc.kept["precision"]["weight"].item() == pytest.approx(precision)
    assert ewc.kept["anchor"]["weight"].item() == pytest.approx(anchor)


def test_a_weight_that_no_task_depends_on_is_free():
    ewc = EWC(anchors="every_task")
    ewc.remember(tensor(0.0), tensor(1.0))
    ewc.remember(tensor(0.0), tensor(5.0))
    assert ewc.kept["precision"]["weight"].item() == 0
    assert torch.isfinite(ewc.kept["anchor"]["weight"]).all()


def test_the_gradient_is_strength_times_fisher_times_distance():
    """2 * F * (w - anchor) = 2 * [1, 0] * [3, 3] on top of the loss's 1; the penalty is 2 / 2 * 1 * 9."""
    module = torch.nn.Linear(2, 1, bias=False)
    module.weight.data.fill_(4.0)
    module.weight.grad = torch.ones(1, 2)
    ewc = EWC(strength=2.0)
    ewc.remember({"weight": torch.tensor([[1.0, 0.0]])}, {"weight": torch.ones(1, 2)})
    ewc.on_before_optimizer_step(None, module, None)
    assert module.weight.grad.tolist() == [[7.0, 1.0]]
    assert ewc._penalty.item() == 9.0


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_fisher_information_of_the_backbone(small_folder, processor, mixed_prompts, tuning):
    """Against naive forwards of one row after the other; with LoRA it is that of the adapters alone."""
    module = SFT(backbone=Backbone(small_folder, tuning=tuning))
    module.configure_model()
    batch = with_examples(mixed_prompts, processor)
    fisher = EWC(completions="targets").fisher(module, batch, stage=0)
    parameters = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    assert fisher.keys() == parameters.keys()
    assert all("lora_" in name for name in fisher) == (tuning == "lora")
    expected = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
    for row in range(len(batch)):
        one = batch.select([row])
        logp = naive_logprobs(module.model, one.prompts, one.targets).sum()
        gradients = torch.autograd.grad(logp, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            expected[name] += 0 if gradient is None else gradient.square() / len(batch)
    for name in fisher:
        torch.testing.assert_close(fisher[name], expected[name], rtol=1e-3, atol=1e-5)


def test_the_policys_own_samples_are_drawn_by_seed_key_and_place(small_folder, processor, mixed_prompts):
    """However many are drawn at once."""
    module = RFT(backbone=Backbone(small_folder), seed=3)
    module.configure_model()
    batch, sampling = with_examples(mixed_prompts, processor), Sampling(max_new_tokens=5)
    batch = batch.select([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    texts = [processor.decode(module.drawn(batch, sampling, *key).targets) for key in ((0, 1), (0, 1), (0, 2))]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len({texts[0][0], texts[0][4], texts[0][8]}) > 1, "a row that comes twice draws twice"
    assert processor.decode(module.drawn(batch.select([0, 1, 2]), sampling, 0, 1).targets) == texts[0][:3]


@pytest.mark.parametrize(
    "options, message", [({"num_rows": 0}, "EWC: num_rows=0"), ({"decay": 2.0}, "decay=2.0"), ({"strength": -1}, "EWC")]
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EWC(**options)
