"""``cpt inspect``: parses what ``cpt fit`` parses, loads no weights, and reports on every task and probe."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cpt_lightning.cli.beforehand import BeforehandCLI
from cpt_lightning.cli.inspect.stream import inspect_stream
from cpt_lightning.cli.inspect.tables import console, overview, problem_panel, warning_lines
from cpt_lightning.cli.run_directory import INSPECTION
from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.tasks import SPLITS, Split

DESCRIPTION = """\
Shows what the model will be asked, before a GPU is paid for it. No weights are loaded, only the tokenizer and the image
processor of the backbone, so that the numbers of tokens are those of the run.

Of every task and probe: the rows of each split, image sizes, prompt and target lengths in tokens, rows that would be
left out or would stop the run, the answers and what always giving the most frequent one would earn, and examples as the
model gets them: chat template, image tokens, reference answer, SFT target, and what that target earns under the task's
own reward. <run_dir>/inspect/ gets a contact sheet of each task (<task>.png) and all numbers (report.json). Ends with 1
if it finds what would stop a run or spoil its numbers.

for example:
  cpt inspect -c configs/demo/grpo.yaml                                  the stream of a config
  cpt inspect --data configs/streams/toy_five.yaml                       a stream alone, measured with the embedded base
  cpt inspect -c configs/demo/grpo.yaml --inspect.max_rows null          every row
  cpt inspect -c configs/demo/grpo.yaml --data.max_prompt_tokens 24      what an option of `cpt fit` would do
"""


@dataclass
class Inspection:
    """What to look at.

    Args:
        num_examples: Examples of each task that are printed.
        max_rows: Rows of each split that are measured, evenly spaced; ``null`` measures all.
        split: The only split to look at; all by default.
        num_thumbnails: Rows on the contact sheet.

    Raises:
        ValueError: A number below its least.
    """

    num_examples: int = 2
    max_rows: int | None = 256
    split: Split | None = None
    num_thumbnails: int = 12

    def __post_init__(self) -> None:
        least = {"num_examples": 0, "max_rows": 1, "num_thumbnails": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"inspect.{name}={value}; give at least {lowest}")

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits to look at."""
        return SPLITS if self.split is None else (self.split,)


class InspectCLI(BeforehandCLI):
    """Makes the stream that the arguments describe, and inspects it."""

    verb, options, description = "inspect", Inspection, DESCRIPTION

    def inspect(self) -> None:
        """Measures, prints, writes.

        Raises:
            SystemExit: With 1, if there is something to mend.
        """
        options: Inspection = self.config_init.inspect
        folder = Path(self.config.run_dir) / INSPECTION
        folder.mkdir(parents=True, exist_ok=True)
        out = console()
        backbone, prefixes = self.model.backbone.path, self.model.prefixes
        report = inspect_stream(self.datamodule, self._processor(), backbone, prefixes, options, folder, out)
        path = folder / "report.json"
        path.write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        out.print(
            overview(report),
            *warning_lines(report.warnings),
            problem_panel(report.problems),
            f"\nall numbers: {path}",
            sep="\n",
        )
        if report.problems:
            raise SystemExit(1)

    def _processor(self) -> PromptProcessor:
        try:
            return self.model.processor
        except OSError as error:
            path = self.model.backbone.path
            self.parser.error(
                f"the tokenizer and image processor of backbone.path={path!r} cannot be loaded: {error}\n"
                "--model.backbone.path tiny counts with the embedded base's instead"
            )
            raise
