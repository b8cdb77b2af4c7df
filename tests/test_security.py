"""Nothing that is loaded runs code, and nothing asks the network unless a hub id is named."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cpt_lightning.cli import main
from cpt_lightning.models import load_backbone
from cpt_lightning.models.processor import TINY
from cpt_lightning.tasks import FileRows

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "cpt_lightning").rglob("*.py"))


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def test_no_source_trusts_remote_code_or_unpickles():
    """Not even by a variable: the keyword and the functions do not occur; torch.load says weights_only=True."""
    loads = 0
    for path in SOURCES:
        for call in calls(path):
            name, keywords = ast.unparse(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
            assert "trust_remote_code" not in keywords, path
            assert name not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}, path
            if name in {"torch.load", "numpy.load", "np.load"}:
                loads += 1
                assert ast.literal_eval(keywords["weights_only"]) is True, path
    assert loads


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir"])
@pytest.mark.parametrize("where", ["config", "data"])
def test_a_configuration_cannot_call(tmp_path, monkeypatch, capsys, tag, where):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.yaml").write_text(f"{'model' if where == 'config' else 'tasks'}: !!python/{tag} [pwned]\n")
    option = "-c" if where == "config" else "--data"
    with pytest.raises(SystemExit) as refusal:
        main(["fit", option, "evil.yaml", "--run_dir=run"])
    assert refusal.value.code == 2
    assert "python/object" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("kind", ["file", "folder of shards"])
def test_a_checkpoint_with_code_is_refused_before_anything_is_loaded(tmp_path, capsys, kind):
    import torch

    evil = Evil(tmp_path / "pwned")
    if kind == "file":
        torch.save({"pytorch-lightning_version": "2.6", "hyper_parameters": evil}, tmp_path / "x.ckpt")
    else:
        (tmp_path / "x.ckpt").mkdir()
        (tmp_path / "x.ckpt" / ".metadata").write_bytes(pickle.dumps(evil))
        torch.save({"pytorch-lightning_version": "2.6", "state_dict": {}}, tmp_path / "x.ckpt" / "meta.pt")
    config = ROOT / "configs" / "demo" / "sft.yaml"
    for verb in ("fit", "validate", "test", "predict"):
        with pytest.raises(SystemExit) as refusal:
            main([verb, "-c", str(config), f"--run_dir={tmp_path / 'run'}", f"--ckpt_path={tmp_path / 'x.ckpt'}"])
        assert refusal.value.code == 2
        assert "reading it might run code" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ending", ["pkl", "jsonl", "json", "parquet", "arrow"])
def test_a_data_file_is_never_unpickled(tmp_path, cache, ending):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    with pytest.raises((ValueError, OSError)):
        list(FileRows(train=str(path), test=str(path)).split("train"))
    assert not (tmp_path / "pwned").exists()


def test_a_backbone_cannot_bring_code_along(tmp_path):
    """Configuration, tokenizer and image processor name a class of their own in ``evil.py``; ours are used."""
    folder = tmp_path / "backbone"
    shutil.copytree(TINY, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    maps = {
        "config.json": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Tokenizer", None]},
        "preprocessor_config.json": {"AutoImageProcessor": "evil.ImageProcessor", "AutoProcessor": "evil.Processor"},
    }
    for name, auto_map in maps.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "auto_map": auto_map}))
    model, processor = load_backbone(str(folder))
    assert type(model).__module__.startswith("transformers.")
    assert processor.eos_token_id is not None
    assert not (tmp_path / "pwned").exists()


def test_a_local_backbone_asks_nothing_of_the_network(tmp_path):
    """A fresh process that is not told to be offline, and in which a connection or a look-up of a name is an error."""
    shutil.copytree(TINY, tmp_path / "backbone")
    code = f"""
import socket, sys

def refuse(*args, **kwargs):
    print("network:", args, file=sys.stderr)
    raise AssertionError("the network was asked")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from cpt_lightning.models import load_backbone
load_backbone("tiny")
load_backbone({str(tmp_path / "backbone")!r}, tuning="lora")
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS"))}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "empty")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "network" not in result.stderr


def test_offline_a_hub_id_that_is_not_there_is_an_error_that_says_so():
    """All tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(FileNotFoundError, match="nobody/nothing.*HF_HUB_OFFLINE.*hf download nobody/nothing"):
        load_backbone("nobody/nothing")
