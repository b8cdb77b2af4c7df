"""The model over one token more of each completion, and that step recorded once for all tokens to come (CUDA graphs).

A step of decoding is a thousand small kernels, which a GPU is through with before the host has launched them. Recorded
in a graph they are one launch. A recorded step has the same shapes and places each time: it reads a window of the
completions' keys in which later tokens are masked, and is recorded again where the window is full or completions leave.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import suppress
from typing import cast

import torch
from torch import Tensor

from cpt_lightning.models.qwen_vl import QwenVL, embed, hidden_states, use_cuda_graphs, uses_cuda_graphs
from cpt_lightning.rollouts.cache import GroupCache

FEWEST_TOKENS = 16
"""Completions that may not become so long are not worth a recording, for which the host launches a step three times."""
FIRST_WINDOW = 64
"""Places of a completion that the first recording reads; later ones read twice as many as are full."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far a replayed step may be from the same step run by itself, relative to its size; mostly they are equal."""


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
    """The same from a recording, whose first replay is compared with the step itself.

    Where recording fails a warning says so, and the model decodes without from then on.

    Raises:
        RuntimeError: A replay is not the step itself. What it wrote may be anywhere among the keys.
    """

    graph: torch.cuda.CUDAGraph | None = None
    is_checked = False
    tokens: Tensor
    positions: Tensor
    hidden: Tensor

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As without a recording."""
        if not uses_cuda_graphs(self.model):  # given up
            return super().__call__(tokens, positions)
        is_new = self.graph is None or self.cache.is_full
        hidden = self._record(tokens, positions) if is_new else self._replay(tokens, positions)
        self.cache.advance()
        return hidden

    def keep(self, prompts: Tensor, members: Tensor) -> None:
        """Goes on with some completions, of which there is no recording yet."""
        super().keep(prompts, members)
        self.graph = None

    def _record(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """This step, run as it is; the next ones are replayed."""
        self.graph, self.is_checked = None, False
        self.cache.fix_window(max(FIRST_WINDOW, 2 * self.cache.length))
        self.tokens, self.positions = tokens.clone(), positions.clone()
        here, stream = torch.cuda.current_stream(tokens.device), _stream(tokens.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            hidden = self._run(self.tokens, self.positions)  # libraries set themselves up outside of a recording
            try:
                self.graph = self._recorded()
            except RuntimeError as error:
                self._give_up(error)
        here.wait_stream(stream)
        return hidden

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph, pool = torch.cuda.CUDAGraph(), _pool(self.tokens.device).pool()
        # torch.cuda.graph would give all cached memory back to the driver at each recording. What other threads do
        # meanwhile, as one that pins batches, is no part of it.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            self.hidden = self._run(self.tokens, self.positions)
            graph.capture_end()
        except BaseException:
            with suppress(RuntimeError):  # it only says that something was wrong before
                graph.capture_end()
            _forget_recording(self.tokens.device, pool)
            raise
        return graph

    def _replay(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        cast("torch.cuda.CUDAGraph", self.graph).replay()
        if self.is_checked:
            return self.hidden
        hidden = self._run(tokens, positions)  # the first step of which not all is as it was recorded
        if not (difference := _difference(self.hidden, hidden)) <= TOLERANCE[hidden.dtype]:
            raise RuntimeError(
                f"a replayed step of decoding (CUDA graphs) differs from the step itself by {difference:.1e} of its "
                "size; set backbone.cuda_graphs=false, which is slower, and please report it"
            )
        self.is_checked = True
        return hidden

    def _give_up(self, error: RuntimeError) -> None:
        self.cache.fix_window(None)
        use_cuda_graphs(self.model, False)
        warnings.warn(
            f"a step of decoding could not be recorded: {str(error).rstrip('.')}. This run samples on without CUDA "
            "graphs, which is slower and draws the same; backbone.cuda_graphs=false does so from the start",
            stacklevel=2,
        )


def _difference(values: Tensor, expected: Tensor) -> float:
    """The largest of a token, relative to the length of what is expected of it; NaN if there is one in them."""
    difference, size = ((each.float()).norm(dim=-1) for each in (values - expected, expected))
    return float((difference / size).amax())


def _forget_recording(device: torch.device, pool: tuple[int, int]) -> None:
    """After one that failed: torch (2.8 to 2.13) ends it before allocator and generator know that it has ended."""
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
    with suppress(RuntimeError, AttributeError):
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())


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
