"""The model over one token more of each completion, and that step recorded once for all tokens to come (CUDA graphs).

A step of decoding is a thousand small kernels, which a GPU is through with before the host has launched them. Recorded
in a graph they are one launch. A recorded step has the same shapes and places each time: it reads a window of the
completions' keys in which later tokens are masked, and is recorded again where the window is full or completions leave.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from cpt_lightning.models.qwen_vl import QwenVL, embed, hidden_states, use_cuda_graphs, uses_cuda_graphs
from cpt_lightning.rollouts.cache import GroupCache

FEWEST_TOKENS = 16
"""Completions that may not become so long are not worth a recording, which takes as long as about three steps."""
FIRST_WINDOW = 64
"""Places of a completion that the first recording reads; later ones read twice as many as are full."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a replayed step may be from the same step run by itself, relative to its largest value."""


def decoding_steps(model: QwenVL, cache: GroupCache) -> DecodingSteps:
    """Recorded steps on a GPU where the model is to use them, and steps as they are elsewhere."""
    is_recorded = uses_cuda_graphs(model) and cache.mask.is_cuda and cache.room >= FEWEST_TOKENS
    return (RecordedSteps if is_recorded else DecodingSteps)(model, cache)


class DecodingSteps:
    """Runs the model over one token more of each completion.

    Args:
        model: The backbone.
        cache: Keys and values of the prompts; those of the tokens are put there.
    """

    def __init__(self, model: QwenVL, cache: GroupCache) -> None:
        self.model = model
        self.cache = cache

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """``[N, H]`` final hidden states of tokens ``[N]`` at positions ``[N]``; the next call may write over them."""
        hidden = self._run(tokens, positions)
        self.cache.advance()
        return hidden

    def keep(self, prompts: Tensor, members: Tensor) -> None:
        """Goes on with some completions, see :meth:`GroupCache.keep`."""
        self.cache.keep(prompts, members)

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return hidden_states(self.model, embed(self.model, tokens[None]), positions.expand(3, 1, -1), self.cache)[0]


class RecordedSteps(DecodingSteps):
    """The same from a recording, which is compared with the step itself each time that one is made.

    Where recording fails, or what it gives differs, a warning says so and the model decodes without from then on.
    """

    graph: torch.cuda.CUDAGraph | None = None
    tokens: Tensor
    positions: Tensor
    hidden: Tensor

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As without a recording."""
        if not uses_cuda_graphs(self.model):  # given up
            return super().__call__(tokens, positions)
        if self.graph is None or self.cache.is_full:
            hidden = self._record(tokens, positions)
        else:
            self.tokens.copy_(tokens)
            self.positions.copy_(positions)
            self.graph.replay()
            hidden = self.hidden
        self.cache.advance()
        return hidden

    def keep(self, prompts: Tensor, members: Tensor) -> None:
        """Goes on with some completions, of which there is no recording yet."""
        super().keep(prompts, members)
        self.graph = None

    def _record(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """This step, run as it is; the next ones are replayed."""
        self.graph = None
        self.cache.fix_window(max(FIRST_WINDOW, 2 * self.cache.length))
        self.tokens, self.positions = tokens.clone(), positions.clone()
        here, stream = torch.cuda.current_stream(tokens.device), _stream(tokens.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            hidden = self._run(self.tokens, self.positions)  # libraries set themselves up outside of a recording
            try:
                self.graph = self._recorded()
            except RuntimeError as error:
                self._give_up(f"a step of decoding could not be recorded: {error}")
        here.wait_stream(stream)
        if self.graph is not None:
            self.graph.replay()
            if (difference := _difference(self.hidden, hidden)) <= TOLERANCE[hidden.dtype]:
                return self.hidden
            self._give_up(f"a replayed step of decoding differs from the step itself by {difference:.1e} of its size")
            hidden = self._run(tokens, positions)  # for the replay's keys are in the cache
        return hidden

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would give all cached memory back to the driver at each recording. What other threads do
        # meanwhile, as one that pins batches, is no part of it.
        graph.capture_begin(pool=_pool(self.tokens.device).pool(), capture_error_mode="thread_local")
        try:
            self.hidden = self._run(self.tokens, self.positions)
        finally:
            graph.capture_end()
        return graph

    def _give_up(self, reason: str) -> None:
        self.graph = None
        self.cache.fix_window(None)
        use_cuda_graphs(self.model, False)
        warnings.warn(
            f"{reason.rstrip('.')}. This run samples on without CUDA graphs, which is slower and gives the same; "
            "backbone.cuda_graphs=false does so from the start",
            stacklevel=2,
        )


def _difference(values: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value that is expected; NaN if there is one in them."""
    return float((values - expected).abs().amax() / expected.abs().amax())


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which steps are recorded."""
    return torch.cuda.Stream(device)


@functools.cache
def _pool(device: torch.device) -> torch.cuda.CUDAGraph:
    """A recording of next to nothing, whose memory all others use, one after the other.

    Memory of its own for each would be given back only when there is none left; and what is shared ends with its last
    user, which is why there is always this one.
    """
    keeper = torch.cuda.CUDAGraph()
    keeper.capture_begin(capture_error_mode="thread_local")
    torch.zeros(1, device=device)
    keeper.capture_end()
    return keeper
