"""What a checkpoint holds of a module, and how a module goes on from it or is made from it alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod

from cpt_lightning.checkpoint_io import AtomicCheckpointIO, check_resumable, read_checkpoint
from cpt_lightning.models import Backbone
from cpt_lightning.models.fingerprint import frozen_fingerprint
from cpt_lightning.models.qwen_vl import check_model
from cpt_lightning.modules.compatibility import KEY, check_backbone, check_frozen, check_ours, check_weights
from cpt_lightning.modules.random_states import random_state, set_random_state

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

T = TypeVar("T")


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
        """Has checkpoints read as data only.

        Raises:
            ValueError: The module went through ``torch.compile``.
        """
        super().setup(stage)
        if self._compiler_ctx is not None:
            raise ValueError(
                "torch.compile(module): its steps sample, grade and log, which cannot be traced; give the Trainer a "
                "module that was not compiled"
            )
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
        the options the backbone's alone, whatever ``save_hyperparameters`` was told; a folder of shards is read as
        well.

        Args:
            checkpoint_path: The checkpoint of a run, whichever objective wrote it.
            map_location: Device of the module.
            weights_only: Checkpoints are read as data only, whatever it says.
            **options: Of the class; ``backbone`` is by default the checkpoint's.

        Raises:
            TypeError: An option of the class in the place of a device.
            ValueError: It is no checkpoint of ours, of another backbone, or weights are missing.
        """
        if not isinstance(map_location, str | int | torch.device | None):
            raise TypeError(
                f"map_location={map_location!r} is no device; options of {cls.__name__} are given by keyword"
            )
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
            model = self.load_model()
            check_model(model)
            self.model = model
        self._frozen_fingerprint = self._frozen_fingerprint or frozen_fingerprint(self.model)

    def without_frozen(self, state: Mapping[str, T]) -> dict[str, T]:
        """The entries of a state dict that the backbone's options do not give back."""
        named = self.model.named_parameters(remove_duplicate=False)  # tied weights have two
        frozen = {f"model.{name}" for name, parameter in named if not parameter.requires_grad}
        # The scales of a four-bit weight stand behind its name: "weight.absmax".
        return {name: value for name, value in state.items() if frozen.isdisjoint(_prefixes(name))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out the frozen weights; adds which they were, and the random numbers' states."""
        for owner in (L.LightningModule, L.LightningDataModule):  # what save_hyperparameters kept may be any object
            for key in (owner.CHECKPOINT_HYPER_PARAMS_KEY, owner.CHECKPOINT_HYPER_PARAMS_TYPE):
                checkpoint.pop(key, None)
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
        check_frozen(where, checkpoint[KEY], self.backbone, self._frozen_fingerprint)
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
        check_backbone(where, checkpoint[KEY]["backbone"], self.backbone)

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


def _prefixes(name: str) -> set[str]:
    """``a``, ``a.b`` and ``a.b.c`` of ``a.b.c``."""
    return {name, *(name[:place] for place, character in enumerate(name) if character == ".")}
