"""Which checkpoints a module takes: those of its own backbone, tuned alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from cpt_lightning.models import Backbone

KEY = "cpt_lightning"
"""Of what is added to a checkpoint here."""
MAY_CHANGE = {"path", "dtype", "gradient_checkpointing", "min_pixels", "max_pixels", "cuda_graphs", "lora.dropout"}
"""Options of the backbone that may differ from the checkpoint's; if path and dtype matter, the frozen weights tell."""
UNUSED = {"full": ("lora.", "quantization."), "lora": ("quantization.",), "qlora": ()}
"""By ``backbone.tuning``, how options begin that mean nothing then."""
NAMED = 3
"""How many names a complaint lists."""


def check_ours(where: str, checkpoint: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that another program wrote with Lightning.

    Raises:
        ValueError: It is one.
    """
    if KEY not in checkpoint:
        raise ValueError(f"{where} was not written by cpt_lightning, or by an early version that kept all weights")


def check_backbone(where: str, before: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuses a checkpoint of a backbone with other options, as far as weights depend on them.

    Args:
        where: Names the checkpoint.
        before: The options that it was written with.
        backbone: That of now.

    Raises:
        ValueError: Names the option, both values and the mend.
    """
    before, now = flattened(before), flattened(asdict(backbone))
    for name in sorted(now.keys() - MAY_CHANGE, key=lambda name: (name != "tuning", name)):
        unused = name.startswith(UNUSED[backbone.tuning])
        if not unused and before.get(name, now[name]) != now[name]:
            raise ValueError(
                f"{where} belongs to backbone.{name}={before[name]}, now it is {now[name]}; restore it, or begin a "
                "new run from the model: `cpt export` it, and name the folder as backbone.path"
            )


def check_frozen(where: str, saved: Mapping[str, Any], backbone: Backbone, fingerprint: str | None) -> None:
    """Refuses a checkpoint that was trained on other frozen weights.

    Args:
        where: Names the checkpoint.
        saved: What it says of its backbone.
        backbone: That of now.
        fingerprint: Of the frozen weights of now; ``None`` where nobody looked.

    Raises:
        ValueError: Names path and dtype of both.
    """
    before = saved["backbone"]
    if None not in (saved["frozen"], fingerprint) and saved["frozen"] != fingerprint:
        raise ValueError(
            f"{where} holds what was trained on other frozen weights: backbone.path={before['path']} with dtype "
            f"{before['dtype']}, now it is {backbone.path} with dtype {backbone.dtype}"
        )


def check_weights(where: str, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses weights of other names or shapes than are expected.

    Raises:
        ValueError: Names some of them.
    """
    if missing := sorted(expected.keys() - saved.keys()):
        raise ValueError(f"{where} lacks {_some(missing)}; give the options of the model that wrote it")
    if strange := sorted(saved.keys() - expected.keys()):
        raise ValueError(
            f"{where} holds {_some(strange)}, which the model does not have; give the options that wrote it"
        )
    for name, weight in expected.items():
        if saved[name].shape != weight.shape:
            raise ValueError(
                f"{where}: {name} has the shape {list(saved[name].shape)}, the model's {list(weight.shape)}; it is of "
                "another backbone"
            )


def flattened(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in groups, by names with dots.

    >>> flattened({"tuning": "lora", "lora": {"rank": 2}})
    {'tuning': 'lora', 'lora.rank': 2}
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        inner = {f"{name}.{key}": part for key, part in flattened(value).items()} if isinstance(value, dict) else None
        found |= {name: value} if inner is None else inner
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more weights" if len(names) > NAMED else "")
