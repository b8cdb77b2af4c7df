"""Every real reference answer, graded in all the ways models write it, and against other rows' answers.

    python benchmarks/graders_on_real_text.py

A reference must be right however it is written, and wrong for another row's unless both mean the same. Prints the
counts of each task and every exception with its reason, then where the graders of other libraries disagree and why.
Results: ``benchmarks/results/graders``.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from graders_others import compare, grader_versions, meaning_shared
from graders_rows import KINDS, Answer, answers
from record import circumstances, write_record

from cpt_lightning.rewards import grade

RESULTS = Path(__file__).parent / "results" / "graders"
STYLES = {"bare": "{}", "full stop": "{}.", "sentence": "The answer is {}.", "boxed": r"\boxed{{{}}}"}
READING = """
## Reading it

- *Ways*: bare, boxed, tagged, after a thought that holds another answer, with a full stop, bold, in a sentence, after
  "Final answer:", in capitals; for letters "(B)", "Option B", "B. text" and the option's text; for numbers a unit and
  "There are 3 of them."; for formulas dollars and "x ="; for "unanswerable" its synonyms.
- *Shuffled*: each row with another row's reference, in four styles. *Pairs*: every reference for every other one of its
  task; of multiple choice every wrong option, by letter and by text.
- An exception without a reason would be listed as **unexplained**; tests/rewards/test_real_text.py asserts that there
  is none among the shuffled, and none among the pairs of Super-CLEVR and MMLU-Pro.
- Not seen by any of these counts: references that a person would call the same and that no grader here does, such as
  Gray and Grey, Motorbike and Motorcycle (Super-CLEVR), "endocrine" and "endocrine system" (PathVQA).
- The others are given what they are made for: mathruler what stood in the box, math-verify a box or a sentence,
  lmms-eval the bare reply. That they read no lead-in is a choice, not a fault, but as a reward it pays for a style.
- On bare replies lmms-eval's VQA normalisation and ours agree on every pair but for sentences and for true and yes; so
  do mathruler's and ours but for number words, articles, capitals and the dollar sign.
- Where only the other says right it pays for wrong answers: math-verify reads a formula before a full stop by one of
  its numbers (`64 - 16 \\pi.` is right for 16), and mathruler takes units out of words (`dog` is right for `dog years`,
  a pair of VizWiz that this draw does not hold).
"""


@dataclass
class Counts:
    """What became of one task's references.

    Args:
        kind: How they are graded.
        num_rows: Rows.
        num_distinct: Different references.
        num_ways: Completions that say their own row's reference, one way each.
        missed: Those of them graded as wrong: ``(way, completion, reference)``.
        num_shuffled: Completions that say another row's reference.
        accepted_shuffled: Those of them graded as right, with the reason: ``(said, reference, reason)``.
        num_pairs: Completions that say another reference, of all pairs of different ones.
        accepted_pairs: Likewise.
        grade_us: Mean time of a grade, in microseconds.
    """

    kind: str
    num_rows: int = 0
    num_distinct: int = 0
    num_ways: int = 0
    missed: list[tuple[str, str, str]] = field(default_factory=list)
    num_shuffled: int = 0
    accepted_shuffled: list[tuple[str, str, str | None]] = field(default_factory=list)
    num_pairs: int = 0
    accepted_pairs: list[tuple[str, str, str | None]] = field(default_factory=list)
    grade_us: float = 0.0


def main() -> None:
    """Grades everything, prints it, writes record and README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    logging.disable()  # math-verify warns of every text that it cannot parse
    counts = {name: count(name, all_pairs=True) for name in KINDS}
    comparisons = [row for name in KINDS for row in compare(name)]
    text = "\n".join([*task_table(counts), *exceptions(counts), *agreement(comparisons)])
    print(text)
    results = {
        "graders": grader_versions(),
        "counts": {name: asdict(each) for name, each in counts.items()},
        "comparisons": comparisons,
    }
    write_record(options.out / "graders.json", results)
    where = f"`{circumstances()['command']}`, commit {circumstances()['commit']}, {grader_versions()}"
    (options.out / "README.md").write_text(f"# Graders on real text\n\n{where}\n\n{text}\n{READING}", encoding="utf-8")


