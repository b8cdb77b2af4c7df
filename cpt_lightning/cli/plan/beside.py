"""What a run computes beside steps and evaluations: what methods and measurements look at, and the filter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning import Callback

from cpt_lightning.callbacks import EWC, GradientRisk, WeightDistance
from cpt_lightning.callbacks.analysis.measuring import Measuring
from cpt_lightning.callbacks.filter.judge import Judge
from cpt_lightning.cli.plan.engine import WeightlessEngine
from cpt_lightning.cli.plan.phases import Phase
from cpt_lightning.cli.plan.standing import Standing
from cpt_lightning.cli.plan.weights import pixel_bytes
from cpt_lightning.modules.evaluating import DRAWN_AT_ONCE


def phases_beside(
    engine: WeightlessEngine, standing: Standing, callbacks: Sequence[Callback], judge: Judge | None
) -> list[Phase]:
    """A phase of each callback that looks at the model, and of the filter if it judges."""
    phases = []
    for callback in callbacks:
        if isinstance(callback, EWC | GradientRisk | WeightDistance) and torch.float32 in callback.sets:
            phases.append(_fisher(engine, standing, callback))
        if isinstance(callback, Measuring):
            phases.append(_measurement(engine, standing, callback))
    return phases if judge is None else [*phases, _filter(engine, standing, judge)]


def _fisher(engine: WeightlessEngine, standing: Standing, callback: EWC | GradientRisk | WeightDistance) -> Phase:
    """The model answers, and goes back row by row; the new estimate is there beside the old ones."""
    sampling, prefix = callback.sampling, engine.module.evaluation.prefix
    rows = engine.prompts(callback.num_rows, prefix if sampling else "")
    with engine.exchanging_block_by_block():
        with engine.counting() as live:
            if sampling is not None:
                engine.sample(rows.select(range(min(DRAWN_AT_ONCE, len(rows)))), 1, sampling)
            num_tokens = engine.workload.target_tokens if sampling is None else sampling.max_new_tokens
            engine.go_back(rows.select([0]), 1, num_tokens)
        estimate = standing.share(torch.float32.itemsize * standing.num_trainable)
        kinds = {"new_estimate": estimate}
        if isinstance(callback, WeightDistance):
            kinds["optimizer"] = 0  # before the first step
        return standing.backward_phase(type(callback).__name__, live.peak, rows, **kinds)


def _measurement(engine: WeightlessEngine, standing: Standing, callback: Measuring) -> Phase:
    """This rank's rows of one task, answered and compared with the base's."""
    rows = engine.prompts(engine.devices.share(callback.num_rows), engine.module.evaluation.prefix)
    with engine.counting() as live:
        engine.compare_with_base(rows, callback.sampling)
    return standing.phase(
        type(callback).__name__,
        ("policy", "base") if standing.has_copy_of_base else ("policy",),
        gradients=standing.left_gradients,
        gradient_buckets=standing.buckets,
        activations_and_log_probs=live.peak,
        batch=pixel_bytes(rows),
    )


def _filter(engine: WeightlessEngine, standing: Standing, judge: Judge) -> Phase:
    """A batch of rows, each answered several times."""
    sampling = judge.sampling_for(engine.module)
    rows = engine.prompts(engine.devices.share(engine.workload.eval_prompts_per_step), sampling.prefix)
    with engine.counting() as live:
        cache = engine.sample(rows, judge.completions_per_row, sampling)
    return standing.phase(
        "filter",
        gradients=standing.left_gradients,
        gradient_buckets=standing.buckets,
        KV_cache=cache,
        activations_and_log_probs=live.peak - cache,
        batch=pixel_bytes(rows),
    )
