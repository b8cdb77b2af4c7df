"""Which runs are the same thing with other seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt_lightning.records import RunFolder
from cpt_lightning.records.run import is_run

OWN = ("seed_everything", "run_dir", "ckpt_path")
"""Options in which seeds of one arm differ."""


@dataclass
class Arm:
    """Runs that differ by their seed.

    Args:
        name: For people.
        runs: By seed; by the name of the folder where the seed is not known.
    """

    name: str
    runs: dict[int | str, RunFolder] = field(default_factory=dict)

    def add(self, run: RunFolder) -> None:
        """Takes another seed.

        Raises:
            ValueError: It has a run with this seed.
        """
        if (seed := seed_of(run)) in self.runs:
            raise ValueError(
                f"{self.runs[seed].path} and {run.path} are both seed {seed} of {self.name}: name them apart, as "
                f"{self.name}_a={self.runs[seed].path} {self.name}_b={run.path}"
            )
        self.runs[seed] = run

    @property
    def first(self) -> RunFolder:
        """The run that stands for what all have in common."""
        return next(iter(self.runs.values()))

    @property
    def unfinished(self) -> list[RunFolder]:
        """Those that have not learned the whole stream."""
        return [run for run in self.runs.values() if not run.is_finished]

    @property
    def num_stages(self) -> int:
        """How far they came."""
        return self.first.num_stages


def arms_of(arguments: Sequence[str | Path]) -> list[Arm]:
    """The arms that folders belong to, in the order of their first run.

    Finished runs whose configurations are equal but for :data:`OWN` are seeds of one arm. An unfinished run, a second
    run with the same seed, and a run without a configuration are arms of their own.

    Args:
        arguments: Folders, or ``ARM=FOLDER`` to say which arm one belongs to.

    Raises:
        FileNotFoundError: One is not the folder of a run.
        ValueError: Two runs were put into one arm with the same seed, or a folder was named twice.
    """
    named: dict[str, Arm] = {}
    found: list[tuple[str | None, Arm]] = []
    for argument in arguments:
        name, run = _parsed(str(argument))
        if any(run.path.resolve() == other.path.resolve() for _, arm in found for other in arm.runs.values()):
            raise ValueError(f"{run.path} is named twice")
        key = _settings(run)
        same = [arm for other, arm in found if key is not None and other == key and seed_of(run) not in arm.runs]
        arm = named.get(name) if name else next(iter(same), None)
        if arm is None:
            arm = Arm(name or "")
            found.append((None if name else key, arm))
            if name:
                named[name] = arm
        arm.add(run)
    arms = [arm for _, arm in found]
    _give_names(arms)
    return arms


def runs_among(arguments: Sequence[str]) -> list[str]:
    """Without the files and folders in which no run was begun, such as a pattern finds beside runs.

    Where there is nothing else they are left, and so is what does not exist, for :func:`arms_of` to say what is wrong.
    """
    return [each for each in arguments if is_run(each) or not Path(each).exists()] or list(arguments)


def seed_of(run: RunFolder) -> int | str:
    """What tells a run from others of its arm."""
    return run.path.name if run.seed is None else run.seed


def _parsed(argument: str) -> tuple[str | None, RunFolder]:
    name, equals, folder = argument.partition("=")
    if equals and not Path(argument).exists():
        if not name or not folder:
            raise ValueError(f"{argument!r} must be a folder, or ARM=FOLDER")
        return name, RunFolder(Path(folder))
    return None, RunFolder(Path(argument))


def _settings(run: RunFolder) -> str | None:
    """What all seeds of an arm have in common; ``None`` where that is not to be known."""
    if run.config is None or not run.is_finished:
        return None
    return json.dumps(_common(run.config, run.seed), sort_keys=True, default=str)


def _common(config: dict[str, Any], seed: int | None) -> Any:
    """Without the run's own options; another run of the same seed (``cpt study`` names its folder so) is any seed's."""

    def shared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shared(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return list(map(shared, value))
        return value.replace(f"/seed_{seed}/", "/seed_*/") if isinstance(value, str) else value

    return shared({key: value for key, value in config.items() if key not in OWN})


def _give_names(arms: list[Arm]) -> None:
    """The shortest that tells its folder from the others, and how far an unfinished run came."""
    taken = {arm.name for arm in arms}
    unnamed = [arm for arm in arms if not arm.name]
    names = [_names(arm.first) for arm in unnamed]
    for arm, own in zip(unnamed, names, strict=True):
        clear = (name for name, all_names in zip(own, zip(*names, strict=True), strict=True)
                 if all_names.count(name) == 1 and name not in taken)  # fmt: skip
        arm.name = next(clear, str(arm.first.path))
    for arm in arms:
        if arm.unfinished:
            arm.name += f" ({_progress(arm.unfinished[0])})"


def _names(run: RunFolder) -> tuple[str, str, str]:
    """From short to long; ``cpt study`` has a folder per arm, and in it one per seed."""
    parts = run.path.resolve().parts
    short = parts[-2] if len(parts) > 1 and parts[-1] == f"seed_{run.seed}" else parts[-1]
    return short, "/".join(parts[-2:]), str(run.path)


def _progress(run: RunFolder) -> str:
    return f"{run.num_stages} of {len(run.matrix.stages)} stages" if run.matrix else "nothing measured yet"
