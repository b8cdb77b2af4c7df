"""What a sampling engine is to the rest: prompts in, groups of completions out, always of the model as it is now."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from cpt_lightning.rollouts.sampling import Sampling
from cpt_lightning.types import Completions, Prompts

if TYPE_CHECKING:
    from cpt_lightning.models.processor import PromptProcessor
    from cpt_lightning.models.qwen_vl import QwenVL


class Sampler(ABC):
    """Another engine than :func:`~cpt_lightning.rollouts.sample_groups`, behind the same call.

    Its log-probabilities are its own: they differ from the policy's by what its kernels round otherwise.
    """

    @abstractmethod
    def sample(
        self,
        model: QwenVL,
        processor: PromptProcessor,
        prompts: Prompts,
        group_size: int,
        sampling: Sampling,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        with_greedy: bool = False,
        on_token: Callable[[int], None] | None = None,
    ) -> Completions:
        """Completions by the weights that ``model`` has at this moment.

        Arguments and result as in :func:`~cpt_lightning.rollouts.sample_groups`.
        """

    def sleep(self) -> int | None:
        """Makes room on the device for what comes until completions are wanted again.

        Returns:
            Bytes of the device's memory that this freed; ``None`` if the engine stays as it is.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Ends the engine; the next call starts a new one."""
