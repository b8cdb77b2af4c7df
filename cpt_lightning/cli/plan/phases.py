"""What is planned for, and what a plan says: the parts of a run, and what each needs of a device."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Workload:
    """The sizes of a run that are not the module's own.

    Args:
        prompt_tokens: Of the longest prompt.
        target_tokens: Of the longest target that is learned by SFT.
        num_images: Of every prompt.
        prompts_per_step: Over all devices.
        eval_prompts_per_step: Over all devices.
        accumulate_grad_batches: Batches whose gradients are added up (SFT).
    """

    prompt_tokens: int
    target_tokens: int = 256
    num_images: int = 1
    prompts_per_step: int = 16
    eval_prompts_per_step: int = 64
    accumulate_grad_batches: int = 1


@dataclass
class Phase:
    """What lives at the worst moment of a part of a run, in bytes.

    Args:
        name: Of the part.
        kinds: Bytes by what they are for.
    """

    name: str
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.kinds.values())


@dataclass
class Plan:
    """What a run needs of each device.

    Args:
        num_weights: Of the backbone.
        num_trainable: Of them and of adapters, what is trained.
        phases: The parts of a run.
    """

    num_weights: int
    num_trainable: int
    phases: list[Phase]

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)
