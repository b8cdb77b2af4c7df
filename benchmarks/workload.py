"""What a benchmark of a step asks of every arm: model, prompts, lengths, tuning, loss and optimizer."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from presets import PRESETS, PresetBackbone

from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.types import Example

IMAGE_SHARE = 0.8
TOKEN_SIDE = 28
"""Pixels along a side of what becomes one image token."""
WORDS = ["the", "red", "circle", "is", "left", "blue", "green", "one", "it"]
"""A token each for the embedded base's tokenizer, at the beginning of a text too."""
CLIP_LOW, CLIP_HIGH, MAX_GRAD_NORM = 0.2, 0.3, 1.0


@dataclass(frozen=True)
class Setup:
    """What every step has, the same for every arm.

    Args:
        preset: The model.
        dtype: Of weights and computation.
        device: ``cpu`` or ``cuda``.
        prompts: B, rows of a step.
        threads: CPU threads of an arm.
        tuning: ``full`` or ``lora``.
        gradient_checkpointing: Whether activations are computed again in backward.
        steps: Timed steps of a round.
        warm_up: Steps before them.
    """

    preset: str = "cpu-6m"
    dtype: str = "float32"
    device: str = "cpu"
    prompts: int = 4
    threads: int = 2
    tuning: str = "full"
    gradient_checkpointing: bool = False
    steps: int = 5
    warm_up: int = 2

    @classmethod
    def of(cls, options: argparse.Namespace, **changes) -> Self:
        """What parsed options ask for, but for the changes."""
        chosen = vars(options) | changes
        return cls(**{field.name: chosen[field.name] for field in fields(cls)})

    @property
    def num_steps(self) -> int:
        """Steps of a round."""
        return self.warm_up + self.steps

    @property
    def backbone(self) -> PresetBackbone:
        """What loads its model and processor."""
        parts = ["vision_tower", "language_model"] if self.gradient_checkpointing else []
        return PresetBackbone(
            self.preset, tuning=self.tuning, dtype=self.dtype, device=self.device, gradient_checkpointing=parts
        )


@dataclass(frozen=True)
class Workload(Setup):
    """A step with rollouts.

    Args:
        prompt_tokens: P, about four fifths of them an image's.
        group_size: G, completions of each prompt.
        new_tokens: T, tokens of every completion.
        micro_prompts: Prompts whose groups go through backward at once; all by default.
    """

    prompt_tokens: int = 315
    group_size: int = 8
    new_tokens: int = 32
    micro_prompts: int | None = None

    @property
    def micro_size(self) -> int:
        """Completions that go through backward at once."""
        return (self.micro_prompts or self.prompts) * self.group_size

    @property
    def title(self) -> str:
        """Its sizes, as a heading."""
        sizes = f"{self.prompts} prompts of {self.prompt_tokens} tokens x {self.group_size} x {self.new_tokens}"
        return f"{self.preset}, {sizes}"

    def examples(self, processor: PromptProcessor) -> list[Example]:
        """Its B prompts, each a question about a picture of its own."""
        rows = [question(seed, self.prompt_tokens, processor) for seed in range(self.prompts)]
        return [
            Example("benchmark", f"row {number}", chat(text), gold="", reward=reward, images=[picture])
            for number, (text, picture) in enumerate(rows)
        ]

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Sees to it that an arm sampled what was asked for.

        Raises:
            RuntimeError: There are more or fewer completions, or shorter or longer ones.
        """
        expected = [self.new_tokens] * (self.prompts * self.group_size)
        if list(lengths) != expected:
            raise RuntimeError(f"completions of {list(lengths)} tokens, where {expected} were asked for")


def make_optimizer(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every arm; so slow that the weights stay what they are."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-7, weight_decay=0.0, fused=True)


def question(seed: int, num_tokens: int, processor: PromptProcessor) -> tuple[str, Image.Image]:
    """Words about a picture of noise; as a chat they have exactly ``num_tokens`` tokens.

    Raises:
        ValueError: So few tokens leave no room for a picture.
    """
    random = np.random.default_rng(seed)
    height = int((IMAGE_SHARE * num_tokens) ** 0.5)
    width = int(IMAGE_SHARE * num_tokens) // max(1, height)
    picture = Image.fromarray(random.integers(0, 256, (height * TOKEN_SIDE, width * TOKEN_SIDE, 3), dtype=np.uint8))
    num_words = num_tokens - int(processor.encode([chat("")], [[picture]]).lengths)
    if num_words < 1:
        raise ValueError(f"prompt_tokens={num_tokens} has no room for words beside a picture; take 60 or more")
    return " ".join(random.choice(WORDS, num_words)), picture


def chat(text: str) -> list[dict]:
    """The messages that ask ``text`` about one picture."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def reward(completion: str, gold: str | list[str]) -> dict[str, float]:
    """A hash of the text, so that every group has something to learn and no arm may skip one."""
    score = zlib.crc32(completion.encode()) / 2**32
    return {"total": score, "accuracy": score}


def step_parser(doc: str | None, script: str, prompts: int = Setup.prompts) -> argparse.ArgumentParser:
    """The options of a setup, of its rounds, and of the record that a script writes."""
    path = Path(script)
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--preset", choices=PRESETS, default=Setup.preset)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default=Setup.dtype)
    options.add_argument("--device", choices=["cpu", "cuda"], default=Setup.device)
    options.add_argument("--prompts", type=int, default=prompts, help="B, rows of a step")
    options.add_argument("--threads", type=int, default=Setup.threads, help="of the CPU; 1 if others use it too")
    options.add_argument("--tuning", choices=["full", "lora"], default=Setup.tuning)
    options.add_argument("--gradient_checkpointing", action="store_true")
    options.add_argument("--steps", type=int, default=Setup.steps, help="timed steps of a round")
    options.add_argument("--warm_up", type=int, default=Setup.warm_up, help="steps before them")
    options.add_argument("--repeats", type=int, default=3, help="rounds; in each every arm has a fresh process")
    options.add_argument("--out", type=Path, default=path.resolve().parent / "results" / f"{path.stem}.json")
    return options


def without_missing_trl(arms: Sequence[str]) -> list[str]:
    """The arms that can run here: TRL's only where it is installed.

    Raises:
        SystemExit: There are no others.
    """
    others = [arm for arm in arms if not arm.startswith("trl")]
    if len(others) == len(arms) or find_spec("trl") is not None:
        return list(arms)
    if not others:
        raise SystemExit("TRL is not installed, and --arms names no other")
    print("TRL is not installed: measured without it")
    return others


def rollout_parser(doc: str | None, script: str) -> argparse.ArgumentParser:
    """The same with the sizes of rollouts; several prompt lengths are run one after the other."""
    options = step_parser(doc, script)
    options.add_argument("--prompt_tokens", type=int, nargs="+", default=[75, 315, 1020], help="P; several are run")
    options.add_argument("--group_size", type=int, default=Workload.group_size, help="G, completions of a prompt")
    options.add_argument("--new_tokens", type=int, default=Workload.new_tokens, help="T, tokens of a completion")
    options.set_defaults(micro_prompts=None)
    return options
