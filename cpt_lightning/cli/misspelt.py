"""A name that nothing has, of an option or of a class: what may have been meant, and which file has it."""

from __future__ import annotations

import pydoc
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from cpt_lightning import callbacks, modules, rewards, rollouts, tasks

ELSEWHERE = {
    "batch_size": "data.prompts_per_step",
    "beta": "model.kl_coef",
    "bf16": "trainer.precision",
    "cutoff_len": "data.max_prompt_tokens",
    "epsilon": "model.clip_low",
    "epsilon_high": "model.clip_high",
    "freeze_vision_tower": "model.backbone.freeze",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "image_max_pixels": "model.backbone.max_pixels",
    "kl_loss_coef": "model.kl_coef",
    "learning_rate": "model.optimizer.lr",
    "lora_alpha": "model.backbone.lora.alpha",
    "lora_r": "model.backbone.lora.rank",
    "loss_type": "model.reduction",
    "lr": "model.optimizer.lr",
    "lr_scheduler_type": "model.lr_scheduler",
    "max_completion_length": "model.sampling.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_steps": "data.steps",
    "model_name_or_path": "model.backbone.path",
    "num_generations": "model.group_size",
    "num_iterations": "model.passes_per_rollout",
    "num_train_epochs": "data.passes",
    "optim": "model.optimizer",
    "output_dir": "run_dir",
    "per_device_train_batch_size": "data.prompts_per_step",
    "ppo_mini_batch_size": "model.updates_per_rollout",
    "report_to": "trainer.logger",
    "scale_rewards": "model.advantage",
    "use_peft": "model.backbone.tuning",
    "warmup_ratio": "model.lr_scheduler",
    "warmup_steps": "model.lr_scheduler",
}
"""What other trainers call an option, as in docs/extending.md."""

_OPTION = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does not accept option|Subcommand '\w+' does not accept option|Option) "
    r"'(?P<option>[\w.]+)'|unrecognized arguments: --(?P<argument>[\w.]+)"
)
_WITHIN = re.compile(r"class_path(?: |=)'([\w.]+)'")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\w+)")


def refused_option(message: str) -> str | None:
    """The option that a message of jsonargparse (4.53) is about, if it is about a name.

    >>> refused_option("Subcommand 'fit' does not accept option 'data.stepz'")
    'data.stepz'
    >>> refused_option("Group 'backbone' does not accept option 'pth' (given: {'backbone': {'pth': 3}})")
    'backbone.pth'
    """
    found = _OPTION.search(message)
    return found and ".".join(filter(None, [found["group"], found["option"] or found["argument"]]))


def did_you_mean(message: str, options: Iterable[str]) -> str:
    """A question that ends the message, about the nearest name that there is; empty if none is near.

    Args:
        message: Of jsonargparse, of an option or a class.
        options: All options of the verb; those of a class that the message names are looked up.

    >>> did_you_mean("Subcommand 'fit' does not accept option 'data.stepz'", ["data.steps", "data.passes"])
    '; did you mean data.steps?'
    >>> did_you_mean("unrecognized arguments: --steps 3", ["data.steps", "data.passes"])
    '; did you mean data.steps?'
    >>> did_you_mean("Expected a dot import path string: Drifft", [])
    '; did you mean Drift?'
    """
    within, unknown_class = _WITHIN.findall(message), _NO_CLASS.search(message)
    if name := refused_option(message):
        near = _nearest(name, _options_of_class(within[-1]) if within else [*options, *_options_of_modules()])
    elif unknown_class:
        near = _nearest(unknown_class[1], _classes())
    else:
        near = None
    return f"; did you mean {near}?" if near else ""


def file_with(option: str, files: Sequence[str]) -> str | None:
    """The last of the files of options that has an option, which is the one that counts."""
    return next((file for file in reversed(files) if _has(yaml.safe_load(Path(file).read_text()), option)), None)


def _has(options: object, option: str) -> bool:
    """Whether a dotted name leads to something in nested options."""
    for key in option.split("."):
        if not (isinstance(options, dict) and key in options):
            return False
        options = options[key]
    return True


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """Looked for beside it, then anywhere, then by the last part alone, where somebody left out what it is of.

    Before all that as another trainer's name.
    """
    known = list(known)
    group, _, last = name.rpartition(".")
    if last in ELSEWHERE:
        return ELSEWHERE[last]
    by_last = {full.rpartition(".")[2]: full for full in reversed(known)}
    beside = {full.rpartition(".")[2]: full for full in known if full.rpartition(".")[0] == group}
    anywhere = {full: full for full in known}
    for given, names, cutoff in ((last, beside, 0.7), (name, anywhere, 0.85), (last, by_last, 0.8)):
        for near in get_close_matches(given, names, n=1, cutoff=cutoff):
            return names[near]
    return None


def options_of(parser: ArgumentParser) -> list[str]:
    """Names of a parser's options, but of those within classes that are chosen."""
    return [action.dest for action in parser._actions]


def _options_of_class(path: str) -> list[str]:
    parser = ArgumentParser()
    parser.add_class_arguments(pydoc.locate(path), fail_untyped=False)
    return options_of(parser)


def _options_of_modules() -> list[str]:
    """Of the objectives, none of which may have been chosen yet where an option of the verb is looked for."""
    paths = [f"{modules.__name__}.{name}" for name in ("RFT", "SFT", "MultiTask")]
    return [f"model.{option}" for path in paths for option in _options_of_class(path)]


def _classes() -> list[str]:
    return [name for package in (modules, callbacks, tasks, rewards, rollouts) for name in package.__all__]
