"""The proposition's regression by hand, and the gradients of its test against those of the module's own loss."""

from __future__ import annotations

import json
import sys
from functools import partial

import gradient_risk
import numpy as np
import pytest
import torch
from regression import regression, with_intervals

from cpt_lightning.callbacks.methods.fisher import fisher_of_answers
from cpt_lightning.callbacks.methods.fisher import gradient_risk as risk_of_gradients
from cpt_lightning.functional import leave_one_out_advantages, token_weights
from cpt_lightning.models import Backbone
from cpt_lightning.modules import RFT
from cpt_lightning.modules.rft import Prepared
from cpt_lightning.rollouts import Sampling
from cpt_lightning.types import Rollout
from tests.training import with_examples


def test_a_regression_by_hand():
    """x = 1, 2, 3; y = 2, 3, 7: means 2 and 4; Sxy = 5, Sxx = 2, Syy = 14: slope 5/2, intercept -1, R^2 = 25/28."""
    found = regression(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 7.0]))
    assert [found[name] for name in ("ratio", "slope", "intercept", "r2")] == pytest.approx([2, 2.5, -1, 25 / 28])


def test_a_power_law_is_straight_in_logarithms_and_zeros_are_left_out():
    found = regression(np.array([0.0, 1.0, 2.0, 4.0, 5.0]), np.array([3.0, 5.0, 20.0, 80.0, 0.0]))
    assert (found["log_slope"], found["log_r2"]) == pytest.approx((2, 1))


def test_intervals_hold_the_truth_and_shrink_with_the_square_root_of_the_pairs():
    """y = 3 x + noise of standard deviation 1, x uniform: the slope's standard error is sqrt(12 / n)."""
    random, widths = np.random.default_rng(0), []
    for count in (100, 1600):
        x = random.random(count)
        value, low, high = with_intervals(x, 3 * x + random.normal(size=count))["slope"]
        assert low < 3 < high
        assert low < value < high
        widths.append(high - low)
        assert high - low == pytest.approx(2 * 1.96 * (12 / count) ** 0.5, rel=0.2)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.2)


def test_what_does_not_vary_explains_nothing():
    assert regression(np.ones(3), np.array([1.0, 2.0, 3.0]))["r2"] == 0


def test_the_groups_gradient_is_that_of_the_modules_loss(small_folder, processor, mixed_prompts):
    """Leave-one-out advantages, token sums over 6 tokens: the loss's gradient is -1/6 of ``mean_i A_i grad log p_i``.
    Of a completion A_i^2 R(grad log p_i) counts; the mean of A_i^2 is 4/3 times the variance of the rewards."""
    module = RFT(backbone=Backbone(small_folder), group_size=4, sampling=Sampling(max_new_tokens=6))
    module.configure_model()
    module.eval()
    rows = with_examples(mixed_prompts, processor)
    at_risk = [module.drawn(rows, module.sampling, number) for number in range(2)]
    risks, batch = gradient_risk.Risks(module, at_risk), rows.select([0])
    found = risks.of_prompt(batch, {"bare": batch})
    completions, texts, scores = module.attempt(batch.prompts, 4, module.sampling)
    rewards = torch.tensor([[score["total"] for score in scores]])
    advantages = leave_one_out_advantages(rewards)
    assert found["variance"] > 0
    assert advantages.square().mean().item() == pytest.approx(4 / 3 * found["variance"])

    rollout = Rollout(batch.prompts, completions, texts, rewards, {"total": rewards})
    prepared = Prepared(advantages, torch.ones(1), completions.mask)
    weigh = partial(token_weights, reduction="constant", constant=6, num_sequences=4, num_tokens=None)
    fisher = fisher_of_answers(module, ((number, rows) for number in range(2)), module.sampling)
    module.loss(rollout, prepared, [0], weigh)[0].backward()
    of_loss = 36 * risk_of_gradients(module, fisher).item()
    assert found["rloo_group.diagonal.sum"] == pytest.approx(of_loss, rel=1e-3)
    gradient = -6 * torch.cat([weight.grad.flatten() for weight in module.parameters()])
    full = torch.stack([(score @ gradient).square() for score in risks.scores]).mean().item()
    assert found["rloo_group.full.sum"] == pytest.approx(full, rel=1e-3)

    gradients = risks.gradients(batch, completions)
    for kind, each in risks(gradients).items():
        assert found[f"own.{kind}.sum"] == pytest.approx(each.mean().item())
        weighed = advantages[0].square() * each
        assert found[f"rloo_completion.{kind}.sum"] == pytest.approx(weighed.mean().item())
        per_token = (weighed / completions.lengths.square()).mean().item()
        assert found[f"rloo_completion.{kind}.mean"] == pytest.approx(per_token)
        for scale in ("sum", "mean"):
            rloo, dr_grpo = (found[f"{name}_group.{kind}.{scale}"] for name in ("rloo", "dr_grpo"))
            assert dr_grpo == pytest.approx(rloo * (3 / 4) ** 2, rel=1e-4)
    one = (risks.gradients(batch, batch.targets)[0] / batch.targets.lengths)[None]
    assert found["bare.full.mean"] == pytest.approx(risks(one)["full"].item(), rel=1e-4)


def test_the_script_runs_after_four_tasks(monkeypatch, tmp_path, capsys):
    out = tmp_path / "record.json"
    options = ["--learned", "4", "--prompts", "3", "--fisher_rows", "1", "--group_size", "4", "--out", str(out)]
    monkeypatch.setattr("regression.NUM_RESAMPLES", 20)
    monkeypatch.setattr(sys, "argv", ["gradient_risk", *options])
    gradient_risk.main()
    record = json.loads(out.read_text())
    assert record["summary"]["num_prompts"] == 3
    assert len(record["tests"]) == 2 * 2 * 2 * 3 * 3
    assert len((tmp_path / "record.csv").read_text().splitlines()) == 4
    assert "| full | sum | completion | rloo | bare |" in capsys.readouterr().out
