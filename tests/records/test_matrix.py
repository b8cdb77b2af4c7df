"""The accuracy matrix as a table for a terminal."""

import io

from rich.console import Console

from cpt_lightning.records import AccuracyMatrix
from cpt_lightning.report.summary import summary_table


def test_names_are_text_and_no_markup_and_intervals_stay_within_0_and_100():
    """Wilson, none right of four: from 0 to z^2 / (4 + z^2) = 3.8415 / 7.8415."""
    row = {name: {"accuracy": 0.0, "num_samples": 4} for name in ("[red]a", "[b]")}
    matrix = AccuracyMatrix(["[red]a"], ["[b]"], [["[red]a"]], row, [row])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(matrix.table(confidence=0.95), summary_table(matrix))
    text = console.export_text()
    assert text.count("[red]a") == 3 and text.count("probe [b]") == 2
    assert text.count("0.0 [0.0, 49.0]") == 4
