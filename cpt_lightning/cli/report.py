"""``cpt report``: what runs learned, lost and cost, on one page."""

from __future__ import annotations

import argparse
import sys

DESCRIPTION = """\
Compares finished runs, or looks at one: what was learned, what was lost, what it cost, with 95 % intervals. Writes one
HTML page that needs nothing else, the same as Markdown, a table as CSV and LaTeX, and a folder of pictures (PNG, SVG).

Runs whose configurations differ only in seed and folder are seeds of one arm, and averaged; ARM=RUN says it otherwise.
The first arm is the one that the others are held against. A run that is not finished is shown as far as it came;
folders and files beside runs in which none was begun are passed over.

for example:
  cpt report runs/demo_grpo                                             one run
  cpt report runs/demo_sft runs/demo_grpo -o runs/compared.html         SFT against GRPO
  cpt report runs/toy/*/seed_* -o runs/toy/report.html                  all arms and seeds of a study
  cpt report sft=runs/a sft=runs/b grpo=runs/c                          arms by name
"""


def report_command(args: list[str]) -> None:
    """Runs ``cpt report``.

    Args:
        args: What follows ``cpt report`` on the command line.

    Raises:
        SystemExit: With 2 after a line that says which run or file is wrong.
    """
    options = _parser().parse_args(args)
    if not options.output.endswith(".html"):
        _refuse(f"--output={options.output} must end in .html; the other files are named after it")
    from cpt_lightning.report import Report, arms_of, runs_among  # after --help, for it takes seconds

    runs = runs_among(options.runs)
    try:
        report = Report(arms_of(runs), options.title, options.images)
        written = report.save(options.output)
    except (ValueError, OSError) as error:  # of a run's files, of its data, or of the page's
        _refuse(str(error))
    if passed_over := [each for each in options.runs if each not in runs]:
        print(f"passed over, for no run was begun there: {', '.join(passed_over)}")
    for section in report.sections:
        print(f"{section.arm.name} {section.sentence}")
    for caution in report.cautions:
        print(f"note: {caution}")
    print("written: " + ", ".join(map(str, written)))


def _refuse(why: str) -> None:
    print(f"cpt report: error: {why}", file=sys.stderr)
    raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cpt report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or ARM=FOLDER")
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE.html", help="default: report.html")
    parser.add_argument(
        "--images", action="store_true", help="show the images of examples: opens the data that the configs name"
    )
    parser.add_argument("--title", default="What was learned, and what was lost", help="heading of the page")
    return parser
