"""Steps of decoding replayed from CUDA graphs, which are pretended: the same completions, however the batch changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cpt_lightning.models import Backbone, Lora
from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.rollouts import Sampling, decoding, sample_groups, sampling
from cpt_lightning.rollouts.cache import GroupCache
from cpt_lightning.types import Completions, Prompts
from tests.pretend_cuda_graph import CUDAGraph, Stream
from tests.pretend_gpu import pretended_gpu

EVERYTHING = ["language_model", "projector", "vision_tower"]
BACKBONES = {"full": {}, "lora": {"tuning": "lora", "lora": Lora(parts=EVERYTHING)}, "bfloat16": {"dtype": "bfloat16"}}


@pytest.fixture
def draw(small_folder, processor: PromptProcessor, mixed_prompts: Prompts) -> Callable[..., Completions]:
    """Draws completions on the pretended GPU; counts the replays in ``draw.replays``."""

    def draw(length: int, rows: list[int] | None = None, with_greedy: bool = False, **backbone) -> Completions:
        torch.manual_seed(0)
        model = Backbone(small_folder, **backbone).load_model()
        with pretended_gpu(), torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:  # which is zero at first
                    weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
            model = model.to("cuda")
            model.tie_weights()
            prompts = mixed_prompts.select(rows or list(range(len(mixed_prompts)))).to("cuda")
            generator = torch.Generator("cuda").manual_seed(3)
            drawn = sample_groups(model, processor, prompts, 4, Sampling(length), generator, with_greedy)
            draw.replays = CUDAGraph.num_replays
            return Completions(drawn.ids.cpu(), drawn.mask.cpu(), drawn.logps.cpu())

    return draw


def same(one: Completions, other: Completions, tolerance: float = 1e-5) -> bool:
    return torch.equal(one.ids, other.ids) and torch.allclose(one.logps, other.logps, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1]], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", BACKBONES)
def test_replayed_steps_draw_what_steps_as_they_are_draw(draw, name, rows):
    """The window is recorded anew where it is full; every step but those that are recorded is a replay."""
    tolerance = 2e-2 if name == "bfloat16" else 1e-5
    plain = draw(70, rows, cuda_graphs=False, **BACKBONES[name])
    assert draw.replays == 0
    assert same(draw(70, rows, **BACKBONES[name]), plain, tolerance)
    assert draw.replays == 67


def test_completions_that_leave_the_batch_are_recorded_without(draw, monkeypatch: pytest.MonkeyPatch):
    """Every token below 60 ends a turn here, so the batch shrinks several times."""
    monkeypatch.setattr(PromptProcessor, "stop_token_ids", property(lambda self: list(range(60))))
    monkeypatch.setattr(sampling, "KEPT_WHILE_ALIVE", 0.8)
    recorded = []
    real = decoding.RecordedSteps._recorded
    monkeypatch.setattr(
        decoding.RecordedSteps, "_recorded", lambda self: recorded.append(len(self.tokens)) or real(self)
    )
    plain = draw(80, with_greedy=True, cuda_graphs=False)
    assert recorded == []
    assert same(draw(80, with_greedy=True), plain)
    assert len(set(recorded)) >= 3, "the batch must have shrunk more than once"
    assert len(recorded) > len(set(recorded)), "and a window must have been full"


def test_a_step_that_cannot_be_recorded_is_run_as_it_is_with_a_warning(draw, monkeypatch: pytest.MonkeyPatch):
    """Such as one that waits for the device; nothing is tried again."""
    real = decoding.embed

    def waits(model: QwenVL, ids: Tensor) -> Tensor:
        assert int(ids.max()) >= 0
        return real(model, ids)

    monkeypatch.setattr(decoding, "embed", waits)
    plain = draw(70, cuda_graphs=False)
    with pytest.warns(UserWarning, match="operation not permitted when stream is capturing") as warned:
        assert same(draw(70), plain)
    assert CUDAGraph.underway == [], "memory would come from the recording's pool"
    assert len([each for each in warned if "CUDA graphs" in str(each.message)]) == 1
    assert draw.replays == 0


def test_a_replay_that_differs_from_the_step_stops_the_run(draw, monkeypatch: pytest.MonkeyPatch):
    """Here the place of new keys is a number of the host, and stays what it was when it was recorded."""

    def baked(room: Tensor, dim: int, place: Tensor, new: Tensor) -> Tensor:
        return room.narrow(dim, place.on_cpu.item(), 1).copy_(new)

    monkeypatch.setattr(Tensor, "index_copy_", baked)
    with pytest.raises(RuntimeError, match="differs from the step itself by .* set backbone.cuda_graphs=false"):
        draw(70)
    assert draw(70, cuda_graphs=False).lengths.max() == 70


@pytest.mark.parametrize("length", [decoding.FEWEST_TOKENS - 1, decoding.FEWEST_TOKENS])
def test_few_tokens_are_not_worth_a_recording(draw, length):
    draw(length)
    assert draw.replays == (0 if length < decoding.FEWEST_TOKENS else length - 2)


def test_a_step_calls_no_hook_of_a_layer(small_model: QwenVL, processor: PromptProcessor, mixed_prompts: Prompts):
    """FSDP2's would wait for streams, which no recording may; over the prompts all hooks are called."""
    called: list[int] = []
    layers = small_model.model.language_model.layers
    hooks = [layer.register_forward_pre_hook(lambda *args: called.append(1)) for layer in layers]
    sample_groups(small_model, processor, mixed_prompts, 2, Sampling(6))
    for hook in hooks:
        hook.remove()
    assert len(called) == len(layers)


def test_a_window_leaves_keys_and_scores_what_they_are(small_model, processor, mixed_prompts: Prompts, monkeypatch):
    """Without any graph: fixed from the first step on, or from a later one."""
    plain = sample_groups(small_model, processor, mixed_prompts, 3, Sampling(20), torch.Generator().manual_seed(0))
    real = GroupCache.advance
    for start, size in ((0, 20), (5, 100)):

        def advance(cache: GroupCache, start: int = start, size: int = size) -> None:
            if cache.length == start:
                cache.fix_window(size)
            real(cache)

        monkeypatch.setattr(GroupCache, "advance", advance)
        windowed = sample_groups(
            small_model, processor, mixed_prompts, 3, Sampling(20), torch.Generator().manual_seed(0)
        )
        assert same(windowed, plain)


def test_a_pretended_graph_computes_when_it_is_replayed_and_forbids_waiting():
    """As a GPU's does."""
    with pretended_gpu():
        held = torch.zeros(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="non-default stream"):
            graph.capture_begin()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()
            counted = torch.zeros(3, device="cuda")
            counted += held
            doubled = (counted * 2).view(3, 1)
            graph.capture_end()
            assert isinstance(torch.cuda.current_stream(), Stream)
        assert doubled.isnan().all()
        for value in (1.0, 5.0):
            held.fill_(value)
            graph.replay()
            assert doubled.flatten().tolist() == [2 * value] * 3
        with torch.cuda.stream(torch.cuda.Stream()):
            for wait in (lambda: held.tolist(), lambda: held.sum().item(), lambda: held.cpu(), lambda: held[held > 0],
                         lambda: torch.ones(3).to("cuda"), lambda: torch.tensor([1.0], device="cuda")):  # fmt: skip
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin()
                with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                    wait()
                with pytest.raises(RuntimeError, match="previous error during capture"):
                    graph.capture_end()


def test_no_warning_where_all_is_well(draw):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        draw(20)
    assert draw.replays == 18
