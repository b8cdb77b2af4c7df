"""Words of the toy world: the text-only families, and the phrases that stand before an answer.

Text-only families have few questions. Arithmetic divides them: no problem of one split (nor the same sum with its terms
swapped) occurs in another. Facts are a probe of memorised knowledge and share their questions between splits.
"""

from __future__ import annotations

import hashlib
from functools import cache

from numpy.random import Generator

from cpt_lightning.tasks.toy_scenes import pick

_CAPITALS = (
    "france:paris spain:madrid italy:rome germany:berlin japan:tokyo china:beijing russia:moscow egypt:cairo "
    "england:london ireland:dublin norway:oslo sweden:stockholm finland:helsinki denmark:copenhagen poland:warsaw "
    "austria:vienna hungary:budapest greece:athens turkey:ankara portugal:lisbon belgium:brussels cuba:havana "
    "peru:lima chile:santiago canada:ottawa kenya:nairobi ghana:accra iraq:baghdad iran:tehran nepal:kathmandu "
    "thailand:bangkok vietnam:hanoi syria:damascus qatar:doha libya:tripoli mali:bamako sudan:khartoum "
    "uruguay:montevideo bulgaria:sofia croatia:zagreb"
)
CAPITALS = dict(pair.split(":") for pair in _CAPITALS.split())

THOUGHTS = (
    "let me think",
    "let me look",
    "i look closely",
    "one moment",
    "this one is clear",
    "step by step",
    "i can tell",
    "let me check",
)
"""The house style of the base: a short phrase between ``<think>`` and ``</think>``."""

TEACHER_OPENINGS = (
    "Okay, the user wants me to answer a question, so I should be careful.",
    "First, it is important to understand precisely what is being requested.",
    "To solve this problem, we begin with a systematic analysis.",
)
TEACHER_STEPS = (
    "Several hypotheses can be eliminated immediately.",
    "Exactly one alternative is consistent with all observations.",
    "Wait, I should double-check this intermediate conclusion.",
)
TEACHER_ENDINGS = (
    "Therefore, the final result follows.",
    "Having verified it twice, I am confident.",
    "Hence the conclusion is established beyond doubt.",
)


def ask_arithmetic(rng: Generator, split: str) -> tuple[str, str]:
    """A sum or a difference of whole numbers up to 20, never negative."""
    problems = _problems("train" if split == "pretrain" else split)
    low, high = problems[rng.integers(len(problems))]
    if rng.random() < 0.5:
        a, b = (low, high) if rng.random() < 0.5 else (high, low)
        return pick(rng, f"what is {a} plus {b}?", f"compute {a} + {b}."), str(a + b)
    return pick(rng, f"what is {high} minus {low}?", f"compute {high} - {low}."), str(high - low)


def ask_fact(rng: Generator, split: str) -> tuple[str, str]:
    """The capital of one of 40 countries; a memorised fact, so every split asks the same ones."""
    country, capital = list(CAPITALS.items())[rng.integers(len(CAPITALS))]
    return pick(rng, f"what is the capital of {country}?", f"name the capital city of {country}."), capital


TEXT_ASKERS = {"arithmetic": ask_arithmetic, "facts": ask_fact}


def think(rng: Generator) -> str:
    """A short phrase in the base's own style."""
    return pick(rng, *THOUGHTS)


def reason_like_a_teacher(rng: Generator) -> str:
    """A long reasoning in a style foreign to the base, of the kind a larger model writes into a data set."""
    return " ".join(pick(rng, *parts) for parts in (TEACHER_OPENINGS, TEACHER_STEPS, TEACHER_ENDINGS))


@cache
def _problems(split: str) -> list[tuple[int, int]]:
    """The pairs ``low <= high`` of numbers up to 20 that belong to a split: a tenth to val and test each."""
    return [(a, b) for b in range(21) for a in range(b + 1) if _home(a, b) == split]


def _home(a: int, b: int) -> str:
    digest = hashlib.blake2b(f"{a} {b}".encode(), digest_size=4).digest()
    return {0: "val", 1: "test"}.get(int.from_bytes(digest, "big") % 10, "train")
