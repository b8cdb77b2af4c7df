"""vLLM itself, in the process that it has for itself.

Written for vLLM 0.32; what is used of its insides, here and in ``worker.py`` (the model runner's ``reload_weights``,
the logits processor's ``scale``, the fused layers' names), is checked by every hand-over, which reads back what the
layers compute.
"""

from __future__ import annotations

from typing import Any

from cpt_lightning.rollouts.vllm.requests import Answer, Request
from cpt_lightning.rollouts.vllm.weights import Part, Place


class Engine:
    """vLLM without weights of its own: they come by :meth:`load`, bucket after bucket.

    Args:
        banned_token_ids: Tokens that are never sampled.
        buffer: Path of the shared memory through which weights come.
        tensor_parallel_size: Workers that share each layer.
        **options: More of ``vllm.LLM``.
    """

    def __init__(self, banned_token_ids: list[int], buffer: str, tensor_parallel_size: int, **options: Any) -> None:
        from vllm import LLM

        from cpt_lightning.rollouts.vllm.banned import BannedTokens
        from cpt_lightning.rollouts.vllm.worker import Share

        self.llm = LLM(
            **options,
            tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend="mp" if tensor_parallel_size > 1 else "uni",
            worker_extension_cls=f"{Share.__module__}.{Share.__qualname__}",
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
        self._on_workers("open_weights", buffer)

    def _on_workers(self, method: str, *arguments: Any) -> list[Any]:
        """What each of them returns."""
        return self.llm.collective_rpc(method, args=arguments)

    # -- weights -----------------------------------------------------------------------------------------------------

    def receive(self, places: list[Place]) -> list[int]:
        """Takes a bucket out of the shared memory.

        Returns:
            The checksums of what each worker found there.
        """
        return self._on_workers("take_weights", places)

    def load(self) -> None:
        """Puts what was received in the place of all weights, and forgets what the old ones computed."""
        self._on_workers("load_weights_taken")
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()  # the workers have forgotten their images, and the scheduler has not

    def read_back(self) -> list[Part]:
        """What each worker computes with of the weights."""
        return [part for parts in self._on_workers("look_at_weights") for part in parts]

    # -- completions -------------------------------------------------------------------------------------------------

    def begin(self, requests: list[Request], temperature: float) -> list[int]:
        """Begins the completions of each request; as long as others are drawn, the temperature must be theirs.

        Returns:
            Numbers under which :meth:`step` will give them.
        """
        from vllm import SamplingParams

        self._on_workers("set_temperature", temperature)
        sampling = [
            SamplingParams(
                seed=request.seed,
                logprobs=0,
                ignore_eos=True,  # the stop tokens say where a completion ends
                detokenize=False,
                **request.options,
            )
            for request in requests
        ]
        names = self.llm.enqueue([request.prompt for request in requests], sampling, use_tqdm=False)
        return [int(name.partition("-")[0]) for name in names]  # behind it stands what makes names unique

    def step(self) -> dict[int, list[Answer]]:
        """Draws a token of each completion; those of requests that have ended by it."""
        ended = [output for output in self.llm.llm_engine.step() if output.finished]
        return {int(output.request_id): [_answer(output, each) for each in output.outputs] for output in ended}

    # -- memory ------------------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> int:
        """Gives the devices' memory back; the bytes that this freed on each, at least."""
        before = self._on_workers("free_memory")
        self.llm.sleep(level)
        return min(now - then for now, then in zip(self._on_workers("free_memory"), before, strict=True))

    def wake_up(self) -> None:
        """Takes the memory again; after level 2 there are no weights in it."""
        self.llm.wake_up()


def _answer(output: Any, completion: Any) -> Answer:
    ids = list(completion.token_ids)
    prompt = zip(output.prompt_logprobs or [], output.prompt_token_ids, strict=False)
    return Answer(
        ids,
        [steps[token].logprob for steps, token in zip(completion.logprobs, ids, strict=True)],
        completion.finish_reason,
        [steps[token].logprob for steps, token in prompt if steps is not None],  # the first token has none
    )
