"""Stands in for vLLM in the process that it would have: our own model, of the weights that are handed over."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from itertools import count
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.qwen_vl import weightless
from cpt_lightning.rollouts import VLLM, Sampling, completion_logprobs, sample_groups
from cpt_lightning.rollouts.vllm import process, sampler
from cpt_lightning.rollouts.vllm.requests import Answer, Request
from cpt_lightning.rollouts.vllm.weights import Part, checksum, looked_at, open_buffer, unpack
from cpt_lightning.types import Completions, Prompts
from tests.ranks import forked


class FakeEngine:
    """Answers as ``Engine`` does, by our own sampling."""

    def __init__(self, banned_token_ids, buffer, model, dtype, tensor_parallel_size, **options) -> None:
        torch.set_num_threads(1)
        self.buffer, self.pending, self.begun = open_buffer(buffer), {}, {}
        self.processor = PromptProcessor.load(model)
        self.model = weightless(model, dtype).eval()
        self.numbers, self.num_shares = count(), tensor_parallel_size
        print("the engine is ready", flush=True)

    def receive(self, places):
        self.pending |= {place.name: unpack(self.buffer, place).clone() for place in places}
        return [checksum(self.buffer[: places[-1].end])]

    def load(self):
        pending, self.pending = self.pending, {}
        assert self.model.load_state_dict(pending, strict=False).unexpected_keys == []

    def read_back(self):
        return self.parts_of({name: value for name, value in self.model.state_dict().items() if "visual" not in name})

    def parts_of(self, weights) -> list[Part]:
        """As a single worker has them."""
        return [Part(name, 0, 0, looked_at(name, weight, self.num_shares)) for name, weight in weights.items()]

    def begin(self, requests, temperature):
        numbers = [next(self.numbers) for _ in requests]
        self.begun |= {number: (request, temperature) for number, request in zip(numbers, requests, strict=True)}
        return numbers

    def step(self):
        begun, self.begun = self.begun, {}
        return {number: self._answers(*asked) for number, asked in begun.items()}

    def _answers(self, request: Request, temperature: float):
        return [self._scored(request)] if "prompt_logprobs" in request.options else self._group(request, temperature)

    def _scored(self, request: Request) -> Answer:
        """All behind the last image, and nothing more: enough for a probe."""
        last = max([0, *(row + 1 for row, token in enumerate(request.ids) if token == self.processor.image_token_id)])
        start = max(last + 1, len(request.ids) - sampler.PROBE_TOKENS)
        ids = torch.tensor([request.ids[start:]])
        prompt = self._prompt(replace(request, ids=request.ids[:start]))
        completion = Completions(ids, torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad():
            logps = completion_logprobs(self.model, prompt, completion)[0].tolist()
        return Answer([0], [0.0], "length", logps)

    def _prompt(self, request: Request) -> Prompts:
        image = self.processor.image_token_id
        sizes = iter([] if request.image_grid_thw is None else (request.image_grid_thw.prod(dim=1) // 4).tolist())
        ids = [token for each in request.ids for token in ([each] * next(sizes) if each == image else [each])]
        row = torch.tensor([ids])
        grid = request.image_grid_thw
        return Prompts(
            row, torch.ones_like(row), [0 if grid is None else len(grid)],
            image_grid_thw=grid, image_features=request.image_features,
        )  # fmt: skip

    def _group(self, request: Request, temperature: float):
        options = request.options
        is_greedy = options.get("temperature") == 0
        sampling = Sampling(options["max_tokens"], temperature, options.get("top_p", 1.0), options.get("top_k", 0))
        generator = torch.Generator().manual_seed(request.seed)
        prompt, size = self._prompt(request), options["n"]
        drawn = sample_groups(self.model, self.processor, prompt, size, sampling, generator, with_greedy=is_greedy)
        drawn = drawn.select([size]) if is_greedy else drawn
        ended = drawn.ended(options["stop_token_ids"]).tolist()
        return [
            Answer(ids[:length].tolist(), logps[:length].tolist(), "stop" if end else "length")
            for ids, logps, length, end in zip(drawn.ids, drawn.logps, drawn.lengths.tolist(), ended, strict=True)
        ]


def engines_from_a_server() -> Any:
    """A patch under which engines are forked by a process that has imported this module, as each does when spawned.

    What they share with this process is as little: its memory, its open files and its streams are not theirs.
    """
    context = forked()
    return mock.patch.object(process, "multiprocessing", SimpleNamespace(get_context=lambda method: context))


class FakeVLLM(VLLM):
    """Believes vLLM to be there."""

    make_engine = FakeEngine

    def __init__(self, **options: Any) -> None:
        with mock.patch.object(sampler, "find_spec", lambda name: name):
            super().__init__(**options)


class Idle:
    """Does nothing."""


class Littering:
    """Leaves a temporary file, and shared memory."""

    def __init__(self) -> None:
        self.memory = SharedMemory(create=True, size=8)
        self.file = tempfile.mkstemp()[1]

    def sleep(self, level):
        return [self.file, f"/dev/shm/{self.memory.name}"]


class Counting:
    """Draws three tokens of anything; what it gives is how many requests were drawn together with the last one."""

    def __init__(self) -> None:
        self.numbers, self.left = count(), {}

    def begin(self, requests, temperature):
        numbers = [next(self.numbers) for _ in requests]
        if "never" in requests:
            raise ValueError("no such request")
        self.left |= dict.fromkeys(numbers, 3)
        return numbers

    def step(self):
        time.sleep(0.4)
        together = len(self.left)
        self.left = {number: left - 1 for number, left in self.left.items()}
        ended = [number for number, left in self.left.items() if not left]
        return {number: together for number in ended if self.left.pop(number) == 0}

    def sleep(self, level):
        return 7

    def wake_up(self):
        """Nothing: it never slept."""


class Unready(FakeEngine):
    """Cannot be made."""

    def __init__(self, **options) -> None:
        print("looking for a device", flush=True)
        raise ValueError("no memory for keys and values")


class Stale(FakeEngine):
    """Keeps its first weights."""

    def load(self):
        if not getattr(self, "is_loaded", False):
            super().load()
        self.is_loaded, self.pending = True, {}


class Blind(Stale):
    """Says what it got, and computes with its first weights: only what it samples can tell."""

    def load(self):
        self.heard = {**getattr(self, "heard", {}), **self.pending}
        super().load()

    def read_back(self):
        return self.parts_of(self.heard)


class Garbling(FakeEngine):
    """Has other bytes in its memory than were written there."""

    def receive(self, places):
        self.buffer[5] += 1
        return super().receive(places)


class Dying(FakeEngine):
    """Ends in the midst of sampling."""

    def step(self):
        print("out of memory", flush=True)
        os._exit(3)


class Hanging(FakeEngine):
    """Never answers."""

    def step(self):
        print("waiting for the others", flush=True)
        time.sleep(600)
