"""Processes that are forked by one that has imported everything are as fresh ones, and their end is heard."""

import os
import sys
import time
import warnings
from pathlib import Path

import pytest

from tests.ranks import run_ranks

SEEN = []


def look(folder: Path) -> None:
    """Notes what this process is; a warning would be an error under pytest."""
    warnings.warn("only said", stacklevel=1)
    rank = os.environ.get("LOCAL_RANK", "alone")
    is_imported = "lightning" in sys.modules and "tests.fake_engine" in sys.modules
    (folder / rank).write_text(f"{len(SEEN)} {os.environ['SAID']} {os.environ.get('WORLD_SIZE')} {is_imported}")


@pytest.mark.parametrize(("ranks", "named"), [(1, {"alone": "None"}), (2, {"0": "2", "1": "2"})])
def test_ranks_have_the_test_s_environment_and_nothing_of_its_memory(tmp_path, monkeypatch, ranks, named):
    monkeypatch.setenv("SAID", "now")
    monkeypatch.chdir(tmp_path)
    SEEN.append(1)
    run_ranks(look, tmp_path, ranks=ranks)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        rank: f"0 now {size} True" for rank, size in named.items()
    }


def fail_on_rank_1(folder: Path) -> None:
    if os.environ["LOCAL_RANK"] == "1":
        raise ValueError("what went wrong")
    time.sleep(100)
    (folder / "went on").touch()


def test_a_rank_that_fails_is_heard_and_ends_the_others(tmp_path):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="exit codes(.|\n)*what went wrong"):
        run_ranks(fail_on_rank_1, tmp_path)
    assert time.monotonic() - start < 90 and not (tmp_path / "went on").exists()


def test_ranks_that_take_too_long_are_ended(tmp_path):
    with pytest.raises(RuntimeError, match="exit codes"):
        run_ranks(time.sleep, 100, time_limit_s=1)
