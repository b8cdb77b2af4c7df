"""What a study consists of, read from its file."""

from __future__ import annotations

import fnmatch
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from cpt_lightning.cli.double_keys import check_keys

LONGEST_NAME = 200
"""Bytes of an arm's name, after which its folder is named; file systems take 255."""
OWN = "run"
"""Stands for a run's own folder in its commands, as an arm's name stands for that arm's of the same seed."""
CONFIGS = ("-c", "--config", "--model", "--data", "--trainer")
"""Options whose value is a file of options, which replaces what was said before."""
UNSEEDED = ("export", "report", "study")
"""Verbs that draw nothing, and have no such option."""


@dataclass(frozen=True)
class Run:
    """An arm with a seed.

    Args:
        arm: Its name.
        seed: Of all that is random.
        folder: Where it writes.
        commands: What follows ``cpt``, in their order.
        needs: Arms whose runs of the same seed come first.
    """

    arm: str
    seed: int
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    needs: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm}, seed {self.seed}"


@dataclass
class Study:
    """Arms to compare.

    Args:
        path: The study's file.
        out: Folder of the runs and of the comparison.
        arms: For each arm its ``cpt`` commands: those of an earlier arm may be named, ``{grpo}`` is its folder.
        seeds: Each arm is run with each.
        options: Added to every ``fit``, after its configs; what an arm says itself overrides them.
        values: What an arm of a grid stands for, by name of the arm: ``{"sft_lr_0.001": {"lr": "0.001"}}``.
    """

    path: Path
    out: Path
    arms: dict[str, Sequence[str]]
    seeds: Sequence[int] = (0,)
    options: Sequence[str] = field(default_factory=list)
    values: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Reads a study's file.

        Raises:
            ValueError: Something in it is missing, unknown, or names an arm that comes later.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            check_keys(text)
            content = yaml.safe_load(text)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: {error}") from None
        if not isinstance(content, dict) or not isinstance(content.get("arms"), dict) or not content["arms"]:
            raise ValueError(f"{path}: a study has `arms`, each a name with a cpt command or a list of them")
        if unknown := sorted(set(content) - {"out", "arms", "seeds", "options", "grid"}):
            raise ValueError(f"{path}: unknown {', '.join(unknown)}; a study has out, arms, seeds, options and grid")
        for option in ("out", "options"):
            if not isinstance(content.get(option, ""), str):
                raise ValueError(f"{path}: {option}={content[option]!r} must be text; quote it")
        named = {str(name): _commands(path, name, arm) for name, arm in content["arms"].items()}
        arms, values = _over_grid(named, _grid(path, content.get("grid", {}), named))
        study = cls(
            path=path,
            out=Path(content.get("out", f"runs/{path.stem}")),
            arms=arms,
            seeds=content.get("seeds", [0]),
            options=_words(path, "options", content.get("options", "")),
            values=values,
        )
        study.check()
        return study

    def check(self) -> None:
        """Refuses what would not run, or not into a folder of its own.

        Raises:
            ValueError: Seeds that are no numbers or given twice, an arm whose name cannot be a folder's, that needs a
                later one, or whose commands do not end in something to compare.
        """
        _check_seeds(self.path, self.seeds)
        known = {OWN}
        for arm, commands in self.arms.items():
            _check_name(self.path, arm)
            for command in commands:
                if unknown := sorted(_names(command) - known - set(self.values.get(arm, ()))):
                    raise ValueError(
                        f"{self.path}: arm {arm} names {{{unknown[0]}}}, which is no earlier arm; there are "
                        f"{', '.join(sorted(known))} (double the braces of a template)"
                    )
            if not any(command.split()[:1] == ["fit"] for command in commands):
                raise ValueError(f"{self.path}: arm {arm} has no command that begins with fit, so nothing to compare")
            known.add(arm)

    def chosen(self, arms: Sequence[str] | None, seeds: Sequence[int] | None) -> Study:
        """The same study of some arms, and of those that they need, or with other seeds.

        Args:
            arms: Names, or patterns such as ``*_lr_1e-4``.
            seeds: In place of the study's.

        Raises:
            ValueError: It has no such arm, or a seed is given twice.
        """
        _check_seeds(self.path, seeds or self.seeds)
        for pattern in arms or ():
            if not fnmatch.filter(self.arms, pattern):
                raise ValueError(f"{self.path} has no arm {pattern}; there are {', '.join(self.arms)}")
        wanted = {arm for pattern in arms or ("*",) for arm in fnmatch.filter(self.arms, pattern)}
        for arm in reversed(self.arms):  # what is needed comes earlier
            if arm in wanted:
                wanted |= self._needs(arm)
        return replace(
            self, arms={arm: self.arms[arm] for arm in self.arms if arm in wanted}, seeds=seeds or self.seeds
        )

    def runs(self) -> Iterator[Run]:
        """All runs: seed by seed, so that early ones can be compared already."""
        for seed in self.seeds:
            for arm, commands in self.arms.items():
                folder = self.folder(arm, seed)
                folders = {OWN: folder, **{other: self.folder(other, seed) for other in self.arms}}
                slots = {name: str(path) for name, path in folders.items()} | self.values.get(arm, {})
                yield Run(arm, seed, folder, tuple(self._filled(c, slots, seed) for c in commands), self._needs(arm))

    def folder(self, arm: str, seed: int) -> Path:
        """Where a run writes."""
        return self.out / arm / f"seed_{seed}"

    def _needs(self, arm: str) -> frozenset[str]:
        return frozenset().union(*map(_names, self.arms[arm])) - {OWN} - set(self.values.get(arm, ()))

    def _filled(self, command: str, slots: Mapping[str, str], seed: int) -> tuple[str, ...]:
        words = [_with_slots_filled(word, slots) for word in shlex.split(command)]
        if words[0] not in UNSEEDED:
            words += ["--seed_everything", str(seed)]
        if words[0] == "fit":
            # After the configs, which would override them, and before what the arm says itself.
            configs = max((place + 2 for place, word in enumerate(words) if word in CONFIGS), default=1)
            words[configs:configs] = self.options
            words += ["--run_dir", slots[OWN], "--ckpt_path", "last"]
        return tuple(words)