def count(name: str, all_pairs: bool) -> Counts:
    """Grades a task's references in every way, against shuffled ones and, if asked, against all others."""
    rows = answers(name)
    counts = Counts(KINDS[name], num_rows=len(rows), num_distinct=len({row.text for row in rows}))
    start = time.perf_counter()
    for row in rows:
        for way, completion in row.ways():
            counts.num_ways += 1
            if grade(completion, row.gold, row.kind) != 1:
                counts.missed.append((way, completion, row.text))
    counts.grade_us = (time.perf_counter() - start) / counts.num_ways * 1e6
    counts.num_shuffled, counts.accepted_shuffled = accepted(shuffled(rows))
    if all_pairs:
        counts.num_pairs, counts.accepted_pairs = accepted(options(rows) if rows[0].options else pairs(rows))
    return counts


def accepted(wrong: Iterator[tuple[str, str, Answer]]) -> tuple[int, list[tuple[str, str, str | None]]]:
    """How many were tried, and each that was graded as right: what it says, for which reference, and why."""
    num_tried, right = 0, {}
    for said, completion, row in wrong:
        num_tried += 1
        if grade(completion, row.gold, row.kind):
            right[said, row.text] = meaning_shared(said, row.text)
    return num_tried, [(said, gold, why) for (said, gold), why in right.items()]


def shuffled(rows: list[Answer]) -> Iterator[tuple[str, str, Answer]]:
    """Every row with a reference drawn from those that differ from its own, in several styles."""
    rng = random.Random(0)
    for row in rows:
        other = rng.choice([other.text for other in rows if other.text.lower() != row.text.lower()])
        yield from ((other, template.format(other), row) for template in STYLES.values())


def pairs(rows: list[Answer]) -> Iterator[tuple[str, str, Answer]]:
    """Every reference for every other one."""
    distinct = {row.text.lower(): row for row in rows}.values()
    yield from ((other.text, other.text, row) for other, row in itertools.permutations(distinct, 2))


def options(rows: list[Answer]) -> Iterator[tuple[str, str, Answer]]:
    """Every wrong option of every row, by letter and by text."""
    for row in rows:
        for letter, text in row.options.items():
            if text != row.options[row.text]:
                yield from ((text, completion, row) for _, completion in row.option_ways(letter))


def task_table(counts: dict[str, Counts]) -> list[str]:
    """A line per task."""
    lines = ["| task | kind | rows | distinct | ways right | shuffled wrong | pairs wrong | us per grade |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, each in counts.items():
        ways = f"{each.num_ways - len(each.missed)} / {each.num_ways}"
        lines.append(
            f"| {name} | {each.kind} | {each.num_rows} | {each.num_distinct} | {ways} | "
            f"{each.num_shuffled}, {len(each.accepted_shuffled)} exceptions | "
            f"{each.num_pairs}, {len(each.accepted_pairs)} exceptions | {each.grade_us:.0f} |"
        )
    return lines


def exceptions(counts: dict[str, Counts]) -> list[str]:
    """Every reference that was wrong for itself, or right for another one, with the reason."""
    lines = ["", "## Exceptions", ""]
    for name, each in counts.items():
        lines += [f"- {name}: `{completion}` is wrong for `{gold}` ({way})" for way, completion, gold in each.missed]
        reasons: dict[str, list[str]] = {}
        for said, gold, why in sorted({*each.accepted_shuffled, *each.accepted_pairs}, key=str):
            reasons.setdefault(why or "**unexplained**", []).append(f"`{said}` for `{gold}`")
        lines += [f"- {name}, {why} ({len(found)}): {'; '.join(found)}" for why, found in reasons.items()]
    return lines


def agreement(comparisons: list[dict]) -> list[str]:
    """A line per task and grader, then one per grader and reason to differ."""
    lines = ["", "## Other graders", "", "| task | grader | compared | agree | only ours right | only theirs right |"]
    lines.append("|---|---|---|---|---|---|")
    verdicts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    reasons: dict[tuple, list[dict]] = defaultdict(list)
    for row in comparisons:
        verdicts[row["task"], row["grader"]][row["ours"] - row["theirs"]] += row["count"]
        if row["ours"] != row["theirs"]:
            reasons[row["grader"], row["ours"], row["why"] or "**unexplained**"].append(row)
    for (task, grader), found in verdicts.items():
        lines.append(f"| {task} | {grader} | {found.total()} | {found[0]} | {found[1]} | {found[-1]} |")
    lines += ["", "| grader | right to | why | count | tasks | example |", "|---|---|---|---|---|---|"]
    for (grader, ours, why), rows in sorted(reasons.items()):
        example = "`{}` for `{}`".format(*rows[0]["example"])
        total, tasks = sum(row["count"] for row in rows), ", ".join(row["task"].split("/")[-1] for row in rows)
        lines.append(f"| {grader} | {'ours' if ours else 'it'} only | {why} | {total} | {tasks} | {example} |")
    return lines


if __name__ == "__main__":
    main()
