"""``cpt plan``: parses what ``cpt fit`` parses, allocates nothing, and says what memory a run needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpt_lightning.cli.beforehand import BeforehandCLI, Sizes
from cpt_lightning.cli.inspect.tables import console
from cpt_lightning.cli.plan.devices import USABLE, Devices, gpu_bytes
from cpt_lightning.cli.plan.memory import make_plan
from cpt_lightning.cli.plan.tables import advice, arithmetic, phase_table, verdict

DESCRIPTION = """\
Says what memory a run needs on each device, before anything is allocated: parameters, and for rollout, update,
optimizer step, evaluation, methods, measurements and the rollout filter what weights, gradients, optimizer, reference,
KV cache, and activations with log-probs take for the worst batch. The model is made of its config.json, without
weights, and the engine's own code runs on it. Callbacks of your own are not planned for. Ends with 1 if the GPU that is
asked about has not enough.

for example:
  cpt plan -c configs/demo/grpo.yaml --plan.prompt_tokens 100                     a config
  cpt plan -c configs/qwen2_5_vl_7b/grpo.yaml -c configs/strategy/fsdp2.yaml --trainer.devices 8 --plan.gpu H100
  cpt plan -c configs/qwen2_5_vl_7b/grpo.yaml --model.init_args.backbone.path FOLDER   with a config.json in it
"""


@dataclass
class PlanOptions(Sizes):
    """What to plan for.

    Args:
        gpu: GPU that must suffice: a size such as ``80GB``, or a name such as ``H100``.
        cpu: Plan for the CPU, whose optimizers update one weight after the other.

    Raises:
        ValueError: A number below its least, or no such GPU.
    """

    gpu: str | None = None
    cpu: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu is not None:
            gpu_bytes(self.gpu)


class PlanCLI(BeforehandCLI):
    """Makes the module that the arguments describe, without weights, and plans its memory."""

    verb, options, description = "plan", PlanOptions, DESCRIPTION

    def plan(self) -> None:
        """Plans and prints.

        Raises:
            SystemExit: With 1 if the GPU has not enough memory, with 2 if there can be no plan.
        """
        try:
            workload, devices = self.workload(self.config_init.plan), self._devices()
            plan = make_plan(self.model, workload, devices, *self.beside)
        except (ValueError, OSError) as error:
            self.parser.error(str(error))
        out, gpu = console(), self.config_init.plan.gpu
        out.print(arithmetic(self.model, workload, devices, plan), phase_table(plan), sep="\n")
        if gpu is None:
            return
        room = int(gpu_bytes(gpu) * USABLE)
        out.print(verdict(plan, gpu, room))
        if plan.peak.total > room:
            out.print(*advice(self.model, plan), sep="\n", markup=False)
            raise SystemExit(1)

    def _devices(self) -> Devices:
        trainer = self.config.trainer
        if not isinstance(trainer.strategy, str):
            raise ValueError("trainer.strategy: plans are for strategies by name")
        return Devices(
            strategy=trainer.strategy,
            world_size=_number_of(trainer.devices) * trainer.num_nodes,
            precision=str(trainer.precision or "32-true"),
            foreach=not self.config_init.plan.cpu,
        )


def _number_of(devices: int | str | list[int]) -> int:
    """Devices of a node; ``auto`` takes those that are here, 1 if there is none."""
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    return int(devices)
