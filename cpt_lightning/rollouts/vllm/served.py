"""vLLM itself, in the process that it has for itself: the one file that names its insides.

Written for vLLM 0.32; what is used of its insides (the model runner's ``reload_weights``, the logits processor's
``scale``, the fused layers' names) is checked by every hand-over, which reads back what the layers compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cpt_lightning.rollouts.vllm.requests import Answer, Request
from cpt_lightning.rollouts.vllm.weights import Place, checksum, unpack


class Engine:
    """vLLM without weights of its own: they come by :meth:`load`, bucket after bucket.

    Args:
        banned_token_ids: Tokens that are never sampled.
        buffer: ``[bytes]`` shared memory, through which weights come.
        **options: Of ``vllm.LLM``.
    """

    def __init__(self, banned_token_ids: list[int], buffer: Tensor, **options: Any) -> None:
        from vllm import LLM

        from cpt_lightning.rollouts.vllm.banned import BannedTokens

        self.buffer = buffer
        self.llm = LLM(
            **options,
            load_format="dummy",
            generation_config="vllm",
            logprobs_mode="raw_logprobs",  # before bans, top-k and top-p
            logits_processors=[BannedTokens],
            additional_config={"banned_token_ids": banned_token_ids},
            limit_mm_per_prompt={"image": 0, "video": 0},  # the vision tower is not built: features come with a prompt
            enable_mm_embeds=True,
            mm_processor_cache_gb=0,
            disable_log_stats=True,
        )
        self.runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.language_model: Any = self.runner.get_model().language_model
        self._pending: list[tuple[str, Tensor]] = []

    # -- weights -----------------------------------------------------------------------------------------------------

    def receive(self, places: list[Place]) -> int:
        """Takes a bucket out of the shared memory.

        Returns:
            The checksum of what was found there.
        """
        self._pending += [(place.name, unpack(self.buffer, place).clone()) for place in places]
        return checksum(self.buffer[: places[-1].end])

    def load(self) -> None:
        """Puts what was received in the place of all weights, and forgets what the old ones computed."""
        pending, self._pending = self._pending, []
        self.runner.reload_weights(weights_iterator=iter(pending))
        head = self.language_model.lm_head
        head.quant_method.process_weights_after_loading(head)  # on CPUs it keeps a packed copy, of tied weights too
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()  # the worker has forgotten its images, and the scheduler has not

    @torch.inference_mode()
    def read_back(self, columns: list[int]) -> dict[str, Tensor]:
        """Columns of each matrix as its layer computes with them, and all of each vector, by the names of a checkpoint.

        What a layer makes of the unit vectors are its columns, whatever form it keeps them in.
        """
        found: dict[str, Tensor] = {}
        model = self.language_model.model
        found["model.language_model.norm.weight"] = model.norm.weight
        rows = torch.tensor(columns, device=model.norm.weight.device)
        found["model.language_model.embed_tokens.weight"] = model.embed_tokens(rows)
        head = _columns(self.language_model.lm_head, columns, model.norm.weight)
        found["lm_head.weight"] = head[: self.language_model.lm_head.org_vocab_size]
        for number, layer in enumerate(model.layers):
            for name, value in _of_layer(layer, columns):
                found[f"model.language_model.layers.{number}.{name}"] = value
        return {name: value.detach().float().cpu() for name, value in found.items()}

    # -- completions -------------------------------------------------------------------------------------------------

    def generate(self, requests: list[Request], temperature: float) -> list[list[Answer]]:
        """The completions of each request."""
        outputs = self._run(requests, temperature, logprobs=0)
        return [[_answer(each) for each in output.outputs] for output in outputs]

    def score(self, request: Request, num_tokens: int) -> list[float]:
        """Log-probabilities of the last tokens of a prompt."""
        (output,) = self._run([request], 1.0, prompt_logprobs=0, max_tokens=1)
        last = zip(output.prompt_logprobs[-num_tokens:], output.prompt_token_ids[-num_tokens:], strict=True)
        return [steps[token].logprob for steps, token in last]

    def _run(self, requests: list[Request], temperature: float, **options: Any) -> list[Any]:
        from vllm import SamplingParams

        # vLLM's raw log-probabilities know no temperature: so the logits come divided by it, and it draws at 1.
        self.language_model.logits_processor.scale = 1 / temperature
        sampling = [
            SamplingParams(
                seed=request.seed,
                ignore_eos=True,  # the stop tokens say where a completion ends
                detokenize=False,
                **request.options,
                **options,
            )
            for request in requests
        ]
        return self.llm.generate([request.prompt for request in requests], sampling, use_tqdm=False)

    # -- memory ------------------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> int:
        """Gives the device's memory back; the bytes that this freed."""
        free = torch.cuda.mem_get_info()[0]
        self.llm.sleep(level)
        return torch.cuda.mem_get_info()[0] - free

    def wake_up(self) -> None:
        """Takes the memory again; after level 2 there are no weights in it."""
        self.llm.wake_up()


def _answer(output: Any) -> Answer:
    ids = list(output.token_ids)
    logps = [steps[token].logprob for steps, token in zip(output.logprobs, ids, strict=True)]
    return Answer(ids, logps, output.finish_reason)


def _of_layer(layer: Any, columns: list[int]) -> Iterator[tuple[str, Tensor]]:
    """What a decoder layer has, under the names that it has apart from its siblings' in a checkpoint."""
    like = layer.input_layernorm.weight
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", getattr(layer, name).weight
    attention, mlp = layer.self_attn, layer.mlp
    sizes = [attention.q_size, attention.kv_size, attention.kv_size]
    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    for kind, fused in (
        ("weight", _columns(attention.qkv_proj, columns, like)),
        ("bias", attention.qkv_proj.bias),
    ):
        yield from ((f"{name}.{kind}", part) for name, part in zip(projections, fused.split(sizes), strict=True))
    yield "self_attn.o_proj.weight", _columns(attention.o_proj, columns, like)
    gate, up = _columns(mlp.gate_up_proj, columns, like).chunk(2)
    yield from (("mlp.gate_proj.weight", gate), ("mlp.up_proj.weight", up))
    yield "mlp.down_proj.weight", _columns(mlp.down_proj, columns, like)


def _columns(layer: Any, columns: list[int], like: Tensor) -> Tensor:
    """``[out, columns]`` of a layer's matrix, from what it makes of unit vectors."""
    size = getattr(layer, "input_size", None) or layer.embedding_dim
    units = torch.zeros(len(columns), size, device=like.device, dtype=like.dtype)
    units[torch.arange(len(columns)), torch.tensor(columns)] = 1
    return layer.quant_method.apply(layer, units, None).T
