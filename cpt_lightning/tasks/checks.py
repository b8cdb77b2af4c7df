"""What an option may be, where a class is made from Python; the parser of ``cpt`` sees to it itself."""

from __future__ import annotations

from typing import get_args

from cpt_lightning.tasks.records import kind_of


def check_known(where: str = "", /, **options: tuple[object, object]) -> None:
    """Refuses words that an option does not know.

    Args:
        where: Stands before the names of the options, such as ``backbone.``.
        **options: What was given, and the type (``Literal``) that it should have.

    Raises:
        ValueError: Names the option, and what there is.
    """
    for name, (value, kinds) in options.items():
        if value not in (known := get_args(kinds)):
            raise ValueError(f"{where}{name}={value!r} is unknown; there are {', '.join(known)}")


def check_known_lists(where: str = "", /, **options: tuple[object, object]) -> None:
    """Refuses what is no list of words that an option knows; arguments as in :func:`check_known`.

    Raises:
        TypeError: It is no list.
        ValueError: Names the option, and what there is.
    """
    for name, (values, kinds) in options.items():
        if not isinstance(values, list | tuple):
            raise TypeError(
                f"{where}{name}={values!r} is {kind_of(values)}; give a list of {', '.join(get_args(kinds))}"
            )
        for value in values:
            check_known(where, **{name: (value, kinds)})


def check_kinds(where: str = "", /, **options: tuple[object, type]) -> None:
    """Refuses objects of another class than an option wants.

    Args:
        where: Stands before the names of the options.
        **options: What was given, and the class that it should have.

    Raises:
        TypeError: Names the option, and the class.
    """
    for name, (value, kind) in options.items():
        if not isinstance(value, kind):
            article = "an" if kind.__name__[0] in "AEIO" else "a"
            raise TypeError(f"{where}{name}={value!r} is {kind_of(value)}; give {article} {kind.__name__}")
