"""Builds the embedded base from nothing: tokenizer, weights, scores, as an ordinary Qwen2.5-VL folder.

    python -m cpt_lightning.models.tiny.build --out DIR

The recipe is dense supervision (lessons.py), answers weighted, Muon for the matrices (pretraining.py). A second, short
phase adds a few pictures of the shifted families, which makes the base partly competent on them: able enough to be
rewarded now and then, far from done.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.models.tiny.config import tiny_config
from cpt_lightning.models.tiny.packing import MEAN, MERGE, PATCH, STD, TEMPORAL
from cpt_lightning.models.tiny.pretraining import FIRST_PHASE, SHIFTED, Phase, pretrain
from cpt_lightning.models.tiny.tokenizer import train_tokenizer
from cpt_lightning.tasks import Prompt, Row, Split, load_image
from cpt_lightning.tasks.toy import FAMILIES, ToyWorld
from cpt_lightning.tasks.toy_scenes import SIZE
from cpt_lightning.types import Prompts

FOLDER = Path(__file__).parent / "base"


def build(
    out: Path, steps: int = 2500, shifted_steps: int = 240, seed: int = 0, num_scored: int = 300, save_every: int = 0
) -> dict:
    """Trains the tiny base and writes its folder.

    Args:
        out: Folder to write.
        steps: Steps of the first phase.
        shifted_steps: Steps of the second phase, which adds the shifted families.
        seed: Of weights and data; the same seed and number of threads give the same weights.
        num_scored: Validation and test rows per family to score at the end; 0 leaves ``scores.json`` out.
        save_every: Steps between saves on the way; 0 saves at the end only.

    Returns:
        What ``scores.json`` holds; empty without scores.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    model = QwenVL._from_config(tiny_config(tokenizer), attn_implementation="eager", dtype=torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    phases = [Phase(steps, 1.5e-3, FIRST_PHASE), Phase(shifted_steps, 3e-4, FIRST_PHASE | SHIFTED)]

    def save_now_and_then(step: int) -> None:
        if save_every and step % save_every == 0:
            save(model, tokenizer, out)

    pretrain(model, tokenizer, phases, seed, save_now_and_then)
    save(model, tokenizer, out)
    minutes = round((time.monotonic() - started) / 60, 1)
    about = {"seed": seed, "steps": steps, "shifted_steps": shifted_steps, "minutes": minutes}
    return score(out, num_scored, about) if num_scored else {}


def save(model: QwenVL, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Writes the folder of a real Qwen2.5-VL: weights in bfloat16, configurations, tokenizer, image settings."""
    token_id = tokenizer.convert_tokens_to_ids
    tokenizer.save_pretrained(out)
    config = model.config.to_dict() | {"dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(type(model.config)(**config).to_dict(), indent=2) + "\n")
    GenerationConfig(
        eos_token_id=[token_id("<|im_end|>"), token_id("<|endoftext|>")], pad_token_id=token_id("<|endoftext|>")
    ).save_pretrained(out)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        # Every square image becomes 3 x 3 visual tokens, the only size this small base has seen.
        "min_pixels": SIZE**2,
        "max_pixels": SIZE**2,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def score(folder: Path, num_rows: int, about: dict) -> dict:
    """Writes ``scores.json``: how well the base answers each family of the toy world of seed 0.

    ``accuracy`` is the share of rows whose greedy answer, inside its tags, is right to the letter. ``mixed_groups``, on
    a third of the validation rows, is the share with 8 answers sampled at temperature 1 that are neither all right nor
    all wrong: of these GRPO can learn.
    """
    torch.manual_seed(0)
    model = QwenVL.from_pretrained(folder, dtype=torch.float32).eval()
    processor = PromptProcessor.load(str(folder))
    accuracy: dict[Split, dict[str, float]] = {"val": {}, "test": {}}
    mixed: dict[str, float] = {}
    for family in FAMILIES:
        world = ToyWorld(family, num_val=num_rows, num_test=num_rows)
        for split, by_family in accuracy.items():
            by_family[family] = round(float(verdicts(model, processor, list(world.split(split))).mean()), 4)
        some = world.split("val")[: max(1, num_rows // 3)]
        right = verdicts(model, processor, some, group_size=8).mean(axis=1)
        mixed[family] = round(float(((right > 0) & (right < 1)).mean()), 4)
    scores = {"num_rows": num_rows, "seed": 0, "built_with": about, "accuracy": accuracy, "mixed_groups": mixed}
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


@torch.inference_mode()
def verdicts(model: QwenVL, processor: PromptProcessor, rows: Sequence[Row], group_size: int = 1) -> np.ndarray:
    """``[num_rows, group_size]`` bool: whether each answer, by transformers' own generation, is right to the letter.

    A group of one is greedy; larger ones are sampled at temperature 1.
    """
    sampled = {"do_sample": True, "top_k": 0, "num_return_sequences": group_size} if group_size > 1 else {}
    right = []
    for start in range(0, len(rows), 50):
        batch = rows[start : start + 50]
        chats = [Prompt().messages(row.question, len(row.images)) for row in batch]
        prompts = processor.encode(chats, [[load_image(image) for image in row.images] for row in batch])
        ids = model.generate(**_inputs(model, prompts), max_new_tokens=32, **{"do_sample": False, **sampled})
        texts = processor.tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
        answers = [re.search(r"<answer>(.*?)</answer>", text) for text in texts]
        golds = [row.answer for row in batch for _ in range(group_size)]
        right += [answer is not None and answer[1] == gold for answer, gold in zip(answers, golds, strict=True)]
    return np.array(right).reshape(len(rows), group_size)


def _inputs(model: QwenVL, prompts: Prompts) -> dict:
    """What ``generate`` takes; no key for pictures where there is none, or transformers 5 reads None as a picture."""
    pictures = {"pixel_values": prompts.pixel_values, "image_grid_thw": prompts.image_grid_thw}
    return {
        "input_ids": prompts.input_ids,
        "attention_mask": prompts.attention_mask,
        "mm_token_type_ids": (prompts.input_ids == model.config.image_token_id).int(),
        **(pictures if prompts.pixel_values is not None else {}),
    }


def score_table(scores: dict) -> str:
    """The scores as the Markdown table of the card."""
    columns = [scores["accuracy"]["val"], scores["accuracy"]["test"], scores["mixed_groups"]]
    lines = ["| family | accuracy, val | accuracy, test | mixed groups |", "| --- | --- | --- | --- |"]
    for family in FAMILIES:
        lines.append(f"| {family} | " + " | ".join(f"{column[family]:.2f}" for column in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Builds the embedded tiny base from nothing.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    parser.add_argument("--steps", type=int, default=2500, help="steps of the first phase")
    parser.add_argument("--shifted-steps", type=int, default=240, help="steps that add the shifted families")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-scored", type=int, default=300, help="rows per family and split to score")
    parser.add_argument("--save-every", type=int, default=250, help="steps between saves on the way")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; another number changes the last bits")
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    scores = build(**options)
    if scores:
        print(score_table(scores))


if __name__ == "__main__":
    main()
