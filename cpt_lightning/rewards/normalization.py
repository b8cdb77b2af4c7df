"""The normal forms in which short answers are compared: equal forms mean the same."""

from __future__ import annotations

import re

_TO_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_FROM_TWENTY = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {word: 10 * tens for tens, word in enumerate(_FROM_TWENTY.split(), 2)}
_NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_TO_TWENTY.split())}
_ARTICLES = {"a", "an", "the"}
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2212": "-", "\u2013": "-"})
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_SPACED_RATIO = re.compile(r"(?<=\d) ?([:/]) ?(?=\d)")
_QUOTED_OR_ARTICLE = re.compile(r"^\"([^\"]+)\"$|^(?:an?|the) (?=.)")
_PERIOD = re.compile(r"\.(?!\d)")
_PUNCTUATION = re.compile(r"(?<!\d)[:/]|[:/](?!\d)|(?<=\w)-|-(?![\d.])|[;\[\]\"{}()=+\\_<>@`,?!*|~]")
_TELL = r"(?:answer|determine|identify|know|read|say|see|tell)"
_TOLD = r"(?:answered|determined|identified|known|read|said|seen|told)"
_UNANSWERABLE = re.compile(
    r"(?:(?:(?:it|this|that|there|answer|question|image|picture) is |its )?(?:"
    r"unanswerable|not answerable|unsuitable(?: image)?|unknown|unclear|not (?:clear|visible)|"
    rf"(?:not possible|impossible) to {_TELL}|"
    rf"(?:insufficient|not enough) (?:information|info|data|context)(?: to {_TELL})?)|"
    r"(?:(?:i|it|this|that|question|answer) )?(?:cannot|can not|cant|could not|couldnt) "
    rf"(?:{_TELL}|be {_TOLD})|"
    rf"(?:i am |im )?(?:(?:unable|not able) to {_TELL}|not sure)|(?:i )?(?:do not|dont) know|no answer)"
    # what it cannot be told from
    r"(?: (?:this|that|it|question))?(?: (?:from|in|by|with|based on|given) (?:(?:this|given|provided) )?"
    r"(?:image|picture|photo|information|context))?"
)


def normalize_text(text: str) -> str:
    """The form in which two short answers that mean the same are equal, as the VQA evaluation has it.

    Lower case, without articles and punctuation, number words as digits, contractions without their apostrophe
    (Antol et al. 2015). Unlike there a leading minus and a colon or slash between digits stay, so that -5 is not 5 and
    10:35 is a time, number words reach twenty, and every apostrophe goes, not those of a list of contractions only.
    An answer that consists of nothing else keeps its articles and punctuation.

    >>> normalize_text("  The T-shirt isn't Red. ")
    't shirt isnt red'
    >>> normalize_text("Two, 1,000 or -5.5?")
    '2 1000 or -5.5'
    """
    lowered = _lowered(text)
    plain = _PERIOD.sub("", without_thousands_commas(lowered).replace("'", ""))
    words = _PUNCTUATION.sub(" ", _SPACED_RATIO.sub(r"\1", plain)).split()
    kept = [_NUMBER_WORDS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(kept or words) or lowered


def normalize_option(text: str) -> str:
    """The form in which two option texts are equal: unlike in short answers, every sign inside counts.

    >>> normalize_option("A  sunflower."), normalize_option("y + 36 = 13")
    ('sunflower', 'y + 36 = 13')
    """
    lowered = _lowered(text).rstrip(" .")
    return _QUOTED_OR_ARTICLE.sub(r"\1", lowered) or _lowered(text)


def _lowered(text: str) -> str:
    return " ".join(text.translate(_QUOTES).lower().split())


def is_unanswerable(text: str) -> bool:
    """Whether the whole text says that the question has no answer, in one of the usual ways.

    >>> [is_unanswerable(text) for text in ("It cannot be determined from the image.", "Unclear", "an unknown man")]
    [True, True, False]
    """
    return _UNANSWERABLE.fullmatch(normalize_text(text)) is not None


def without_thousands_commas(text: str) -> str:
    """``1,234,567`` as ``1234567``; other commas stay."""
    return _THOUSANDS.sub("", text.replace("{,}", ","))


def number_of_word(word: str) -> str | None:
    """The digits of a number word up to ninety-nine, or ``None``.

    >>> [number_of_word(word) for word in ("Seven", "thirty", "twenty-one", "three-wheeled")]
    ['7', '30', '21', None]
    """
    tens, hyphen, ones = word.lower().replace(" ", "-").partition("-")
    if not hyphen:
        return str(_TENS[tens]) if tens in _TENS else _NUMBER_WORDS.get(tens)
    digit = int(_NUMBER_WORDS.get(ones, "0"))
    return str(_TENS[tens] + digit) if tens in _TENS and 0 < digit < 10 else None
