"""What a checkpoint holds of a module, and which checkpoints it goes on from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import Tensor

from cpt_lightning.checkpoint_io import AtomicCheckpointIO, check_resumable, read_checkpoint
from cpt_lightning.models import Backbone
from cpt_lightning.models.fingerprint import frozen_fingerprint

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

T = TypeVar("T")
KEY = "cpt_lightning"
"""Of what is added to a checkpoint here."""
MAY_CHANGE = {"path", "dtype", "gradient_checkpointing", "min_pixels", "max_pixels", "cuda_graphs", "lora.dropout"}
"""Options of the backbone that may differ from the checkpoint's; if path and dtype matter, the frozen weights tell."""
UNUSED = {"full": ("lora.", "quantization."), "lora": ("quantization.",), "qlora": ()}
"""By ``backbone.tuning``, how options begin that mean nothing then."""
NAMED = 3
"""How many names a complaint lists."""


class Resumable(L.LightningModule):
    """A module whose checkpoints hold what the backbone's options do not give back, and that takes no others.

    Of the backbone these are the trainable weights: for LoRA, adapters only. What else has a state is kept whole, such
    as the reference of a KL term; and so is the state of the random numbers of every rank.
    """

    backbone: Backbone
    model: QwenVL

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # frozen weights are not in the file; on_load_checkpoint sees to the others
        self._frozen_fingerprint: str | None = None
        self._random_states: list[dict[str, Any]] = []

    def configure_callbacks(self) -> list[L.Callback]:
        """Adds none; has a fit checked, before any callback begins and weights are loaded."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.check_fit(self.trainer)
        return []

    def check_fit(self, trainer: L.Trainer) -> None:
        """Looks at the settings of a Trainer and its stream; ``cpt fit`` has it done before the base is evaluated.

        Raises:
            ValueError: Names what would stop the fit or spoil its results, and the mend.
        """
        for callback in trainer.callbacks:
            if isinstance(callback, BaseFinetuning | ModelPruning):
                raise ValueError(
                    f"{type(callback).__name__} changes which weights there are, or which are trained, and checkpoints "
                    "hold those that backbone.tuning and backbone.freeze say: set these instead"
                )

    def setup(self, stage: str) -> None:
        """Has checkpoints read as data only."""
        super().setup(stage)
        AtomicCheckpointIO.take_over(self.trainer.strategy)

    @_restricted_classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device = "cpu",
        weights_only: bool = True,
        **options: Any,
    ) -> Self:
        """A module of this class with the weights of a checkpoint, which answers as the one that was trained.

        Lightning's own would take classes and options from the file. This one reads tensors and plain values, and of
        the options the backbone's alone; a folder of shards is read as well.

        Args:
            checkpoint_path: The checkpoint of a run, whichever objective wrote it.
            map_location: Device of the module.
            weights_only: Checkpoints are read as data only, whatever it says.
            **options: Of the class; ``backbone`` is by default the checkpoint's.

        Raises:
            ValueError: It is no checkpoint of ours, of another backbone, or weights are missing.
        """
        checkpoint = read_checkpoint(checkpoint_path, parts=["state_dict"])
        check_ours(str(checkpoint_path), checkpoint)
        if "backbone" not in options:
            options["backbone"] = Backbone.of(checkpoint[KEY]["backbone"])
        module = cls(**options)
        module.configure_model()
        module.to(map_location)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
        return module

    def load_model(self) -> QwenVL:
        """The backbone as its options say."""
        return self.backbone.load_model()

    def configure_model(self) -> None:
        """Loads the backbone, once, and notes which it is."""
        if "model" not in self._modules:
            self.model = self.load_model()
        self._frozen_fingerprint = self._frozen_fingerprint or frozen_fingerprint(self.model)

    def without_frozen(self, state: Mapping[str, T]) -> dict[str, T]:
        """The entries of a state dict that the backbone's options do not give back."""
        named = self.model.named_parameters(remove_duplicate=False)  # tied weights have two
        frozen = {f"model.{name}" for name, parameter in named if not parameter.requires_grad}
        # The scales of a four-bit weight stand behind its name: "weight.absmax".
        return {name: value for name, value in state.items() if frozen.isdisjoint(_prefixes(name))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out the frozen weights; adds which they were, and the random numbers' states."""
        if "model" not in self._modules:  # a callback saves what failed before there was anything
            return
        checkpoint["state_dict"] = self.without_frozen(checkpoint["state_dict"])
        mine, strategy = random_state(self.device), self.trainer.strategy
        checkpoint[KEY] = {
            "backbone": asdict(self.backbone),
            "frozen": self._frozen_fingerprint,
            "random_states": [strategy.broadcast(mine, src=rank) for rank in range(self.trainer.world_size)],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint fits, and takes note of the random numbers' states.

        Raises:
            ValueError: It is another program's, or of another backbone, or weights are missing.
        """
        where = "the checkpoint" if self._trainer is None else f"checkpoint {self._trainer.ckpt_path}"
        check_ours(where, checkpoint)
        is_fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        self.check_checkpoint(where, checkpoint, is_fitting)
        self._check_frozen(where, checkpoint[KEY])
        if "state_dict" in checkpoint:  # else the strategy has loaded the weights itself
            check_weights(where, checkpoint["state_dict"], self.without_frozen(self.state_dict()))
        if is_fitting:
            check_resumable(checkpoint, str(self.trainer.ckpt_path))
            self._random_states = checkpoint[KEY]["random_states"]

    def check_checkpoint(self, where: str, checkpoint: Mapping[str, Any], is_fitting: bool) -> None:
        """Looks at what can be told without weights; ``cpt`` has it done before it loads any.

        Args:
            where: Names the checkpoint.
            checkpoint: Its content; without the tensors of weights and optimizers is enough.
            is_fitting: Whether learning goes on from it.

        Raises:
            ValueError: It is of another backbone; names the option, both values and the mend.
        """
        before, now = (flattened(options) for options in (checkpoint[KEY]["backbone"], asdict(self.backbone)))
        for name in sorted(now.keys() - MAY_CHANGE, key=lambda name: (name != "tuning", name)):
            unused = name.startswith(UNUSED[self.backbone.tuning])
            if not unused and before.get(name, now[name]) != now[name]:
                raise ValueError(
                    f"{where} belongs to backbone.{name}={before[name]}, now it is {now[name]}; restore it, or begin a "
                    "new run from the model: `cpt export` it, and name the folder as backbone.path"
                )

    def on_train_start(self) -> None:
        """Goes on with the random numbers of the checkpoint; nothing draws any between here and the next step."""
        states, self._random_states = self._random_states, []
        if len(states) == self.trainer.world_size:
            set_random_state(states[self.trainer.global_rank], self.device)
        elif states:
            rank_zero_warn(
                f"the checkpoint was saved on {len(states)} rank(s) and goes on with {self.trainer.world_size}: "
                "weights, optimizer, schedule and order of rows go on exactly; what each rank draws at random "
                "(completions, dropout) and the order in which gradients are summed do not"
            )

    def _check_frozen(self, where: str, saved: Mapping[str, Any]) -> None:
        before, now = saved["backbone"], asdict(self.backbone)
        if None not in (saved["frozen"], self._frozen_fingerprint) and saved["frozen"] != self._frozen_fingerprint:
            raise ValueError(
                f"{where} holds what was trained on other frozen weights: backbone.path={before['path']} with dtype "
                f"{before['dtype']}, now it is {now['path']} with dtype {now['dtype']}"
            )


def check_ours(where: str, checkpoint: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that another program wrote with Lightning.

    Raises:
        ValueError: It is one.
    """
    if KEY not in checkpoint:
        raise ValueError(f"{where} was not written by cpt_lightning, or by an early version that kept all weights")


def flattened(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in groups, by names with dots.

    >>> flattened({"tuning": "lora", "lora": {"rank": 2}})
    {'tuning': 'lora', 'lora.rank': 2}
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        inner = {f"{name}.{key}": part for key, part in flattened(value).items()} if isinstance(value, dict) else None
        found |= {name: value} if inner is None else inner
    return found


def check_weights(where: str, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses weights of other names or shapes than are expected.

    Raises:
        ValueError: Names some of them.
    """
    if missing := sorted(expected.keys() - saved.keys()):
        raise ValueError(f"{where} lacks {_some(missing)}; give the options of the model that wrote it")
    if strange := sorted(saved.keys() - expected.keys()):
        raise ValueError(
            f"{where} holds {_some(strange)}, which the model does not have; give the options that wrote it"
        )
    for name, weight in expected.items():
        if saved[name].shape != weight.shape:
            raise ValueError(
                f"{where}: {name} has the shape {list(saved[name].shape)}, the model's {list(weight.shape)}; it is of "
                "another backbone"
            )


def _prefixes(name: str) -> set[str]:
    """``a``, ``a.b`` and ``a.b.c`` of ``a.b.c``."""
    return {name, *(name[:place] for place, character in enumerate(name) if character == ".")}


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more weights" if len(names) > NAMED else "")


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of all global generators of this process, as plain values and tensors."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 it is this global one that libraries draw from
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets what :func:`random_state` gave."""
    random.setstate(state["python"])
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})  # noqa: NPY002 as above
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
