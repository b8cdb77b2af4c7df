"""The table that `cpt test` prints."""

from cpt_lightning.callbacks.scores import print_scores


def test_names_are_text_brackets_and_all(capsys):
    cell = {"accuracy": 0.5, "num_samples": 4}
    print_scores({"[red]": cell, "[dim]": cell}, "test", probes=["[dim]"])
    said = capsys.readouterr().out
    assert "[red]" in said and "probe [dim]" in said
