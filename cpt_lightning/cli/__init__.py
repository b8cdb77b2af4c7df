"""The command line: ``cpt fit|validate|test|predict|inspect|plan|rehearse|study|report|export``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

VERBS = {
    "fit": "learn a stream of tasks, evaluating everything before, between and after",
    "validate": "evaluate the base, or a checkpoint, on every task and probe",
    "test": "the same on the test split",
    "predict": "write down what the model answers, with verdicts",
    "inspect": "show what the model will be asked: rows, lengths, answers, examples; needs no weights and no GPU",
    "plan": "say what memory a run needs, and whether a GPU has it; needs no weights and no GPU",
    "rehearse": "run the largest steps of a run, and say what they take of memory and time",
    "study": "run a list of arms with several seeds, and compare what they learned, lost and cost",
    "report": "compare runs on one page: what they learned, lost and cost, with intervals and examples",
    "export": "make a folder for transformers or PEFT from a run's checkpoint",
}

USAGE = f"""usage: cpt VERB -c CONFIG.yaml [--ckpt_path CHECKPOINT] [--OPTION VALUE ...]

Continual post-training of multimodal language models: SFT, GRPO and multi-task training of Qwen2.5-VL.

verbs:
{chr(10).join(f"  {verb:10}{text}" for verb, text in VERBS.items())}

for example:
  cpt fit -c configs/demo/grpo.yaml                                        a tiny model, on the CPU, in minutes
  cpt fit -c configs/demo/grpo.yaml --model.group_size 16                  any option of any class, overridden
  cpt fit -c configs/demo/grpo.yaml --print_config                         the resolved configuration
  cpt fit -c configs/demo/grpo.yaml --ckpt_path runs/demo_grpo/last.ckpt   go on where a run ended
  cpt inspect -c configs/demo/grpo.yaml                                    look at the data first
  cpt plan -c configs/demo/grpo.yaml --plan.gpu 80GB                       will it fit?
  cpt rehearse -c configs/demo/grpo.yaml --rehearse.prompt_tokens 75       and how long will it take?
  cpt study configs/studies/toy.yaml --jobs 2                              all arms, compared
  cpt report runs/demo_sft runs/demo_grpo -o compared.html                 runs, on a page
  cpt export runs/demo_grpo --task word2                                   the model after that task, for transformers
  cpt fit --help                                                           all options of a verb
  cpt fit --model.help RFT                                                 those of a model, or other class
"""


def main(args: list[str] | None = None) -> None:
    """Runs a command.

    Args:
        args: What follows ``cpt`` on the command line; taken from there by default.

    Raises:
        SystemExit: Help was asked for, the arguments are wrong, or Ctrl-C was pressed.

    Example:
        >>> main(["--version"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    args = sys.argv[1:] if args is None else args
    # Answered before torch and Lightning are imported, which takes seconds.
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if args else 2)
    if args[0] == "--version":
        from cpt_lightning import __version__

        print(__version__)
        raise SystemExit(0)
    if args[0] not in VERBS:
        print(f"cpt: unknown verb {args[0]!r}; there are {', '.join(VERBS)}\n\n{USAGE}", file=sys.stderr)
        raise SystemExit(2)

    try:
        with _classes_of_the_working_directory():
            _run(*args)
    except KeyboardInterrupt:
        print(f"cpt {args[0]}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        sys.exit(end.code)  # W&B (0.31) learns of a failure by this call, and not by the exception


@contextmanager
def _classes_of_the_working_directory() -> Iterator[None]:
    """A configuration may name them: `python -m` finds them by itself, the script `cpt` does not.

    They come last here, so that none takes a library's place.
    """
    here = [] if sys.flags.safe_path else [os.getcwd()]
    sys.path += here
    try:
        yield
    finally:
        del sys.path[len(sys.path) - len(here) :]


def _run(verb: str, *args: str) -> None:
    """A verb; what it needs is imported now, so that the others need not wait for it."""
    from cpt_lightning.cli.console import tidy

    tidy()
    if verb in ("inspect", "plan", "study", "report", "export"):
        from cpt_lightning.cli.launched import check_alone

        try:
            check_alone(verb)
        except ValueError as error:
            print(f"cpt {verb}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    if verb == "inspect":
        from cpt_lightning.cli.inspect.command import InspectCLI

        InspectCLI(list(args)).inspect()
    elif verb == "plan":
        from cpt_lightning.cli.plan.command import PlanCLI

        PlanCLI(list(args)).plan()
    elif verb == "rehearse":
        from cpt_lightning.cli.rehearse.command import RehearseCLI

        RehearseCLI(list(args)).rehearse()
    elif verb == "study":
        from cpt_lightning.cli.study.command import study_command

        study_command(list(args))
    elif verb == "report":
        from cpt_lightning.cli.report import report_command

        report_command(list(args))
    elif verb == "export":
        from cpt_lightning.cli.export import export_command

        export_command(list(args))
    else:
        from cpt_lightning.cli.lightning_cli import CPTCLI

        CPTCLI([verb, *args])
