"""From a checkpoint of a run to a folder that plain transformers and PEFT load."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from cpt_lightning.callbacks.cards import Kind, config_of, model_card
from cpt_lightning.callbacks.exports import EXPORTS, merged_model, weights_of_model
from cpt_lightning.checkpoint_files import checkpoints_in
from cpt_lightning.checkpoint_io import read_checkpoint, record_of
from cpt_lightning.models import Backbone
from cpt_lightning.models.adapters import has_adapters
from cpt_lightning.models.folders import load_weights, refuse_filled, save_folder
from cpt_lightning.records.matrix import AccuracyMatrix
from cpt_lightning.records.run import MATRIX
from cpt_lightning.rollouts.prefixes import prefixes_of

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

TASK_CHECKPOINT = re.compile(r"(?P<stage>\d+)_(?P<name>.+)\.ckpt")


def export(
    run: str | Path,
    task: str | None = None,
    merge: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Exports a checkpoint: with LoRA as PEFT adapter, otherwise as a whole transformers model.

    Where every task has an adapter of its own, that of the checkpoint's task is exported.

    Args:
        run: Directory of the run.
        task: The task after which, as ``word2`` or ``1_word2``; where the run stands last by default.
        merge: Merge the adapter into its base, after those it was renewed from; the folder then holds a whole model.
        output: Folder to write; ``exports/<name of the checkpoint>`` in the run's by default.
        overwrite: Replace a folder that is not empty.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        FileExistsError: The folder is not empty.
        ValueError: There is nothing to merge, what was merged along the stream is to be left out, or the checkpoint's
            weights are not those of the run's model.
    """
    run = Path(run)
    config = _config(run)
    path = find_checkpoint(_checkpoint_folder(run, config), task)
    folder = Path(output) if output is not None else run / EXPORTS / (path.stem + ("_merged" if merge else ""))
    refuse_filled(folder, overwrite)
    backbone = backbone_of(config, run)
    if merge and backbone.tuning == "full":
        raise ValueError("--merge: this run tuned the weights themselves, there is no adapter to merge; leave it out")
    checkpoint = read_checkpoint(path, parts=["state_dict"])
    model = _model_of(backbone, checkpoint["state_dict"], path, merge)
    kind: Kind = "merged" if merge else "adapter" if has_adapters(model) else "full"
    matrix = AccuracyMatrix.load(run / MATRIX) if (run / MATRIX).is_file() else None
    card = model_card(
        f"{run.resolve().name}/{folder.name}",
        kind,
        backbone,
        str(model.dtype).removeprefix("torch."),
        *learned_stages(path, checkpoint, matrix),
        matrix,
        config,
        prefixes_of(config["model"]["init_args"]),
    )
    save_folder(model, backbone.load_processor(), folder, backbone.path, card, overwrite=overwrite)
    return folder


def _model_of(backbone: Backbone, state: dict, path: Path, merge: bool) -> QwenVL:
    """The model of a checkpoint, with its adapter or with all of them merged in."""
    if merge:
        return merged_model(backbone, state, str(path))
    if backbone.lora.along_stream == "renewed" and any(name.startswith("earlier.") for name in state):
        raise ValueError(
            f"{path.name}: adapters were merged into the weights and begun anew (backbone.lora.along_stream=renewed), "
            "so the last one alone is not the model that was evaluated; --merge exports it, with all of them merged"
        )
    model = backbone.load_model()
    load_weights(model, weights_of_model(state), str(path))
    return model


