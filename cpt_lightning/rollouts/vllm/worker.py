"""What vLLM's workers can do besides: each has a share of every layer, in a process of its own or in the engine's.

Written for vLLM 0.32, as ``served.py``: the two files that name its insides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cpt_lightning.rollouts.vllm.process import ignore_stop_signals
from cpt_lightning.rollouts.vllm.weights import Part, Place, checksum, edges, open_buffer, unpack


class Share:
    """Methods that vLLM adds to its worker (``worker_extension_cls``); they are called on all workers at once."""

    model_runner: Any

    def open_weights(self, path: str) -> None:
        """Opens the memory through which weights come."""
        ignore_stop_signals()  # a worker of vLLM has begun to listen to them
        self.weights_buffer = open_buffer(path)
        self.weights_taken: list[tuple[str, Tensor]] = []

    def take_weights(self, places: list[Place]) -> int:
        """Takes a bucket out of the shared memory; the checksum of what was found there."""
        self.weights_taken += [(place.name, unpack(self.weights_buffer, place).clone()) for place in places]
        return checksum(self.weights_buffer[: places[-1].end])

    def load_weights_taken(self) -> None:
        """Puts this worker's share of what was taken in the place of all that it has."""
        taken, self.weights_taken = self.weights_taken, []
        self.model_runner.reload_weights(weights_iterator=iter(taken))
        head = self.model_runner.get_model().language_model.lm_head
        head.quant_method.process_weights_after_loading(head)  # on CPUs it keeps a packed copy, of tied weights too

    @torch.inference_mode()
    def look_at_weights(self) -> list[Part]:
        """What this worker computes with of the columns of each matrix, and of each vector, by a checkpoint's names.

        What a layer makes of the unit vectors are its columns, whatever form it keeps them in.
        """
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        language_model = self.model_runner.get_model().language_model
        return [
            Part(f"{prefix}{name}", row, column, value.detach().float().cpu())
            for prefix, parts in _of_model(language_model, rank, size)
            for name, row, column, value in parts
        ]

    def set_temperature(self, temperature: float) -> None:
        """Divides logits by it: vLLM's raw log-probabilities know no temperature, and it draws at 1."""
        self.model_runner.get_model().language_model.logits_processor.scale = 1 / temperature

    def free_memory(self) -> int:
        """Bytes that the device has left."""
        return torch.cuda.mem_get_info()[0]


Named = tuple[str, int, int, Tensor]
"""A weight, the row and the column from which on a worker has it, and what it has."""


def _of_model(language_model: Any, rank: int, size: int) -> Iterator[tuple[str, Iterator[Named]]]:
    yield "", _of_ends(language_model, rank, size)
    for number, layer in enumerate(language_model.model.layers):
        yield f"model.language_model.layers.{number}.", _of_layer(layer, rank, size)


def _of_ends(language_model: Any, rank: int, size: int) -> Iterator[Named]:
    """What stands before and behind the layers."""
    model, head = language_model.model, language_model.lm_head
    like = model.norm.weight
    yield "model.language_model.norm.weight", 0, 0, like
    rows = torch.tensor(edges(head.org_vocab_size, size), device=like.device)
    yield "model.language_model.embed_tokens.weight", 0, 0, model.embed_tokens(rows)  # summed up over workers
    columns = _columns(head, edges(head.embedding_dim, size), like)
    first = rank * len(columns)
    yield "lm_head.weight", first, 0, columns[: max(0, head.org_vocab_size - first)]


def _of_layer(layer: Any, rank: int, size: int) -> Iterator[Named]:
    """What a decoder layer has, under the names that it has apart from its siblings' in a checkpoint."""
    like = layer.input_layernorm.weight
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", 0, 0, getattr(layer, name).weight
    attention, mlp = layer.self_attn, layer.mlp
    qkv, sizes = attention.qkv_proj, [attention.q_size, attention.kv_size, attention.kv_size]
    key_value = rank // qkv.num_kv_head_replicas * attention.kv_size
    rows = [rank * attention.q_size, key_value, key_value]
    for kind, fused in (("weight", _columns(qkv, edges(qkv.input_size, size), like)), ("bias", qkv.bias)):
        for name, row, part in zip("qkv", rows, fused.split(sizes), strict=True):
            yield f"self_attn.{name}_proj.{kind}", row, 0, part
    up = mlp.gate_up_proj
    for name, part in zip(("gate", "up"), _columns(up, edges(up.input_size, size), like).chunk(2), strict=True):
        yield f"mlp.{name}_proj.weight", rank * len(part), 0, part
    for name, layer_ in {"self_attn.o_proj": attention.o_proj, "mlp.down_proj": mlp.down_proj}.items():
        own = edges(layer_.input_size_per_partition, 1)
        yield f"{name}.weight", 0, rank * len(own), _columns(layer_, own, like)


def _columns(layer: Any, columns: list[int], like: Tensor) -> Tensor:
    """``[out, columns]`` of a layer's matrix, from what it makes of unit vectors."""
    size = getattr(layer, "input_size_per_partition", None) or layer.embedding_dim
    units = torch.zeros(len(columns), size, device=like.device, dtype=like.dtype)
    units[torch.arange(len(columns)), torch.tensor(columns)] = 1
    return layer.quant_method.apply(layer, units, None).T
