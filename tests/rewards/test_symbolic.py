"""Algebra in a process of its own: right, quick to stop, and at hand everywhere."""

import ast
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from cpt_lightning import rewards
from cpt_lightning.rewards import grade
from cpt_lightning.rewards.symbolic import MAX_LENGTH, FormulaServer, symbolically_equal

HOSTILE = [
    "9^{9^{9^9}}",
    r"(x+y+z+w)^{100000}",
    r"\int_0^1 \sin(x^{x^x}) dx",
    "(" * 100,
    r"\sqrt{" * 30,
    r"\prod_{i=1}^{10^9} i",
    "99999999!",
    "\x00\ud800",
    "$" * 50 + "x",
]


class Comparisons:
    """A data set whose items are verdicts."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return [symbolically_equal("x + y", formula) for formula in ("y + x", "9^{9^{9^9}}", "y + x")]


@pytest.fixture(scope="module")
def server():
    server = FormulaServer()
    yield server
    server._close()


@pytest.mark.parametrize("formula", HOSTILE)
def test_no_formula_takes_long_or_spoils_the_next(server, formula):
    assert server.equal("x + y", formula) is False
    assert server.equal("x + y", "y + x") is True


def test_algebra_works_in_threads():
    verdicts = []
    threads = [threading.Thread(target=lambda: verdicts.append(Comparisons()[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [[True, False, True]] * 4


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_algebra_works_in_data_loader_workers_beside_the_one_of_this_process():
    assert symbolically_equal("x + y", "y + x")
    loader = DataLoader(Comparisons(), batch_size=None, num_workers=2, collate_fn=list)
    assert list(loader) == [[True, False, True]] * 3
    assert symbolically_equal("x + y", "y + x")


def test_a_process_that_somebody_ended_is_replaced(server):
    assert server.equal("x + y", "y + x")
    os.killpg(server._process.pid, signal.SIGKILL)
    assert server.equal("x + y", "y + x")


def test_a_process_that_cannot_start_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="is math-verify installed"):
        FormulaServer().equal("x + y", "y + x")


def test_nothing_is_printed(capfd):
    server = FormulaServer()
    server.equal("x + y", r"\frac{")
    server.equal("x + y", "9^{9^{9^9}}")
    server._close()
    assert capfd.readouterr() == ("", "")


def test_long_formulas_and_plain_numbers_need_no_process(monkeypatch):
    server = FormulaServer()
    assert server.equal("x", "x" * (MAX_LENGTH + 1)) is False
    assert server._process is None
    monkeypatch.setattr("cpt_lightning.rewards.formulas.symbolically_equal", None)
    verdicts = [grade(said, r"5 \sqrt { 3 }", "math") for said in (r"\sqrt{75}", "8.6", "$x = 9$.", "rhombus")]
    assert verdicts == [1, 0, 0, 0]


def test_nothing_is_ever_evaluated(tmp_path):
    """The package names neither ``eval`` nor what calls it in sympy, and text that would do harm does none."""
    written = tmp_path / "harm"
    for kind in ("math", "number", "text"):
        assert grade(f"__import__('pathlib').Path('{written}').touch()", "x + 1", kind) == 0
    symbolically_equal("x + 1", f"__import__('pathlib').Path('{written}').touch()")
    assert not written.exists()
    files = Path(rewards.__file__).parent.glob("*.py")
    names = {node.id for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
    assert names.isdisjoint({"eval", "exec", "sympify", "parse_expr", "ExprExtractionConfig"})
