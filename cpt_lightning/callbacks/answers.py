"""The answers of an evaluation, gathered from all ranks."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from cpt_lightning.types import Evaluation, Example


class Answers(Callback):
    """Collects what the model says in an evaluation, with verdicts; what is done with it a subclass knows."""

    def __init__(self) -> None:
        self._rows: list[tuple[tuple[int, int, int], dict]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an evaluation that was not finished or not needed."""
        self._rows = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Evaluation, batch, batch_idx: int, *_
    ) -> None:
        """Takes the answers of a batch."""
        if trainer.sanity_checking:
            return
        for position, example in enumerate(outputs.examples):
            if outputs.valid[position]:
                row = answer(example, outputs.texts[position], outputs.scores[position])
                # Every rank has a run of neighbouring rows of each batch, so this key is the order of a single rank.
                self._rows.append(((batch_idx, trainer.global_rank, position), row))

    def take(self, trainer: Trainer) -> list[dict]:
        """The collected answers of all ranks, in the order of the evaluation; all ranks must ask."""
        rows = [row for rank in range(trainer.world_size) for row in trainer.strategy.broadcast(self._rows, src=rank)]
        self._rows = []
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def answer(example: Example, completion: str, scores: dict[str, float]) -> dict:
    """One answer with its verdict, as a line of ``samples.jsonl``."""
    return {
        "row_id": example.row_id,
        "task": example.task,
        "prompt": prompt_text(example.messages),
        "gold": example.gold,
        "completion": completion,
        "accuracy": scores["accuracy"],
        "parts": scores,
    }


def prompt_text(messages: list[dict]) -> str:
    """A chat prompt as one text; an image stands as ``<image>``.

    >>> prompt_text([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}])
    '<image>What is it?'
    """
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join("<image>" if part["type"] == "image" else part["text"] for part in parts)
        turns.append(text if message["role"] == "user" else f"[{message['role']}] {text}")
    return "\n".join(turns)
