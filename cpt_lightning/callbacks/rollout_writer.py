"""Rollouts as data: what the model answered to training rows, written down to be learned from."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL.Image import Image

from cpt_lightning.models.fingerprint import model_fingerprint
from cpt_lightning.records.files import append_lines, replace_text
from cpt_lightning.rollouts import Selection
from cpt_lightning.rollouts.selection import FATES, Fate
from cpt_lightning.types import Batch, Evaluation

VERSION = 1
"""Of the summary."""
SUFFIXES = (".jsonl", ".parquet")


class RolloutWriter(Callback):
    """Writes the completions of ``cpt predict`` as rows that SFT reads, one per completion that is kept.

    A row has ``messages`` (the prompt's turns and the completion as the assistant's) and ``images`` (pictures beside
    the file, by path), which make it a row for other trainers too; and ``task``, ``row_id``, ``answers``,
    ``completion_ids``, ``accuracy``, ``parts`` (of the reward), ``logprob_sum`` and ``logprob_mean`` (in nats, as
    sampled: at the temperature, and with the hint if there was one), ``num_tokens``, ``finished``, ``draw`` (which of
    the row's completions), ``model`` (fingerprint of the weights that answered), ``sampling`` and ``seed``. Rows come
    in the order of the data, on any number of ranks.

    The file appears when it is complete; until then it is called ``<file>.part``. Beside it ``<name>_summary.json``
    says how many completions were sampled, kept and left out for which reason, and whether all rows were asked.

    Args:
        file: Name in the run directory, or a path; ``.jsonl`` or ``.parquet``.
        selection: Which completions are kept.

    Raises:
        ValueError: The file is of another kind.
    """

    def __init__(
        self,
        file: str = "rollouts.jsonl",
        selection: Selection = Selection(),
    ) -> None:
        if Path(file).suffix not in SUFFIXES:
            raise ValueError(f"file={file!r} must end in {' or '.join(SUFFIXES)}")
        self.file = file
        self.selection = selection
        self._about: dict = {}
        self._counts: Counter[Fate] = Counter()

    # -- hooks -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what would come to nothing, before the model is loaded.

        Raises:
            ValueError: The module answers every row once only, or the file is there already.
        """
        if stage != "predict":
            return
        if pl_module.attempts is None:
            raise ValueError("RolloutWriter needs model.init_args.attempts, such as {group_size: 8}")
        path = self._path(trainer)
        if path.exists():  # every rank asks before the first one begins to write
            raise ValueError(f"{path} is there already: take it away, or give RolloutWriter another file")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the file."""
        trainer.predict_loop.return_predictions = False  # pictures of all rows would be kept in memory
        self._counts = Counter()
        attempts = asdict(pl_module.attempts)
        self._about = {
            "model": model_fingerprint(pl_module.model),
            "sampling": {"group_size": attempts["group_size"], **attempts["sampling"], "hint": attempts["hint"]},
            "seed": pl_module.seed,
        }
        part = _part(self._path(trainer))
        if trainer.is_global_zero:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Evaluation,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the rows of a batch; every rank has as many batches, and a run of neighbouring rows of each."""
        path = self._path(trainer)
        mine = list(self._rows(outputs, pl_module, path))
        for rank in range(trainer.world_size):
            rows = trainer.strategy.broadcast(mine, src=rank)
            if trainer.is_global_zero:
                append_lines(_part(path), rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the complete file its name.

        Raises:
            ValueError: No completion is kept; says how many are left out for which reason.
        """
        path, total = self._path(trainer), Counter[Fate]()
        for rank in range(trainer.world_size):
            total += trainer.strategy.broadcast(self._counts, src=rank)
        told = ", ".join(f"{total[fate]} {fate}" for fate in FATES if total[fate])
        if not total["kept"]:
            raise ValueError(
                f"no completion is kept for {path}: {told or 'there was none'}; loosen the selection of RolloutWriter"
            )
        whole = trainer.limit_predict_batches == 1.0
        if trainer.is_global_zero:
            self._summarise(path, total, whole)
            finish(_part(path), path)
        limited = "" if whole else f"; trainer.limit_predict_batches={trainer.limit_predict_batches} left out the rest"
        rank_zero_info(f"rollouts: {path} ({told}{limited})")

    def _summarise(self, path: Path, counts: Counter[Fate], whole: bool) -> None:
        summary = {
            "version": VERSION,
            "file": path.name,
            "all_rows": whole,
            "num_completions": counts.total(),
            "verdicts": {fate: counts[fate] for fate in FATES},
            **self._about,
        }
        replace_text(summary_of(path), json.dumps(summary, indent=2) + "\n")

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir) / self.file  # log_dir is a broadcast: all ranks ask

    # -- rows ------------------------------------------------------------------------------------------------------

    def _rows(self, outputs: Evaluation, module: LightningModule, path: Path) -> Iterator[dict]:
        """What is kept of a batch."""
        assert outputs.completions is not None
        lengths, size = outputs.completions.lengths.tolist(), module.attempts.group_size
        ends = outputs.completions.ended(module.processor.stop_token_ids).tolist()
        for start in range(0, len(lengths), size):
            if not outputs.valid[start]:
                continue
            group = slice(start, start + size)
            fates = self.selection.judge(outputs.texts[group], outputs.scores[group], lengths[group], ends[group])
            self._counts.update(fates)
            for draw, fate in enumerate(fates):
                if fate == "kept":
                    row = _row(outputs, start + draw, path)
                    yield {**row, "finished": ends[start + draw], "draw": draw, **self._about}


def summary_of(path: Path) -> Path:
    """The file that tells how rollouts came about."""
    return path.with_name(f"{path.stem}_summary.json")


def _row(outputs: Evaluation, index: int, path: Path) -> dict:
    """A row with its completion."""
    example, scores = outputs.examples[index], outputs.scores[index]
    assert outputs.completions is not None and outputs.completions.logps is not None
    mask = outputs.completions.mask[index]
    logprobs = outputs.completions.logps[index][mask].double()
    reply = {"role": "assistant", "content": [{"type": "text", "text": outputs.texts[index]}]}
    return {
        "task": example.task,
        "row_id": example.row_id,
        "messages": [*example.messages, reply],
        "images": [_keep_image(image, path) for image in example.images],
        "answers": [example.gold] if isinstance(example.gold, str) else list(example.gold),
        "completion_ids": outputs.completions.ids[index][mask].tolist(),
        "accuracy": scores["accuracy"],
        "parts": scores,
        "logprob_sum": logprobs.sum().item(),
        "logprob_mean": logprobs.mean().item(),
        "num_tokens": len(logprobs),
    }


def _keep_image(image: Image, path: Path) -> str:
    """The path of a picture from the file of rollouts; a picture that several rows show is kept once."""
    content = f"{image.size}".encode() + image.tobytes()
    name = Path(f"{path.stem}_images") / f"{blake2b(content, digest_size=12).hexdigest()}.png"
    target = path.parent / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        image.save(part, format="PNG")
        os.replace(part, target)
    return name.as_posix()


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def finish(part: Path, path: Path) -> None:
    """Turns the lines of a complete collection into the file that was asked for, in one go."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with part.open(encoding="utf-8") as lines:
            table = pa.Table.from_pylist([json.loads(line) for line in lines])
        whole = path.with_name(f"{path.name}.whole")
        pq.write_table(table, whole)
        os.replace(whole, path)
        part.unlink()
    else:
        os.replace(part, path)