def find_checkpoint(folder: Path, task: str | None) -> Path:
    """The checkpoint of a task, or the last.

    Args:
        folder: Folder of the checkpoints.
        task: Name of the stage, with its number or without.

    Raises:
        FileNotFoundError: There is none; lists those that exist.
    """
    found = {path.stem: path for path in sorted(checkpoints_in(folder), key=_stage)}
    if not found:
        raise FileNotFoundError(f"{folder} holds no checkpoint (*.ckpt)")
    if task is None and "last" in found:
        return found["last"]
    named = [stem for stem in found if task in (stem, stem.partition("_")[2])]
    if len(named) == 1:
        return found[named[0]]
    if named:
        raise FileNotFoundError(f"--task {task}: it was learned several times; say which of {', '.join(named)}")
    names = [name for stem in found for name in (stem, stem.partition("_")[2]) if name]
    close = get_close_matches(task or "last", names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise FileNotFoundError(f"--task {task or 'last'}: no checkpoint of that name; {hint}there are {', '.join(found)}")


def _stage(path: Path) -> int:
    match = TASK_CHECKPOINT.fullmatch(path.name)
    return int(match["stage"]) if match else 0


def backbone_of(config: dict, run: Path) -> Backbone:
    """The backbone that a run's configuration describes.

    Raises:
        ValueError: It describes none.
    """
    options = (config.get("model") or {}).get("init_args", {}).get("backbone")
    if options is None:
        raise ValueError(f"{run / 'config.yaml'}: there is no model.init_args.backbone; is it the config of a run?")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Backbone, "backbone")
    return parser.instantiate(parser.parse_object({"backbone": options})).backbone


def learned_stages(path: Path, checkpoint: dict, matrix: AccuracyMatrix | None) -> tuple[list[str], str | None]:
    """Names of the stages that were learned before a checkpoint, and of the one that had only begun."""
    names = [] if matrix is None else matrix.stage_names
    if match := TASK_CHECKPOINT.fullmatch(path.name):
        return names[: int(match["stage"])] or [match["name"]], None
    # A row joins the record at the end of its stage; a checkpoint without a record may be from before or after.
    stage, record = checkpoint["epoch"], record_of(checkpoint)
    if record is not None and len(record["rows"]) > stage:
        return names[: stage + 1], None
    return names[:stage], names[stage] if stage < len(names) else "the stream"


def push(folder: Path, repo_id: str) -> str:
    """Uploads a folder to the Hugging Face hub; a repository that is not there yet is made, and is private.

    Returns:
        The address of the upload.

    Raises:
        ConnectionError: The hub does not answer, or refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        name = api.create_repo(repo_id, private=True, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="cpt export"))
    except Exception as error:  # of whichever HTTP client the installed huggingface_hub is built on
        raise ConnectionError(
            f"--push {repo_id}: {type(error).__name__}: {error}\n{folder} is complete; once the hub can be reached: "
            f"hf upload {repo_id} {folder}"
        ) from error


def check_pushable(repo_id: str) -> None:
    """Refuses, before anything is exported, an upload that cannot succeed.

    Raises:
        ValueError: The name is none, nobody is logged in, or the hub must not be asked.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--push {repo_id}: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push {repo_id}: HF_HUB_OFFLINE is set; unset it, or leave --push out")
    if get_token() is None:
        raise ValueError(f"--push {repo_id}: nobody is logged in to the hub; run `hf auth login` or set HF_TOKEN")


def _config(run: Path) -> dict:
    if run.suffix == ".ckpt":
        raise FileNotFoundError(f"{run} is a checkpoint; give its run's folder, and --task {run.stem}")
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: there is no such folder; give the run_dir of a run")
    config = config_of(run)
    if config is not None:
        return config
    if (run / MATRIX).exists() or any(run.glob("*.ckpt")):
        raise FileNotFoundError(
            f"{run} has no config.yaml, as its run was made from Python: export there with the callback TaskExport or "
            "cpt_lightning.models.folders.save_folder"
        )
    raise FileNotFoundError(f"{run} is no run's folder: it has no config.yaml")


def _checkpoint_folder(run: Path, config: dict) -> Path:
    elsewhere = (config.get("checkpoint") or {}).get("dirpath")
    return Path(elsewhere) if elsewhere else run
