"""What has to pass before a change is merged passes only as a whole: ``.ci/run`` with a stand-in for ``make``."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / ".ci" / "run"
TARGETS = [".venv/.dev", ".venv-vllm/.project", "lint", "test", "test-vllm"]


@pytest.fixture
def ci(tmp_path, monkeypatch):
    """Runs it where ``make TARGET`` says so and fails for one target; every other command is the real one."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(RUN, tmp_path / ".ci" / "run")
    (tmp_path / "bin").mkdir()
    make = tmp_path / "bin" / "make"
    make.write_text('#!/usr/bin/env bash\necho "$1 was made"\n[ "$1" != "$FAILING" ]\n')
    make.chmod(0o755)
    monkeypatch.setenv("PATH", f"{make.parent}:/usr/bin:/bin")

    def ci(failing: str = "") -> subprocess.CompletedProcess:
        monkeypatch.setenv("FAILING", failing)
        return subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return ci


def test_everything_is_made_and_the_last_line_is_that_of_the_tests(ci):
    done = ci()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.removesuffix(" was made") for line in lines} == set(TARGETS)
    assert lines[-1] == "test was made"


@pytest.mark.parametrize("target", TARGETS)
def test_what_fails_makes_all_of_it_fail(ci, target):
    """In the background as in the foreground, behind a pipe as without one; it is among what was printed."""
    done = ci(failing=target)
    assert done.returncode != 0
    assert f"{target} was made" in done.stdout
