"""Rows of the hub's data sets, from disk where they are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cpt_lightning.tasks.files import is_saved
from cpt_lightning.tasks.records import ArrowRecords
from cpt_lightning.tasks.rows import SPLITS, Split
from cpt_lightning.tasks.sources import TableRows
from cpt_lightning.tasks.tables import JoinedTable, Part, Table

HUB_TIMEOUT_S = 10
"""After which the hub counts as unreachable, at the second try."""

_HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


@dataclass
class Join:
    """Columns that a data set keeps apart: GQA has its questions and its pictures in separate configurations.

    Args:
        column: Column of the rows that names the other row, such as ``imageId``.
        key: Column of the other rows that holds these names, such as ``id``.
        splits: Where the other rows are, for each split as in ``HubRows.splits``.
        columns: Columns that the rows get from them.
    """

    column: str
    key: str
    splits: dict[str, str | list[str]]
    columns: list[str] = field(default_factory=lambda: ["image"])


@dataclass
class HubRows(TableRows):
    """Rows of a data set of the hub, or of its copy on disk, read through ``datasets``.

    On disk it is either the hub's repository as it is (``hf download --repo-type dataset ID --local-dir data/ID``) or
    a folder that ``save_to_disk`` wrote; then nothing is asked of the network. Otherwise it is fetched once, into the
    cache of ``datasets``; ``HF_HUB_OFFLINE=1`` keeps to that cache. Code from the hub is never run.
    A hub that cannot be reached is not tried again in the same process.

    Args:
        path: Its name on the hub, such as ``MMMU/MMMU``, or a folder.
        splits: ``train``, ``val`` and ``test`` to the set's own splits: ``"<split>"``, ``"<configuration>/<split>"``,
            ``"*/<split>"`` for all configurations, or a list of these.
        root: Folder in which ``path`` is looked for first.
        revision: Branch, tag or commit on the hub; a folder on disk is taken as it is.
        join: Columns that the set keeps in other configurations.
        columns: Which columns say what, and which rows are left out.
        val_fraction: Without ``val`` in ``splits``: part of the training rows to set aside for it, in (0, 1).
        test_fraction: Without ``test`` in ``splits``: part of the training rows to set aside for it.
        group_by: Column whose equal values stay on the same side of such a cut; by default the join's. Otherwise rows
            are cut one by one.
        seed: Draws the cut.
        image_folder: What relative image paths are relative to, or that by split; by default the data set's folder.

    Raises:
        ValueError: Splits that are none, or options that contradict each other. Opening a split raises it where the set
            is neither on disk nor to be had, or has no such split.
    """

    path: str
    splits: dict[str, str | list[str]]
    root: str = "data"
    revision: str | None = None
    join: Join | None = None

    def __post_init__(self) -> None:
        mappings = {"splits": self.splits, **({"join.splits": self.join.splits} if self.join else {})}
        for option, splits in mappings.items():
            unknown = [split for split in splits if split not in SPLITS]
            if unknown or not splits:
                named = ", ".join(unknown) or "nothing"
                raise ValueError(f"{option} names {named}; map some of {', '.join(SPLITS)} to {self.path}'s")
            for split in splits:
                if not all(1 <= len(spec.split("/")) <= 2 and all(spec.split("/")) for spec in _listed(splits[split])):
                    raise ValueError(f"{option}.{split} is {splits[split]!r}; write <split> or <configuration>/<split>")
        if self.join and set(self.join.splits) != set(self.splits):
            raise ValueError(
                f"join.splits has {', '.join(self.join.splits)}, splits {', '.join(self.splits)}; name alike"
            )
        self._check_options()

    def has(self, split: Split) -> bool:
        """Whether the set has the split."""
        return split in self.splits

    def open(self, split: Split) -> Table:
        """The rows of the set's own splits, joined if so asked."""
        table = self._table(self.splits[split])
        if self.join is None:
            return table
        other = self._table(self.join.splits[split])
        try:
            return JoinedTable(table, self.join.column, other, self.join.key, self.join.columns)
        except ValueError as error:
            raise ValueError(f"data set '{self.path}': {error}") from error

    def _group_column(self) -> str | None:
        return self.group_by or (self.join.column if self.join else None)

    def _table(self, specs: str | list[str]) -> Table:
        folder = self._folder()
        parts = []
        for spec in _listed(specs):
            config, _, split = spec.rpartition("/")
            for name in self._configs() if config == "*" else [config]:
                dataset = self._load(name or None, split)
                row_name = "/".join(filter(None, [self.path, name, split])) + "/"
                parts.append(Part(ArrowRecords(dataset), row_name, folder or Path()))
        return Table(parts)

    def _folder(self) -> Path | None:
        """Where the set lies on disk."""
        places = [Path(self.root).expanduser() / self.path, Path(self.path).expanduser()]
        return next((place for place in places if place.is_dir()), None)

    def _configs(self) -> list[str]:
        from datasets import get_dataset_config_names
        from datasets.exceptions import DatasetsError

        folder = self._folder()
        saved = sorted(path.parent.name for path in folder.glob("*/dataset_dict.json")) if folder else []
        if saved:
            return saved
        try:
            if folder:
                return get_dataset_config_names(str(folder))
            with _cache_alone_without_hub():
                return get_dataset_config_names(self._hub_id(), revision=self.revision)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise self._failure("its configurations", error) from error

    def _load(self, config: str | None, split: str):
        """One split as a ``datasets.Dataset``."""
        from datasets import load_dataset, load_from_disk
        from datasets.exceptions import DatasetsError

        folder = self._folder()
        inner = folder / config if folder and config else folder
        try:
            if inner and (inner / "dataset_dict.json").is_file():
                known = json.loads((inner / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
                if split not in known:
                    raise ValueError(f"there are {', '.join(known)}")
                return load_from_disk(str(inner / split))
            if inner and is_saved(inner):
                raise ValueError(f"'{inner}' is a single saved split; give it to FileRows")
            if folder:
                return load_dataset(str(folder), config, split=split)
            with _cache_alone_without_hub():
                return load_dataset(self._hub_id(), config, split=split, revision=self.revision)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise self._failure(f"split '{config + '/' if config else ''}{split}'", error) from error

    def _hub_id(self) -> str:
        if not _HUB_ID.fullmatch(self.path) or self.path.startswith("."):
            raise FileNotFoundError("it is no folder, and no name on the hub")
        return self.path

    def _failure(self, what: str, error: Exception) -> ValueError:
        """What to tell of a set or split that cannot be had."""
        folder, reason = self._folder(), " ".join(str(error).split())
        if folder:
            return ValueError(f"data set '{folder}': {what} cannot be read: {reason}")
        if isinstance(error, ValueError) and not isinstance(error, OSError):  # it is there, the split is not
            return ValueError(f"data set '{self.path}' of the hub: {what} cannot be read: {reason}")
        if isinstance(error, ConnectionError) and (silent := _why_hub_is_silent()):
            reason = f"it cannot be reached: {silent}"
        local = f"{self.root.rstrip('/')}/{self.path}"
        return ValueError(
            f"data set '{self.path}' is neither on disk (looked for {local} and {self.path} from {Path.cwd()}) "
            f"nor to be had from the hub ({reason}); "
            f"get it with: hf download --repo-type dataset {self.path} --local-dir {local}"
        )


@cache  # state of the process, on purpose: that there is no network is true of all sets, and takes its time to learn
def _why_hub_is_silent() -> str | None:
    """Why the hub cannot be reached, ``None`` if it can or must not be asked."""
    from huggingface_hub import constants
    from huggingface_hub.utils import http_backoff

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        http_backoff("HEAD", constants.ENDPOINT, max_retries=1, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # of whichever HTTP client the installed huggingface_hub is built on
        return f"{type(error).__name__}: {error}"
    return None


@contextmanager
def _cache_alone_without_hub() -> Iterator[None]:
    """Within it a hub that cannot be reached is not asked, so that a set is in the cache or missing at once.

    Otherwise huggingface_hub 2.4 tries six times and sleeps 23 s in between, for every split of every set; no argument
    of ``load_dataset`` reaches these retries.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or _why_hub_is_silent() is not None  # read anew at every request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _listed(specs: str | list[str]) -> list[str]:
    return [specs] if isinstance(specs, str) else list(specs)
