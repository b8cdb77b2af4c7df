"""The side of vLLM that training sees: it hands over the weights whenever they moved, and asks for completions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch

from cpt_lightning.rollouts.engine import Sampler
from cpt_lightning.rollouts.packing import completion_logprobs
from cpt_lightning.rollouts.sampling import Sampling, sampling_mode, with_prefix
from cpt_lightning.rollouts.vllm.group import EngineGroup, Meeting, environment
from cpt_lightning.rollouts.vllm.handover import hand_over
from cpt_lightning.rollouts.vllm.probe import Probe
from cpt_lightning.rollouts.vllm.process import Begun, EngineProcess
from cpt_lightning.rollouts.vllm.requests import Answer, Request, completions_of, requests_of
from cpt_lightning.rollouts.vllm.served import Engine
from cpt_lightning.rollouts.vllm.weights import fingerprint, open_buffer, shared_buffer
from cpt_lightning.types import Completions, Prompts

if TYPE_CHECKING:
    from cpt_lightning.models.processor import PromptProcessor
    from cpt_lightning.models.qwen_vl import QwenVL

BUCKET_BYTES = 1 << 28
"""Shared memory through which weights go; more where one of them is larger."""
PROBES = 2
"""Of the first weights, and of the first update."""
CPU_BATCH_TOKENS = 4096
"""Prompt tokens that the engine processes at once on a CPU; more where one prompt is longer."""
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
"""The backbone, as vLLM knows it."""
PROBE_TOKENS = 8
"""Longest completion of the probe."""


class VLLM(Sampler):
    """Samples with vLLM 0.32, one engine for each rank or group of ranks; ``pip install cpt-lightning[vllm]``.

    It computes on its ranks' devices. Ranks that share one (``tensor_parallel_size``) call it whenever they want to,
    and not equally often: completions of the same weights are drawn together, and other weights wait.

    Before completions are drawn the weights are compared with those that the engine got last; if any differs, all of
    the language model is handed over, adapters merged and four bits unpacked, and read back. Image features are
    computed here, once a prompt, and go along with it. An engine that does not have the weights of the moment raises an
    error; so does one that dies or hangs. Its log-probabilities are its own, see ``RFT.importance_sampling``.

    It was run on the CPU, eagerly, in float32 and bfloat16, by one rank and by two that share an engine. Not run yet: a
    GPU, and with it graphs (``enforce_eager: false``), ``gpu_memory_utilization`` and ``sleep_level``.

    Args:
        tensor_parallel_size: Consecutive ranks of a machine whose engine is one, with a part of each layer on each of
            their devices: for a model that does not fit beside the training otherwise. It must divide the number of
            ranks and the model's attention heads.
        gpu_memory_utilization: Share of the GPU's memory that the engine may take, weights included.
        max_model_len: Longest prompt and completion together, in tokens.
        dtype: What the engine computes in; by default what the weights are stored in.
        enforce_eager: Without CUDA graphs, which take memory and a while at the start.
        sleep_level: While the model learns the engine keeps its memory (0), moves its weights to main memory (1), or
            drops them (2), so that all are handed over again; 1 and 2 need a GPU. It waits for the ranks that share it.
        tolerance: Largest difference in nats between log-probabilities of engine and policy on a probe of a few
            tokens, after the first hand-over and after that of the first update.
        time_limit_s: Longest time that the engine may take to start, or to answer one request, before it is ended; with
            what it does for other ranks meanwhile.

    Raises:
        ValueError: An option out of range.
        ImportError: vLLM is not installed.
    """

    make_engine: type = Engine

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.4,
        max_model_len: int = 4096,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        enforce_eager: bool = False,
        sleep_level: Literal[0, 1, 2] = 0,
        tolerance: float = 0.1,
        time_limit_s: float = 600.0,
    ) -> None:
        if tensor_parallel_size < 1:
            raise ValueError(
                f"sampler.tensor_parallel_size={tensor_parallel_size} must be a number of ranks, 1 or more"
            )
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
        self.tensor_parallel_size = tensor_parallel_size
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
        self._known: list[int] | None = None  # the fingerprint of the weights that were sampled from last
        self._num_handovers = 0  # by this rank
        self._num_probes = 0
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
            ValueError: A prompt that leaves no room for a completion within ``max_model_len``; ranks that cannot share
                an engine.
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
        with sampling_mode(model), self._with_weights(model, processor, prompts) as engine:
            if on_token is not None:
                on_token(0)
            requests = requests_of(model, with_prefix(prompts, prefix), generator)
            groups = _draw(engine, requests, group_size, sampling, processor.stop_token_ids, with_greedy)
        return completions_of(groups, prefix, processor, sampling.max_new_tokens, prompts.device)

    # -- weights -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _with_weights(self, model: QwenVL, processor: PromptProcessor, prompts: Prompts) -> Iterator[EngineProcess]:
        """The engine, awake and with the weights that the model has now; nobody gives it others meanwhile."""
        if self.engine is not None and not self.engine.is_open:
            self._forget()
        engine = self.engine = self.engine or self._start(model, processor)
        current = fingerprint(model)
        has_them = engine.call("use", current)
        try:
            if not has_them:
                dtype = getattr(torch, self._dtype_of(model))
                _refuse(engine, hand_over(engine, model, self._buffer, dtype, self.tensor_parallel_size))
                self._num_handovers += 1
            if current != self._known and self._num_probes < PROBES:
                _refuse(engine, self._complaint(engine, model, processor, prompts))
                self._num_probes += 1
            if not has_them:
                engine.call("has", current)
            self._known = current
            yield engine
        finally:
            if engine.is_open:
                engine.call("end")

    def _complaint(
        self, engine: EngineProcess, model: QwenVL, processor: PromptProcessor, prompts: Prompts
    ) -> str | None:
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
        asked = replace(request, ids=request.ids + tokens, options={"prompt_logprobs": 0, "max_tokens": 1})
        ((answer,),) = engine.call("generate", [asked], 1.0)
        logps = completion_logprobs(model, probe.prompt, probe.completion)[0].float().cpu()
        return probe.complaint(torch.tensor(answer.prompt_logps[-len(tokens) :]), logps)

    # -- the engine --------------------------------------------------------------------------------------------------

    def _start(self, model: QwenVL, processor: PromptProcessor) -> EngineProcess:
        """Begins the engine, or finds the one that another rank of the group has begun."""
        if (heads := model.config.text_config.num_attention_heads) % self.tensor_parallel_size:
            raise ValueError(
                f"sampler.tensor_parallel_size={self.tensor_parallel_size} must divide the model's {heads} attention "
                "heads"
            )
        group = EngineGroup(self.tensor_parallel_size, model.device)
        if not group.comes_first():
            meeting = group.look_up(self.time_limit_s)
            self._buffer = open_buffer(meeting.buffer)
            return EngineProcess(meeting.address, self.time_limit_s)
        largest = max(weight.numel() for weight in model.parameters()) * torch.float32.itemsize
        self._buffer, path = shared_buffer(max(BUCKET_BYTES, largest))
        with tempfile.TemporaryDirectory(prefix="cpt_vllm_") as folder:
            _describe(model, processor, folder)
            options = {**self._options(model), "model": folder, "banned_token_ids": processor.banned_token_ids}
            begun = Begun(
                self.make_engine, {**options, "buffer": path}, environment(group.devices), is_shared=group.size > 1
            )
            group.publish(Meeting(begun.address, path, group.devices))
            return EngineProcess(begun.address, self.time_limit_s, begun)

    def _options(self, model: QwenVL) -> dict[str, Any]:
        """Of vLLM."""
        options: dict[str, Any] = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "dtype": self._dtype_of(model),
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": self.max_model_len,
            "enforce_eager": self.enforce_eager,
            "enable_sleep_mode": self.sleep_level > 0,
        }
        if model.device.type == "cpu":
            # Half a prompt in a batch has its draw undone by a generator's offset, which those of CPUs lack (0.32).
            tokens = max(self.max_model_len, CPU_BATCH_TOKENS)
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens}
        return options

    def _dtype_of(self, model: QwenVL) -> str:
        """What the engine computes in."""
        return self.dtype or str(model.model.language_model.norm.weight.dtype).removeprefix("torch.")

    # -- memory ------------------------------------------------------------------------------------------------------

    def sleep(self) -> int | None:
        """Gives memory back until the next completions are wanted, as ``sleep_level`` says.

        Returns:
            Bytes that this freed; ``None`` without a sleep.
        """
        if self.sleep_level == 0 or self.engine is None or not self.engine.is_open:
            return None
        return self.engine.call("sleep", self.sleep_level)

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


def _refuse(engine: EngineProcess, complaint: str | None) -> None:
    """Ends an engine of which there is a complaint."""
    if complaint is not None:
        engine.kill()
        raise RuntimeError(f"hand-over of weights to vLLM: {complaint}; it would sample from another model")


def _describe(model: QwenVL, processor: PromptProcessor, folder: str) -> None:
    """Writes what vLLM reads of a model besides its weights."""
    config = deepcopy(model.config)
    config.architectures = [ARCHITECTURE]  # a model that no folder was read for does not say it
    config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
