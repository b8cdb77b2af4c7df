"""``environment.json``: what it says, and that a resumed run adds to it."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version

import pytest
import torch

from cpt_lightning.records.environment import checkout, read_starts, record_start, surroundings


def git(folder, *arguments) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A checkout of one file."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "program.py").write_text("1")
    git(tmp_path, "add", "program.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_checkout_is_told_by_its_commit_and_whether_files_differ(repository):
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "runs.txt").write_text("no file of the program")
    assert checkout(repository / "program.py") == {"commit": commit, "dirty": False}
    (repository / "program.py").write_text("2")
    assert checkout(repository / "program.py") == {"commit": commit, "dirty": True}


def test_an_installed_copy_inside_another_checkout_is_not_taken_for_it(repository, tmp_path_factory):
    (repository / "installed.py").write_text("1")
    assert checkout(repository / "installed.py") is None
    assert checkout(tmp_path_factory.mktemp("elsewhere") / "program.py") is None


def test_without_git_there_is_no_commit(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert checkout(repository / "program.py") is None


def test_surroundings_are_those_of_this_process_and_hold_no_environment_variable(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "a-secret-of-this-test")
    found = surroundings()
    assert found["libraries"]["torch"] == version("torch") and found["libraries"]["pillow"] == version("pillow")
    assert found["python"] == platform.python_version() and found["num_threads"] == torch.get_num_threads()
    assert "a-secret-of-this-test" not in json.dumps(found)


def start(command, resumed_from=None) -> dict:
    return {"command": command, "resumed_from": resumed_from}


def test_a_resumed_run_adds_a_start_and_a_new_one_begins_anew(tmp_path):
    record_start(tmp_path / "run", start("first"))
    record_start(tmp_path / "run", start("second", "last.ckpt"))
    assert [each["command"] for each in read_starts(tmp_path / "run" / "environment.json")] == ["first", "second"]
    record_start(tmp_path / "run", start("third"))
    assert read_starts(tmp_path / "run" / "environment.json") == [start("third")]
    record_start(tmp_path / "branch", start("fourth", "run/last.ckpt"))  # goes on in a folder of its own
    assert len(read_starts(tmp_path / "branch" / "environment.json")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no environment.json"), ("[]", "is no environment.json"), ('{"version": 9}', "version 9")],
)
def test_another_file_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        read_starts(tmp_path / "environment.json")
