"""The side of vLLM that training sees: it hands over the weights whenever they moved, and asks for completions."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor

from cpt_lightning.rollouts.engine import Sampler
from cpt_lightning.rollouts.packing import completion_logprobs
from cpt_lightning.rollouts.sampling import Sampling, sampling_mode, with_prefix
from cpt_lightning.rollouts.vllm.probe import Probe
from cpt_lightning.rollouts.vllm.process import EngineProcess
from cpt_lightning.rollouts.vllm.requests import Answer, Request, completions_of, requests_of
from cpt_lightning.rollouts.vllm.served import Engine
from cpt_lightning.rollouts.vllm.weights import (
    COLUMNS,
    buckets,
    checksum,
    differing,
    fingerprint,
    language_weights,
    looked_at,
)
from cpt_lightning.types import Completions, Prompts

if TYPE_CHECKING:
    from cpt_lightning.models.processor import PromptProcessor
    from cpt_lightning.models.qwen_vl import QwenVL

BUCKET_BYTES = 1 << 28
"""Shared memory through which weights go; more where one of them is larger."""
PROBED_HANDOVERS = 2
"""Those of the first weights, and of the first update."""
CPU_BATCH_TOKENS = 4096
"""Prompt tokens that the engine processes at once on a CPU; more where one prompt is longer."""
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
"""The backbone, as vLLM knows it."""
PROBE_TOKENS = 8
"""Longest completion of the probe."""


class VLLM(Sampler):
    """Samples with vLLM 0.32, one engine beside each rank, on the rank's device; ``pip install cpt-lightning[vllm]``.

    Before completions are drawn the weights are compared with those that the engine got last; if any differs, all of
    the language model is handed over, adapters merged and four bits unpacked, and read back. Image features are
    computed here, once a prompt, and go along with it. An engine that does not have the weights of the moment raises an
    error; so does one that dies or hangs. Its log-probabilities are its own, see ``RFT.importance_sampling``.

    It was run on the CPU, eagerly, in float32 and bfloat16. Not run yet: a GPU, and with it graphs
    (``enforce_eager: false``), ``gpu_memory_utilization`` and ``sleep_level``. Tensor parallelism is not built.

    Args:
        gpu_memory_utilization: Share of the GPU's memory that the engine may take, weights included.
        max_model_len: Longest prompt and completion together, in tokens.
        dtype: What the engine computes in; by default what the weights are stored in.
        enforce_eager: Without CUDA graphs, which take memory and a while at the start.
        sleep_level: While the model learns the engine keeps its memory (0), moves its weights to main memory (1), or
            drops them (2), so that all are handed over again; 1 and 2 need a GPU.
        tolerance: Largest difference in nats between log-probabilities of engine and policy on a probe of a few
            tokens, after the first hand-over and after that of the first update.
        time_limit_s: Longest time that the engine may take to start, or to answer one request, before it is ended.

    Raises:
        ValueError: An option out of range.
        ImportError: vLLM is not installed.
    """

    make_engine: type = Engine

    def __init__(
        self,
        gpu_memory_utilization: float = 0.4,
        max_model_len: int = 4096,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        enforce_eager: bool = False,
        sleep_level: Literal[0, 1, 2] = 0,
        tolerance: float = 0.1,
        time_limit_s: float = 600.0,
    ) -> None:
        if not 0 < gpu_memory_utilization < 1:
            raise ValueError(f"sampler.gpu_memory_utilization={gpu_memory_utilization} must lie in (0, 1), e.g. 0.4")
        if max_model_len < 2:
            raise ValueError(f"sampler.max_model_len={max_model_len} must hold a prompt and a token: at least 2")
        if sleep_level and not torch.cuda.is_available():
            raise ValueError(f"sampler.sleep_level={sleep_level}: vLLM sleeps on GPUs only; set it to 0")
        for name, value in {"tolerance": tolerance, "time_limit_s": time_limit_s}.items():
            if value <= 0:
                raise ValueError(f"sampler.{name}={value} must be positive")
        if find_spec("vllm") is None:
            raise ImportError("sampler VLLM: vLLM is not installed: pip install 'cpt-lightning[vllm]'")
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.enforce_eager = enforce_eager
        self.sleep_level = sleep_level
        self.tolerance = tolerance
        self.time_limit_s = time_limit_s
        self._forget()

    def _forget(self) -> None:
        self.engine: EngineProcess | None = None
        self._handed_over: list[int] | None = None  # the fingerprint of what the engine has
        self._num_handovers = 0
        self._is_asleep = False
        self._probe: Probe | None = None

    # -- completions -------------------------------------------------------------------------------------------------

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
        """Completions by the weights of the moment; ``on_token`` hears when they are begun, and not of each token.

        Arguments and result as in :func:`~cpt_lightning.rollouts.sample_groups`.

        Raises:
            ValueError: A prompt that leaves no room for a completion within ``max_model_len``.
            RuntimeError: The engine failed, or does not have the weights.
        """
        prefix = processor.encode_prefix(sampling.prefix)
        longest = int(prompts.lengths.max()) + len(prefix) + sampling.max_new_tokens
        if longest > self.max_model_len:
            raise ValueError(
                f"a prompt and its completion may have {longest} tokens, {len(prefix)} of them of sampling.prefix, but "
                f"sampler.max_model_len is {self.max_model_len}: raise it, or lower sampling.max_new_tokens or "
                "data.max_prompt_tokens"
            )
        with sampling_mode(model):
            engine = self._ready(model, processor, prompts)
            if on_token is not None:
                on_token(0)
            requests = requests_of(model, with_prefix(prompts, prefix), generator)
            groups = _draw(engine, requests, group_size, sampling, processor.stop_token_ids, with_greedy)
        return completions_of(groups, prefix, processor, sampling.max_new_tokens, prompts.device)

    # -- weights -----------------------------------------------------------------------------------------------------

    def _ready(self, model: QwenVL, processor: PromptProcessor, prompts: Prompts) -> EngineProcess:
        """The engine, awake and with the weights that the model has now."""
        if self.engine is not None and not self.engine.is_open:
            self._forget()
        engine = self.engine = self.engine or self._start(model, processor)
        if self._is_asleep:
            engine.call("wake_up")
            self._is_asleep = False
        current = fingerprint(model)
        if current != self._handed_over:
            self._handed_over = None  # until all of it is there, the engine has none
            self._hand_over(engine, model)
            if self._num_handovers <= PROBED_HANDOVERS:
                self._check_probe(engine, model, processor, prompts)
            self._handed_over = current
        return engine

    def _hand_over(self, engine: EngineProcess, model: QwenVL) -> None:
        """Sends all weights, and reads some of each back."""
        dtype = getattr(torch, self._dtype_of(model))
        columns = torch.linspace(0, model.config.text_config.hidden_size - 1, COLUMNS).long().tolist()
        sent: dict[str, Tensor] = {}

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, weight in language_weights(model, dtype):
                sent[name] = looked_at(name, weight, columns)
                yield name, weight

        for places in buckets(noted(), self._buffer):
            expected = checksum(self._buffer[: places[-1].end])
            if engine.call("receive", places) != expected:
                self._refuse(f"what came of {places[0].name} to {places[-1].name} is not what was sent")
        engine.call("load")
        if wrong := differing(sent, engine.call("read_back", columns)):
            self._refuse(f"{len(wrong)} of {len(sent)} weights are not those that were sent, such as {wrong[0]}")
        self._num_handovers += 1

    def _check_probe(self, engine: EngineProcess, model: QwenVL, processor: PromptProcessor, prompts: Prompts) -> None:
        """Compares what engine and policy say of the same tokens."""
        if self._probe is None:
            prompt = replace(prompts.select([0]), state=None, image_features=None)
            greedy, stops = Sampling(PROBE_TOKENS, temperature=0), processor.stop_token_ids
            groups = _draw(engine, requests_of(model, prompt), 1, greedy, stops)
            completion = completions_of(groups, [], processor, PROBE_TOKENS, prompts.device)
            self._probe = Probe(prompt, completion, self.tolerance)
        probe = self._probe
        (request,) = requests_of(model, probe.prompt)
        tokens = probe.completion.ids[0].tolist()
        scored = engine.call("score", replace(request, ids=request.ids + tokens), len(tokens))
        logps = completion_logprobs(model, probe.prompt, probe.completion)[0].float().cpu()
        if complaint := probe.complaint(torch.tensor(scored), logps):
            self._refuse(complaint)

    def _refuse(self, reason: str) -> NoReturn:
        self.close()
        raise RuntimeError(f"hand-over of weights to vLLM: {reason}; it would sample from another model")

    def _start(self, model: QwenVL, processor: PromptProcessor) -> EngineProcess:
        largest = max(weight.numel() for weight in model.parameters()) * torch.float32.itemsize
        self._buffer = torch.zeros(max(BUCKET_BYTES, largest), dtype=torch.uint8).share_memory_()
        with tempfile.TemporaryDirectory(prefix="cpt_vllm_") as folder:
            config = deepcopy(model.config)
            config.architectures = [ARCHITECTURE]  # a model that no folder was read for does not say it
            config.save_pretrained(folder)
            processor.tokenizer.save_pretrained(folder)
            processor.image_processor.save_pretrained(folder)
            options: dict[str, Any] = {
                "model": folder,
                "dtype": self._dtype_of(model),
                "banned_token_ids": processor.banned_token_ids,
                "buffer": self._buffer,
                "gpu_memory_utilization": self.gpu_memory_utilization,
                "max_model_len": self.max_model_len,
                "enforce_eager": self.enforce_eager,
                "enable_sleep_mode": self.sleep_level > 0,
            }
            if model.device.type == "cpu":
                # Half a prompt in a batch has its draw undone by a generator's offset, which those of CPUs lack (0.32).
                tokens = max(self.max_model_len, CPU_BATCH_TOKENS)
                options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens}
            return EngineProcess(self.make_engine, options, _environment(model.device), self.time_limit_s)

    def _dtype_of(self, model: QwenVL) -> str:
        """What the engine computes in."""
        return self.dtype or str(model.model.language_model.norm.weight.dtype).removeprefix("torch.")

    # -- memory ------------------------------------------------------------------------------------------------------

    def sleep(self) -> int | None:
        """Gives memory back until the next completions are wanted, as ``sleep_level`` says.

        Returns:
            Bytes that this freed; ``None`` without a sleep.
        """
        if self.sleep_level == 0 or self.engine is None or self._is_asleep:
            return None
        freed = self.engine.call("sleep", self.sleep_level)
        self._is_asleep = True
        if self.sleep_level == 2:
            self._handed_over = None
        return freed

    def close(self) -> None:
        """Ends the engine; the next call starts a new one."""
        if self.engine is not None:
            self.engine.close()
        self._forget()


def _draw(
    engine: EngineProcess,
    requests: Sequence[Request],
    group_size: int,
    sampling: Sampling,
    stop_token_ids: list[int],
    with_greedy: bool = False,
) -> list[list[Answer]]:
    """The completions of each prompt, the greedy one last."""
    ends = {"max_tokens": sampling.max_new_tokens, "stop_token_ids": stop_token_ids}
    greedy = [replace(each, options={**ends, "n": 1, "temperature": 0.0}) for each in requests]
    if sampling.temperature == 0:  # a group would be so many times the same, which vLLM refuses to compute
        return [group * (group_size + with_greedy) for group in engine.call("generate", greedy, 1.0)]
    drawn = {**ends, "n": group_size, "top_p": sampling.top_p, "top_k": sampling.top_k}
    asked = [replace(each, options=drawn) for each in requests] + (greedy if with_greedy else [])
    groups = engine.call("generate", asked, sampling.temperature)
    sampled, best = groups[: len(requests)], groups[len(requests) :] or [[]] * len(requests)
    return [group + last for group, last in zip(sampled, best, strict=True)]


def _environment(device: torch.device) -> dict[str, str]:
    """Variables of the engine's process: it sees the device of its rank alone, and stays in its own process."""
    chosen = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        return {**chosen, "CUDA_VISIBLE_DEVICES": names[device.index or 0]}
    # Not bound to cores, on which the training computes too; of keys and values one gigabyte.
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {**chosen, **{name: os.environ.get(name, value) for name, value in defaults.items()}}
