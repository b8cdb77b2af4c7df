"""Stands in for vLLM in the process that it would have: our own model, of the weights that are handed over."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import multiprocessing

from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.qwen_vl import weightless
from cpt_lightning.rollouts import VLLM, Sampling, completion_logprobs, sample_groups
from cpt_lightning.rollouts.vllm import process, sampler
from cpt_lightning.rollouts.vllm.requests import Answer, Request
from cpt_lightning.rollouts.vllm.weights import checksum, looked_at, unpack
from cpt_lightning.types import Completions, Prompts


class FakeEngine:
    """Answers as ``Engine`` does, by our own sampling."""

    def __init__(self, banned_token_ids, buffer, model, dtype, **options) -> None:
        torch.set_num_threads(1)
        self.buffer, self.pending = buffer, {}
        self.processor = PromptProcessor.load(model)
        self.model = weightless(model, dtype).eval()
        print("the engine is ready", flush=True)

    def receive(self, places):
        self.pending |= {place.name: unpack(self.buffer, place).clone() for place in places}
        return checksum(self.buffer[: places[-1].end])

    def load(self):
        pending, self.pending = self.pending, {}
        assert self.model.load_state_dict(pending, strict=False).unexpected_keys == []

    def read_back(self, columns):
        own = self.model.state_dict()
        return {name: looked_at(name, weight, columns) for name, weight in own.items() if "visual" not in name}

    def generate(self, requests, temperature):
        return [self._group(request, temperature) for request in requests]

    def score(self, request: Request, num_tokens: int):
        ids = torch.tensor([request.ids[-num_tokens:]])
        prompt = self._prompt(Request(request.ids[:-num_tokens], 0, request.image_features, request.image_grid_thw))
        completion = Completions(ids, torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad():
            return completion_logprobs(self.model, prompt, completion)[0].tolist()

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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return mock.patch.object(process, "multiprocessing", SimpleNamespace(get_context=lambda method: context))


class FakeVLLM(VLLM):
    """Believes vLLM to be there."""

    make_engine = FakeEngine

    def __init__(self, **options: Any) -> None:
        with mock.patch.object(sampler, "find_spec", lambda name: name):
            super().__init__(**options)


class Idle:
    """Does nothing."""


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

    def read_back(self, columns):
        return {name: looked_at(name, weight, columns) for name, weight in self.heard.items()}


class Garbling(FakeEngine):
    """Has other bytes in its memory than were written there."""

    def receive(self, places):
        self.buffer[5] += 1
        return super().receive(places)


class Dying(FakeEngine):
    """Ends in the midst of sampling."""

    def generate(self, requests, temperature):
        print("out of memory", flush=True)
        os._exit(3)


class Hanging(FakeEngine):
    """Never answers."""

    def generate(self, requests, temperature):
        print("waiting for the others", flush=True)
        time.sleep(600)
