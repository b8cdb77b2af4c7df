"""The few options by which runs are told apart, and the figures by which they are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace

NUMBERS = {
    "lr": "model.init_args.optimizer.init_args.lr",
    "weight_decay": "model.init_args.optimizer.init_args.weight_decay",
    "group_size": "model.init_args.group_size",
    "kl_coef": "model.init_args.kl_coef",
    "temperature": "model.init_args.sampling.temperature",
    "prompts_per_step": "data.prompts_per_step",
    "replay_ratio": "data.replay.ratio",
    "seed": "seed_everything",
}
"""Options with a number, by the name that they are shown under."""

TEXTS = {
    "objective": "model.class_path",
    "backbone": "model.init_args.backbone.path",
    "tuning": "model.init_args.backbone.tuning",
    "optimizer": "model.init_args.optimizer.class_path",
    "advantage": "model.init_args.advantage",
    "policy_loss": "model.init_args.policy_loss",
    "stages": "data.stages",
    "steps": "data.steps",
    "passes": "data.passes",
    "style": "data.style",
    "target": "data.target",
    "rollouts": "data.rollouts",
    "filter": "filter.mode",
    "methods": "trainer.callbacks",
    "precision": "trainer.precision",
}
"""Options with a name or several."""

METRICS = tuple(
    f"continual/{name}"
    for name in ("average_accuracy", "learning", "forgetting_measure", "worst_dip", "probes_mean_change")
)
"""Scalars of every run, whose last values are compared."""


def hparams_of(config: Namespace) -> dict[str, float | str]:
    """What a run's configuration says of them; what it leaves open, or its objective does not have, is left out."""
    found = {name: config.get(key) for name, key in {**TEXTS, **NUMBERS}.items()}
    given = {name: value for name, value in found.items() if value is not None and value != []}
    return {name: float(value) if name in NUMBERS else _text(value) for name, value in given.items()}


def _text(value: Any) -> str:
    """A class by its name alone, a list by its parts.

    >>> _text([{"class_path": "cpt_lightning.callbacks.EWC", "init_args": {"strength": 100.0}}])
    'EWC'
    >>> _text(["a", ["b", "c"]]), _text({"a": 10, "b": 20})
    ('a, b+c', 'a=10, b=20')
    """
    if isinstance(value, list):
        return ", ".join("+".join(each) if isinstance(each, list) else _text(each) for each in value)
    if isinstance(value, (Mapping, Namespace)):
        parts = value.as_dict() if isinstance(value, Namespace) else dict(value)
        if "class_path" in parts:
            return _text(parts["class_path"])
        return ", ".join(f"{name}={_text(part)}" for name, part in parts.items())
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).removeprefix("cpt_lightning.modules.").removeprefix("cpt_lightning.callbacks.")
