"""Yes or no: the polarity of an answer, and what is reported of a whole set of such questions besides accuracy."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cpt_lightning.rewards.answers import readings
from cpt_lightning.types import Gold

YES_NO_COUNTS = ("said_yes", "gold_yes", "true_yes")
"""Parts that :func:`yes_no_counts` gives of one completion; their means over a set determine :data:`YES_NO_RATIOS`."""
YES_NO_RATIOS = ("precision", "recall", "f1", "yes_ratio")
"""What :func:`with_ratios` gives of a set in their place."""

_NO = r"no(?=\s*(?:[,.;:!-]|$|\s+(?:there|it|this|that|they|he|she|the)\b))"  # as an answer, unlike in "no tissue"
_YES_WORD = r"(?:yes|yeah|yep|yup|true)"
_NO_WORD = r"(?:false|nope|nah)"
# It turns the word behind it round.
_NOT = r"(?P<not>(?:\b(?:can)?not|n['\u2019]t)\s+(?:(?:a|be|say|quite|(?!only)\w+ly)\s+)?)?"
_THERE_IS_NOT = r"there (?:is|are)(?: not|n['\u2019]t)(?=\s*(?:[,.;:!]|$|(?:an?|any|one)\b))"  # not "enough to tell"
_POLARITY = re.compile(rf"{_NOT}\b(?:(?P<yes>{_YES_WORD})|{_NO_WORD}|{_NO}|(?:is|are|was|were) no)\b", re.IGNORECASE)
_EITHER = re.compile(r"\byes\s*(?:or|/)\s*no\b", re.IGNORECASE)
_LEADING = re.compile(
    rf"\W*(?:(?:(?P<yes>{_YES_WORD})|{_NO_WORD})\b\s*(?:[,.;:!-]|$)|{_NO}|{_THERE_IS_NOT})", re.IGNORECASE
)
_LONE = re.compile(rf"\W*(?:{_YES_WORD}|{_NO_WORD}|no)\W*", re.IGNORECASE)
_NOT_TOLD = (
    r"(?:(?:any|the)\s+)?(?:enough|sufficient|information|info|access|details?|clearly|well|whether|if|what|who|how)"
)
_DENIAL = re.compile(
    # "No dogs are visible", unlike "no tissue recognizable" and "no idea what it is"
    r"^\W*no\s+(?!(?:idea|clue|doubt|matter|wonder|information|info|data|answer|conclusion|way)\b)"
    r"(?:[\w-]+\s+){1,4}?(?:is|are|was|were|has|have|can\s+be|appears?|exists?)\b"
    r"|\b(?:does|do|did)(?:\s+not|n['\u2019]t)\s+(?:contain|show|have|include|depict|feature|see|appear|seem|look)\b"
    rf"(?!\s+{_NOT_TOLD}\b)",
    re.IGNORECASE,
)


def polarity_of_reference(gold: str) -> bool | None:
    """Whether a reference answer means yes; ``None`` where it means neither yes nor no.

    >>> [polarity_of_reference(gold) for gold in ("Yes", "false", "No, it is not", "no tissue recognizable")]
    [True, False, False, None]
    """
    found = _LEADING.match(gold)
    return None if found is None else bool(found["yes"])


def is_mere_polarity(gold: str) -> bool:
    """Whether a reference answer is yes or no and nothing else."""
    return _LONE.fullmatch(gold) is not None


def find_polarity(answer: str) -> bool | None:
    """Whether an answer says yes; ``None`` where it says neither or both.

    >>> [find_polarity(said) for said in ("Yes, a dog.", "There is no dog.", "There isn't one.", "yes or no", "a dog")]
    [True, False, False, None, None]
    >>> [find_polarity(said) for said in ("not true", "No dogs are visible.", "It does not show a dog.")]
    [False, False, False]
    """
    return next((polarity for reading in readings(answer) if (polarity := _polarity(reading)) is not None), None)


def _polarity(text: str) -> bool | None:
    """Yes or no: the text's first word set off by punctuation, the only one of the two that it says, or a denial."""
    leading = _LEADING.match(text)
    if leading:
        return bool(leading["yes"])
    if _EITHER.search(text):
        return None
    polarities = {bool(match["yes"]) != bool(match["not"]) for match in _POLARITY.finditer(text)}
    if not polarities:
        return False if _DENIAL.search(text) else None
    return polarities.pop() if len(polarities) == 1 else None


def yes_no_counts(said_yes: float, gold: Gold) -> dict[str, float]:
    """What one completion adds to the :data:`YES_NO_COUNTS` of its set: 1 or 0 each.

    Args:
        said_yes: 1 if the completion says yes; one that says neither yes nor no does not.
        gold: Reference answer(s); one of them must mean yes for the row to be a positive one.
    """
    golds = [gold] if isinstance(gold, str) else gold
    gold_yes = float(any(polarity_of_reference(answer) for answer in golds))
    return dict(zip(YES_NO_COUNTS, (said_yes, gold_yes, said_yes * gold_yes), strict=True))


def with_ratios(means: Mapping[str, float]) -> dict[str, float]:
    """Precision, recall, F1 and yes-ratio of a set, in place of the means of :data:`YES_NO_COUNTS`; other means stay.

    As POPE defines them (arXiv 2305.10355): yes is the positive class, and the yes-ratio is the share of completions
    that say yes. 0 stands for 0/0, as in lmms-eval: precision where nothing was answered by yes, recall where no
    reference is yes, F1 where neither was.

    A completion that says neither yes nor no is wrong and no yes: it lowers accuracy and, where the reference is yes,
    recall. Public code disagrees: POPE's own script takes for a yes whatever lacks the words "no" and "not", an empty
    answer too; lmms-eval leaves such a completion out of the recall, and its ``yes_ratio`` is that of the references.
    Where every completion says yes or no, all but the latter agree.

    Args:
        means: Means over a set of the parts of a reward; without :data:`YES_NO_COUNTS` nothing is to be done.

    >>> with_ratios({"accuracy": 0.5, "said_yes": 0.75, "gold_yes": 0.5, "true_yes": 0.375})
    {'accuracy': 0.5, 'precision': 0.5, 'recall': 0.75, 'f1': 0.6, 'yes_ratio': 0.75}
    """
    kept = {name: mean for name, mean in means.items() if name not in YES_NO_COUNTS}
    if len(kept) == len(means):
        return kept
    said, gold, true = (means[name] for name in YES_NO_COUNTS)
    ratios = (_ratio(true, said), _ratio(true, gold), _ratio(2 * true, said + gold), said)
    return kept | dict(zip(YES_NO_RATIOS, ratios, strict=True))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
