"""``cpt study``: runs all arms of a study with all seeds, and compares them."""

from __future__ import annotations

import argparse
import sys

DESCRIPTION = """\
Runs a list of arms, each with several seeds, and compares what they learned, what they forgot and what they cost. All
commands are parsed first, and one that could not begin stops the study before it runs anything. A finished run is
skipped, one that was killed goes on from its last checkpoint, so that the same command may be given again until all is
done. After every call the finished runs are compared: comparison.md, .csv, .tex and .png.

a study's file:
  out: runs/toy_study                 # a folder per arm and seed, and the comparison
  seeds: [0, 1, 2]
  options: --data.steps 40            # for every fit; an arm's own options override them
  arms:
    sft: fit -c configs/demo/sft.yaml
    grpo: fit -c configs/demo/grpo.yaml
    sft_from_grpo:                    # commands one after the other; {grpo} is that arm's folder of the same seed
      - export {grpo} --output {run}/base
      - fit -c configs/demo/sft.yaml --model.init_args.backbone.path {run}/base

A grid runs arms once for each of its values, here sft_lr_0.0001 and sft_lr_0.0003:
  grid: {lr: [1.0e-4, 3.0e-4]}
  arms: {sft: "fit -c configs/demo/sft.yaml --model.init_args.optimizer.init_args.lr {lr}"}

Braces that are meant as such are doubled: --data.target "{{answer}}".

for example:
  cpt study configs/studies/toy.yaml --jobs 2
  cpt study configs/studies/toy.yaml --arms sft grpo --seeds 0
  cpt study configs/studies/toy_rates.yaml --arms "*_on_val" --seeds 0
  cpt study configs/studies/toy.yaml --jobs 4 --gpus 0 1 2 3
  cpt study configs/studies/toy.yaml --only_compare
"""


def study_command(args: list[str]) -> None:
    """Runs ``cpt study``.

    Args:
        args: What follows ``cpt study`` on the command line.

    Raises:
        SystemExit: With 2 after a line that says what is wrong with the study, with 1 if a run failed.
    """
    options = _parser().parse_args(args)
    from cpt_lightning.cli.study.arms import Study  # after --help, for it takes seconds
    from cpt_lightning.cli.study.parsing import check_commands
    from cpt_lightning.cli.study.runner import Runner, is_finished, why_lost
    from cpt_lightning.records import RunFolder
    from cpt_lightning.report import Comparison, Figures, figures_of

    try:
        study = Study.load(options.file).chosen(options.arms, options.seeds)
        runs = list(study.runs())
        lost = []
        if not options.only_compare:
            check_commands(study.path, runs)
            lost = Runner(options.jobs, options.gpus)(runs)
        finished = [run for run in runs if is_finished(run)]
    except ValueError as error:
        print(f"cpt study: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    arms: dict[str, dict[int | str, Figures]] = {
            arm: {run.seed: figures_of(RunFolder(run.folder)) for run in finished if run.arm == arm}
            for arm in study.arms}  # fmt: skip
    comparison = Comparison({arm: seeds for arm, seeds in arms.items() if seeds})
    if finished:
        comparison.save(study.out, title=study.path.stem)
        print(comparison.markdown(study.path.stem))
        print(f"{study.out}/comparison.md, .csv, .tex, .png; a page about them all: cpt report {study.out}/*/seed_*")
    else:
        print("no run is finished yet: nothing to compare")
    if lost:
        print(f"cpt study: {len(lost)} of {len(runs)} runs did not get to their end:", file=sys.stderr)
        for run in lost:
            print(f"  {run.name}: {why_lost(run, lost)}", file=sys.stderr)
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cpt study", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="STUDY.yaml", help="what to run")
    parser.add_argument("--jobs", type=_at_least_one, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--gpus", nargs="+", default=[], metavar="N", help="GPUs by number, one for each job")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="these alone (* stands for anything), and those that they need"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these in place of the study's")
    parser.add_argument("--only_compare", action="store_true", help="run nothing, compare what is finished")
    return parser


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number