def _check_seeds(path: Path, seeds: Any) -> None:
    if not isinstance(seeds, list | tuple) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{path}: seeds={seeds} must be a list of whole numbers")
    if doubled := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ValueError(f"{path}: seeds={list(seeds)} has {doubled[0]} twice, which is one run; leave one out")


def _check_name(path: Path, arm: str) -> None:
    """Refuses the name of an arm after which no folder beside the others' could be named."""
    problem = None
    if not arm.strip() or arm in (".", ".."):
        problem = "its folder is named after it; call it something with letters or digits"
    elif arm == OWN:
        problem = f"{{{OWN}}} stands for a run's own folder; call it something else"
    elif "/" in arm:
        problem = "its folder is named after it, and '/' would begin another folder; leave it out"
    elif not arm.isprintable():
        problem = "its folder is named after it, and it holds a character that cannot be seen; leave that out"
    elif len(arm.encode()) > LONGEST_NAME:
        problem = f"its folder is named after it, and {LONGEST_NAME} bytes are the most; shorten it"
    if problem is not None:
        raise ValueError(f"{path}: {arm!r} cannot be the name of an arm (with the values of its grid): {problem}")


def _grid(path: Path, grid: Any, arms: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"{path}: grid={grid} must give each of its names a list of values, e.g. lr: [1.0e-4, 3.0e-4]")
    named = frozenset().union(*(_names(command) for commands in arms.values() for command in commands))
    for name in grid:
        if name in arms or name == OWN:
            raise ValueError(f"{path}: grid has {name}, which stands for a folder; call it something else")
        if name not in named:
            raise ValueError(f"{path}: grid has {name}, but no arm says {{{name}}}")
    return {name: [str(value) for value in values] for name, values in grid.items()}


def _over_grid(
    arms: Mapping[str, Sequence[str]], grid: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Sequence[str]], dict[str, dict[str, str]]]:
    """The arms, those that name something of the grid once for each of its values; and what each stands for."""
    all_arms, all_values = {}, {}
    for arm, commands in arms.items():
        varied = [name for name in grid if any(name in _names(command) for command in commands)]
        for values in itertools.product(*(grid[name] for name in varied)):
            chosen = dict(zip(varied, values, strict=True))
            name = "_".join([arm, *itertools.chain(*chosen.items())])
            all_arms[name], all_values[name] = commands, chosen
    return all_arms, all_values


def _commands(path: Path, name: Any, arm: Any) -> list[str]:
    commands = [arm] if isinstance(arm, str) else arm
    if not isinstance(commands, list) or not commands or not all(isinstance(c, str) and c.split() for c in commands):
        raise ValueError(f"{path}: arm {name} must be a cpt command, or a list of them")
    for command in commands:
        try:
            _names(command)
        except ValueError as error:
            raise ValueError(f"{path}: arm {name}: {error}; braces that are meant as such are doubled") from None
        _words(path, f"arm {name}", command)
    return commands


def _words(path: Path, where: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:  # a quotation that does not end
        raise ValueError(f"{path}: {where}: {error} in {text!r}") from None


def _with_slots_filled(word: str, slots: Mapping[str, str]) -> str:
    # Not by str.format, which takes a dot in a name (lr_0.001) for an attribute.
    return "".join(literal + (slots[name] if name else "") for literal, name, _, _ in Formatter().parse(word))


def _names(command: str) -> frozenset[str]:
    """The folders that a command names in braces."""
    return frozenset(name for _, name, _, _ in Formatter().parse(command) if name)
