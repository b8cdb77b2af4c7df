"""The images that test rows ask about, taken from the data that a run's configuration names."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image

from cpt_lightning.records import RunFolder
from cpt_lightning.report.examples import Changes
from cpt_lightning.tasks import Task

SIDE = 280
"""Pixels of the longer side, as they are shown."""


def show_images(run: RunFolder, changes: Sequence[Changes]) -> None:
    """Gives every change that is shown the images of its row.

    Raises:
        ValueError: The run's data cannot be opened, or holds other rows by now.
    """
    data = (run.config or {}).get("data", {})
    known = {**(data.get("tasks") or {}), **(data.get("probes") or {})}
    for each in changes:
        if not (shown := [*each.gained, *each.lost]):
            continue
        if each.name not in known:
            raise ValueError(f"{run.path}/config.yaml does not say where the rows of {each.name} come from")
        examples = _task(run, each.name, known[each.name]).examples(data.get("evaluate_on", "test"), each.name)
        for change in shown:
            example = examples[change.position] if change.position < len(examples) else None
            if example is None or example.row_id != change.row_id:
                raise ValueError(
                    f"{run.path}: row {change.position} of {each.name} was {change.row_id}, now the data has "
                    f"{example.row_id if example else 'no such row'}; report without --images, or restore the data"
                )
            change.images.extend(map(address, example.images))


def address(image: Image.Image) -> str:
    """A small copy of an image that is its own address: the page refers to no file."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _task(run: RunFolder, name: str, options: dict[str, Any]) -> Task:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=Task)
    try:
        return parser.instantiate(parser.parse_object({"task": options})).task
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{run.path}/config.yaml: {name} cannot be opened: {error}") from error
