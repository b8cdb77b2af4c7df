"""The model card of an exported folder: what was learned, how well, from what, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import yaml

from cpt_lightning import __version__
from cpt_lightning.models import Backbone
from cpt_lightning.models.folders import lasting_name
from cpt_lightning.models.quantization import KEPT_WHOLE
from cpt_lightning.records.markdown import markdown_cell
from cpt_lightning.records.matrix import AccuracyMatrix
from cpt_lightning.rollouts.prefixes import USES

Kind = Literal["adapter", "merged", "full"]
"""What a folder holds: a LoRA adapter, the base with it merged in, or a model of which everything was tuned."""

WHAT = {
    "adapter": "A LoRA adapter of",
    "merged": "With a LoRA adapter merged in, a descendant of",
    "full": "Tuned from",
}

ADAPTERS = {
    "renewed": "Each had an adapter, merged into the weights before the next began: all of them are in these weights.",
    "per_task": "Each had an adapter of its own over the base. This is the last one alone: scores of tasks before it "
    "are those of their own adapters, which are exported from the checkpoints of these tasks.",
}
"""What became of the adapters, where it was not one that learned all tasks."""

FOUR_BITS = {
    "adapter": "It was learned, and scored, over the base's language model in four bits ({quant_type}), as it is "
    "loaded here.",
    "merged": "The adapter was learned, and scored, over the base's language model in four bits ({quant_type}), and is "
    "merged into the base as it is: answers differ from those that were scored.",
}
"""What scores of QLoRA are those of."""

LIBRARIES = ("torch", "transformers", "peft", "lightning")

LOADING = {
    "whole": """\
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

model = Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
""",
    "adapter": """\
from peft import PeftModel
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

base = Qwen2_5_VLForConditionalGeneration.from_pretrained({base}, dtype="{dtype}")
model = PeftModel.from_pretrained(base, FOLDER, autocast_adapter_dtype=False)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
""",
    "adapter of four bits": """\
from peft import PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{quantization.quant_type}",
    bnb_4bit_use_double_quant={quantization.double_quant},
    bnb_4bit_compute_dtype="{quantization.compute_dtype}",
    llm_int8_skip_modules={kept_whole},
)
base = Qwen2_5_VLForConditionalGeneration.from_pretrained({base}, dtype="{dtype}", quantization_config=four_bits)
model = PeftModel.from_pretrained(base, FOLDER, autocast_adapter_dtype=False)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
""",
}

SHOWN = {
    "data": ("stages", "prompts_per_step", "passes", "steps", "evaluate_on", "style", "target", "mixing", "seed"),
    "trainer": ("strategy", "devices", "num_nodes", "precision", "accumulate_grad_batches"),
}
"""What the card tells of the configuration, besides all of the model's options."""


def model_card(
    name: str,
    kind: Kind,
    backbone: Backbone,
    dtype: str,
    stages: list[str],
    within: str | None = None,
    matrix: AccuracyMatrix | None = None,
    config: dict | None = None,
    prefixes: Mapping[str, str] | None = None,
) -> str:
    """The text of the card.

    Args:
        name: Of the export.
        kind: What the folder holds.
        backbone: What training began from, and how it was tuned.
        dtype: Precision of the weights.
        stages: Names of the stages that were learned, in order.
        within: Name of the stage that had begun.
        matrix: The run's record up to the last of them; ``None`` where it has none.
        config: The run's configuration, if it has one.
        prefixes: What replies were made to begin with, as ``prefixes_of`` tells.
    """
    base, along_stream, four_bits = lasting_name(backbone.path), backbone.lora.along_stream, backbone.quantization
    is_adapter, is_quantized = kind == "adapter", backbone.tuning == "qlora"
    header = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["continual-learning", "cpt_lightning", *(["lora"] if is_adapter else [])],
    }
    if base.count("/") == 1 and not base.startswith("."):  # else the hub would refuse the name
        header["base_model"] = base
    loading = LOADING["whole" if not is_adapter else "adapter of four bits" if is_quantized else "adapter"]
    code = loading.format(base=_base_in_code(base), dtype=dtype, quantization=four_bits, kept_whole=KEPT_WHOLE)
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}",
        f"{WHAT[kind]} `{base}` (weights in {dtype}), by continual post-training with cpt_lightning {__version__}.",
        f"Learned, in this order: {markdown_cell(_learned(stages, within))}.",
        *([ADAPTERS[along_stream]] if along_stream in ADAPTERS else []),
        *([FOUR_BITS[kind].format(quant_type=four_bits.quant_type)] if is_quantized else []),
        *([_begun(prefixes)] if prefixes else []),
        f"```python\n{code}```",
        "## Scores\n\n" + ("Not measured at this point." if within else _scores(matrix, len(stages))),
        *([f"## Settings\n\n```yaml\n{yaml.safe_dump(_shown(config), sort_keys=False)}```"] if config else []),
        "## Made with\n\n" + ", ".join(f"{library} {version(library)}" for library in LIBRARIES) + ".",
        "## Licence\n\nThat of the base, and of the data that was learned, which this program does not know: look it "
        "up before you pass these weights on.",
    ]
    return "\n\n".join(lines) + "\n"


def _learned(stages: list[str], within: str | None) -> str:
    return ", and ".join(filter(None, [", ".join(stages), within and f"{within} at least in part"])) or "nothing"


def _begun(prefixes: Mapping[str, str]) -> str:
    """How replies were begun, which nothing else in the folder tells whoever loads it."""
    names = {f"{option}.prefix": use for option, use in USES.items()}
    uses = {text: [names[option] for option, other in prefixes.items() if other == text] for text in prefixes.values()}
    said = ", and ".join(f"in {' and '.join(where)} with `{text}`" for text, where in uses.items())
    if "evaluation.prefix" in prefixes:
        scores = (
            "The scores are those of replies that go on behind it: for such replies it has to stand at the prompt's end"
        )
    else:
        scores = "It was evaluated without, and the scores are those of replies that begin as the model likes"
    return f"Every reply was made to begin {said}. {scores}."


def _base_in_code(base: str) -> str:
    """``tiny`` is known by that name to cpt_lightning alone; it lies in the adapter's folder."""
    return 'FOLDER + "/base"' if base == "tiny" else repr(base)


def _scores(matrix: AccuracyMatrix | None, num_stages: int) -> str:
    if matrix is None or not 0 < num_stages <= len(matrix.rows):
        return "Not measured at this point."
    row, base = matrix.rows[num_stages - 1], matrix.zero_shot or {}
    lines = ["| | accuracy | of the base | rows |", "|---|---|---|---|"]
    for name in (name for name in matrix.names if name in row):
        before = f"{100 * base[name]['accuracy']:.1f}" if name in base else ""
        label = f"{'' if name in matrix.tasks else 'probe '}{markdown_cell(name)}"
        lines.append(f"| {label} | {100 * row[name]['accuracy']:.1f} | {before} | {row[name]['num_samples']} |")
    return "\n".join(["Accuracy in per cent, by generated answers.", "", *lines])


def _shown(config: dict) -> dict:
    parts = {part: {name: config.get(part, {}).get(name) for name in names} for part, names in SHOWN.items()}
    given = {part: {n: value for n, value in values.items() if value is not None} for part, values in parts.items()}
    return {"seed_everything": config.get("seed_everything"), "model": config.get("model"), **given}


def config_of(run: Path) -> dict | None:
    """The configuration that a run directory keeps, if it does."""
    file = run / "config.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
