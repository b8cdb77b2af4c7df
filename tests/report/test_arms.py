"""Which runs are seeds of one arm, and what arms are called."""

import pytest

from cpt_lightning.report import arms_of
from tests.report.made_runs import made_run


def found(*arguments) -> dict:
    return {arm.name: list(arm.runs) for arm in arms_of(arguments)}


def test_runs_whose_configs_differ_by_seed_and_folder_are_one_arm(tmp_path):
    runs = [made_run(tmp_path / arm / f"seed_{seed}", seed=seed, lr=lr)
            for arm, lr in (("low", 0.1), ("high", 0.2)) for seed in (0, 1)]  # fmt: skip
    assert found(*runs) == {"low": [0, 1], "high": [0, 1]}


def test_an_option_that_names_the_folder_of_the_same_seed_is_no_difference(tmp_path):
    runs = [made_run(tmp_path / f"seed_{seed}", seed=seed, lr=f"runs/base/seed_{seed}/last.ckpt") for seed in (0, 1)]
    assert found(*runs) == {tmp_path.name: [0, 1]}


def test_a_second_run_of_a_seed_and_an_unfinished_one_stand_alone(tmp_path):
    one, again = made_run(tmp_path / "x"), made_run(tmp_path / "x_2")
    half = made_run(tmp_path / "x_3", seed=1, num_stages=1)
    nothing = made_run(tmp_path / "x_4", seed=2)
    (nothing / "accuracy_matrix.json").unlink()
    assert found(one, again, half, nothing) == {
        "x": [0], "x_2": [0], "x_3 (1 of 2 stages)": [1], "x_4 (nothing measured yet)": [2],
    }  # fmt: skip


def test_an_unfinished_seed_is_not_averaged_with_finished_ones(tmp_path):
    runs = [made_run(tmp_path / "x" / f"seed_{seed}", seed=seed, num_stages=2 - seed) for seed in (0, 1)]
    assert found(*runs) == {"x/seed_0": [0], "x/seed_1 (1 of 2 stages)": [1]}


def test_arms_by_name(tmp_path):
    one, two, three = (made_run(tmp_path / name, seed=seed, lr=seed) for seed, name in enumerate("xyz"))
    assert found(f"both={one}", f"both={two}", three) == {"both": [0, 1], "z": [2]}
    with pytest.raises(ValueError, match=r"x and .*w are both seed 0 of both: name them apart, as both_a="):
        found(f"both={one}", f"both={made_run(tmp_path / 'w')}")
    with pytest.raises(ValueError, match="is named twice"):
        found(one, tmp_path / "." / "x")
    with pytest.raises(ValueError, match="must be a folder, or ARM=FOLDER"):
        found(f"={one}")


def test_runs_without_a_config_are_told_apart_by_their_folders(tmp_path):
    runs = [made_run(tmp_path / name / "run") for name in "xy"]
    for run in runs:
        (run / "config.yaml").unlink()
    assert found(*runs) == {"x/run": ["run"], "y/run": ["run"]}
