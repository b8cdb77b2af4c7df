"""Multiple choice: a completion -> the option it picks, by letter or by the option's text."""

from __future__ import annotations

import re

from cpt_lightning.rewards.answers import readings, without_markup
from cpt_lightning.rewards.normalization import normalize_option
from cpt_lightning.types import Gold

_LONE = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\]]?[.:]?")
_FIRST = re.compile(r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])[.):])(?:\s+|$)")
_CAPITAL = re.compile(r"[(\[]?[A-Z][)\]]?[.:]?")
_OWN_LINE = re.compile(r"^[(\[]?([A-Z])[)\]]?[.:]?$", re.MULTILINE)
_NAMED = re.compile(r"\b(?:[Oo]ption|[Cc]hoice)\s+[(\[]?(?:([A-Z])\b|([a-z])(?=[)\].,;:]|\s*$))")
_BRACKETED = re.compile(r"(?<!\w)[(\[]([A-Za-z])[)\]]")
_STANDING = re.compile(r"(?<![\w'])(?!A\s+(?!or\b|and\b|is\b)[a-z]|I\b(?!\s*$))([A-Z])(?![\w'])")
_POINTED_AT = re.compile(
    r"(?:^|:\s*|\b(?:is|be|choose|chose|pick|say|select|think|guess|believe|[Ss]o,?|[Ii]t's)\s+)([A-Z])"
    r"(?=\s*(?:[.,;:!]|$)|\s+(?:because|since|as|for)\b)"
)
_LETTER = r"(?:(?:[Oo]ption|[Cc]hoice)\s+)?(?:[(\[][A-Z][)\]]|[A-Z](?![\w')\]]))"
_REJECTED = re.compile(
    rf"(?:\b[Nn]ot|n['\u2019]t)\s+(?:be\s+)?{_LETTER}"
    rf"|(?<![\w'(\[]){_LETTER}\s+(?:is|are|was)\s+(?:wrong|incorrect|false|(?:not|n['\u2019]t)\s+(?:right|correct|true))\b"
)
_REASON = re.compile(r"\b(?:because|since)\b")
_OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*)$", re.MULTILINE)


def grade_letter(answer: str, golds: list[str]) -> float:
    """1 if the answer gives the letter of the reference or, word for word, its option's text; else 0.

    Args:
        answer: As extracted, without markup.
        golds: A letter, alone ("B", "(B)") or before its option's text ("B. Juneau"); further entries are more letters
            that are right, or option texts: ``["B", "Juneau"]``.

    Raises:
        ValueError: The reference has no letter.
    """
    letters, texts = _letters_and_texts(golds)
    given = find_letter(answer)
    if given in letters:
        return 1.0
    said = [reading for reading in readings(answer) if reading]
    if any(_LONE.fullmatch(reading) for reading in said):  # then it is a letter, even where an option is "A"
        return 0.0
    return float(any(normalize_option(reading) in texts for reading in said))


def _letters_and_texts(golds: list[str]) -> tuple[set[str], set[str]]:
    """The right letters and the right options' texts."""
    lettered = _FIRST.match(golds[0].strip())
    lone = [match[1].upper() for gold in golds if (match := _LONE.fullmatch(gold.strip()))]
    letters = {*lone, *([(lettered[1] or lettered[2]).upper()] if lettered else [])}
    if not letters:
        raise ValueError(f"reference answer {golds!r} has no option letter; kind 'letter' needs one such as 'B'")
    texts = [golds[0].strip()[lettered.end() :] if lettered else golds[0], *golds[1:]]
    return letters, {normalize_option(without_markup(text)) for text in texts if text and not _LONE.fullmatch(text)}


def is_option_letter(gold: str) -> bool:
    """Whether a reference answer is a capital letter alone; not "x", nor "E. coli", which open questions have.

    >>> [is_option_letter(gold) for gold in ("B", "(B)", "b", "B. Juneau", "7")]
    [True, True, False, False, False]
    """
    return _CAPITAL.fullmatch(gold.strip()) is not None


def find_letter(answer: str) -> str | None:
    """The one option letter that an answer gives, upper case, or ``None``.

    >>> [find_letter(text) for text in ("b", "(C) a dog", "It must be option D.", "A dog", "A or B", "Solution A")]
    ['B', 'C', 'D', None, None, None]
    >>> [find_letter(text) for text in ("I think C", "C because A is too cold", "It is not A; it is B")]
    ['C', 'C', 'B']
    """
    for reading in reversed(list(readings(answer))):
        letters = _letters(reading)
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def _letters(text: str) -> set[str]:
    """The option letters that a text gives and does not reject, by the plainest sign of one that there is."""
    text = _REJECTED.sub("", text)
    first = _LONE.fullmatch(text) or _FIRST.match(text)
    if first:
        return {next(letter for letter in first.groups() if letter).upper()}
    for pattern in (_OWN_LINE, _NAMED, _BRACKETED):
        letters = {letter.upper() for found in pattern.finditer(text) for letter in found.groups() if letter}
        if letters:
            return letters
    for said in (_REASON.split(text, maxsplit=1)[0], text):  # reasons name other options
        standing = set(_STANDING.findall(said))
        # A letter in mid-text may belong to an option's own words ("Solution A"): it needs a word that points at it.
        if len(standing) > 1 or (standing and _POINTED_AT.search(said)):
            return standing
    return set()


def with_option_text(letter: str, question: str) -> Gold:
    r"""A reference answer for kind ``letter`` that also accepts the text of the letter's option in the question.

    The options stand a line each, from A on without a gap. The letter alone where there are none, or where the option
    is itself a letter, which could not be told from a choice.

    >>> with_option_text("B", "Which month?\nA. March\nB. June\nAnswer with the option's letter.")
    ['B', 'June']
    """
    options: dict[str, str] = {}
    for line in _OPTION_LINE.finditer(question):
        if line[1] == "A":
            options = {}
        if line[1] == chr(ord("A") + len(options)):
            options[line[1]] = line[2].strip()
    text = options.get(letter.strip(" ()."), "")
    return [letter, text] if text and not _LONE.fullmatch(text) else letter
