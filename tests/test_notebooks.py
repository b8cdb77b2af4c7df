"""The notebooks run, from the first cell to the last, show what is stored in them, and use the public API only."""

from __future__ import annotations

import ast
import base64
import copy
import importlib
import tempfile
from pathlib import Path

import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from cpt_lightning.records import AccuracyMatrix
from tests.notebooks import NOTEBOOKS, ROOT, execute, read

SECONDS = 240
"""For a cell, on a machine with other work; all notebooks together take less when it has none."""
PNG_BYTES, NOTEBOOK_BYTES = 80_000, 400_000

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def source_of(cell) -> str:
    """A cell's Python, without IPython's own commands."""
    return "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))


def kinds_of(cell) -> list:
    """What a cell shows: streams by their name, results by their forms."""
    return [output.get("name") or sorted(output.data) for output in cell.outputs]


def own_run(folder: Path) -> Path:
    """The folder of a run of two stages, as a user may name it."""
    scores = {name: {"accuracy": 0.5, "num_samples": 10} for name in "abp"}
    AccuracyMatrix(["a", "b"], ["p"], [["a"], ["b"]], scores, [scores, scores]).save(folder / "accuracy_matrix.json")
    return folder


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["01_first_stream", "02_inside_a_rollout", "03_sft_versus_rft"]


@pytest.mark.timeout(600)
@notebooks
def test_a_notebook_runs_and_shows_the_kinds_of_things_that_are_stored_in_it(path, tmp_path):
    stored = read(path)
    run = copy.deepcopy(stored)
    execute(run, tmp_path, SECONDS)
    assert [kinds_of(cell) for cell in code_cells(run)] == [kinds_of(cell) for cell in code_cells(stored)]
    assert "stderr" not in [kind for cell in code_cells(run) for kind in kinds_of(cell)], "readers see a warning"


def test_runs_of_a_user_are_drawn(tmp_path):
    """The third notebook with a run in ``RUNS``: its last cell, which else shows nothing, has a table and a picture."""
    notebook = read(NOTEBOOKS[2])
    first = code_cells(notebook)[0]
    folder = own_run(tmp_path / "run")
    assert "\nRUNS = {}" in first.source
    first.source = first.source.replace("\nRUNS = {}", f"\nRUNS = {{'mine': [{str(folder)!r}]}}")
    execute(notebook, tmp_path, SECONDS)
    table, picture = code_cells(notebook)[-1].outputs
    assert "| mine | 1 | 50.0 | 50.0 |" in table.data["text/markdown"]
    assert "image/png" in picture.data


@notebooks
def test_outputs_are_stored_and_small(path):
    notebook = read(path)
    numbers = [cell.execution_count for cell in code_cells(notebook)]
    assert numbers == [*range(1, len(numbers) + 1)], "run from top to bottom: make notebooks"
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    pictures = [
        base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})
    ]
    assert pictures
    assert max(map(len, pictures)) < PNG_BYTES
    assert path.stat().st_size < NOTEBOOK_BYTES


@notebooks
def test_nothing_stored_names_a_folder_of_the_machine_that_ran_it(path):
    text = path.read_text(encoding="utf-8")
    assert [folder for folder in (str(ROOT), str(Path.home()), tempfile.gettempdir()) if f"{folder}/" in text] == []


@notebooks
def test_only_public_names_are_used(path):
    """Of our packages what stands in ``__all__``, and of nothing anything with a leading underscore."""
    tree = ast.parse("\n".join(source_of(cell) for cell in code_cells(read(path))))
    ours = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("cpt_lightning")
    ]
    assert ours
    for node in ours:
        hidden = {alias.name for alias in node.names} - set(importlib.import_module(node.module).__all__)
        assert hidden == set(), f"not public in {node.module}"
    attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert [name for name in attributes if name.startswith("_") and not name.startswith("__")] == []


def test_the_kernel_is_this_python_with_this_tree(tmp_path):
    import sys

    cell = new_code_cell(
        "import sys, os, cpt_lightning\nprint(sys.executable, cpt_lightning.__file__, os.getcwd(), sep='\\n')"
    )
    notebook = new_notebook(cells=[cell])
    execute(notebook, tmp_path, SECONDS)
    where = [sys.executable, str(ROOT / "cpt_lightning" / "__init__.py"), str(tmp_path)]
    assert notebook.cells[0].outputs[0].text.split() == where


def test_a_cell_that_fails_fails_the_test(tmp_path):
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(new_notebook(cells=[new_code_cell("1 / 0")]), tmp_path, SECONDS)
