"""``cpt export``: a folder for transformers or PEFT from a run's checkpoint."""

from __future__ import annotations

import argparse
import sys

DESCRIPTION = """\
Turns a checkpoint of a run into a folder that plain transformers and PEFT load: with LoRA a PEFT adapter, with full
tuning a whole model; beside the weights tokenizer, image processor, generation config and a model card. The folder
appears when it is complete; nothing that exists is replaced unless --overwrite says so.

for example:
  cpt export runs/demo_grpo                          where the run stands last: runs/demo_grpo/exports/last
  cpt export runs/demo_grpo --task word2             after that task: runs/demo_grpo/exports/1_word2
  cpt export runs/lora --merge --output my_model     the adapter merged into its base: a whole model
  cpt export runs/renewed --merge                    adapters that were renewed along the stream: only this way
  cpt export runs/lora --push me/my_model            upload it too (a new repository is private)

what it is good for:
  cpt test -c runs/demo_grpo/config.yaml --model.init_args.backbone.path runs/demo_grpo/exports/1_word2
  cpt fit -c other.yaml --model.backbone.path runs/demo_grpo/exports/last        begin from it

Exports during a run: cpt fit ... --export.when every_task
"""


def export_command(args: list[str]) -> None:
    """Runs ``cpt export``.

    Args:
        args: What follows ``cpt export`` on the command line.

    Raises:
        SystemExit: With 2 after a line that says what is wrong, with 1 if the upload failed.
    """
    options = _parser().parse_args(args)
    from cpt_lightning.export import check_pushable, export, push  # after --help, for it takes seconds

    try:
        if options.push:
            check_pushable(options.push)
        folder = export(options.run, options.task, options.merge, options.output, options.overwrite)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"cpt export: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"exported: {folder}")
    if options.push:
        try:
            print(f"uploaded: {push(folder, options.push)}")
        except ConnectionError as error:
            print(f"cpt export: error: {error}", file=sys.stderr)
            raise SystemExit(1) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cpt export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="directory of the run")
    parser.add_argument("--task", metavar="NAME", help="task after which; where the run stands last by default")
    parser.add_argument("--merge", action="store_true", help="merge the LoRA adapter into its base")
    parser.add_argument("--output", metavar="DIR", help="folder to write; RUN/exports/<checkpoint> by default")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists, and is a model's")
    parser.add_argument("--push", metavar="ID", help="upload the folder to this repository of the Hugging Face hub")
    return parser
