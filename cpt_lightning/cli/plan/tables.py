"""A plan as tables on a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from cpt_lightning.cli.plan.devices import Devices
from cpt_lightning.cli.plan.phases import Plan, Workload
from cpt_lightning.modules import PostTraining
from cpt_lightning.modules.group_rollouts import GroupRollouts

UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))

ADVICE = {
    "weights": "backbone.dtype bfloat16, backbone.tuning qlora, or trainer.strategy fsdp2",
    "gathered weights": "backbone.dtype bfloat16; fsdp2 holds the whole weights while it computes",
    "reference": "kl_coef 0, or backbone.tuning lora, whose reference is the adapters' own",
    "gradients": "backbone.tuning lora, backbone.freeze [vision_tower], or under fsdp2 micro_batch_prompts 1",
    "gradient buckets": "trainer.strategy fsdp2, or backbone.tuning lora",
    "optimizer": "backbone.tuning lora, configs/optimizers/adamw_8bit.yaml, or trainer.strategy fsdp2",
    "optimizer step": "optimizer.init_args.fused true, or configs/optimizers/adamw_8bit.yaml",
    "callbacks": "backbone.tuning lora, trainer.strategy fsdp2, or fewer methods and measurements at once",
    "new estimate": "backbone.tuning lora, or trainer.strategy fsdp2",
    "batch": "data.prompts_per_step or backbone.max_pixels",
}
"""What makes a kind of memory smaller, wherever it is the largest."""
ADVICE_BY_PHASE = {
    "rollout": "rollout_batch_prompts, group_size, sampling.max_new_tokens or backbone.max_pixels",
    "update": "micro_batch_prompts 1, backbone.gradient_checkpointing [vision_tower, language_model], or "
    "sampling.max_new_tokens",
    "evaluation": "data.eval_prompts_per_step or evaluation.max_new_tokens",
    "filter": "data.eval_prompts_per_step, filter.completions_per_row or filter.sampling.max_new_tokens",
}
"""The same for what a phase computes."""
CALLBACK_ADVICE = (
    "the callback's num_rows and max_new_tokens, if it has them; for what it keeps backbone.tuning lora, or "
    "trainer.strategy fsdp2"
)
SFT_ADVICE = (
    "data.prompts_per_step with trainer.accumulate_grad_batches, or backbone.gradient_checkpointing "
    "[vision_tower, language_model]"
)


def size(num_bytes: int) -> str:
    """Bytes for people.

    >>> size(80_000_000_000)
    '80.0 GB'
    """
    unit, name = next(((unit, name) for unit, name in UNITS if num_bytes >= unit), (1, "B"))
    return f"{num_bytes / unit:.1f} {name}"


def arithmetic(module: PostTraining, workload: Workload, devices: Devices, plan: Plan) -> Table:
    """Parameters, and what a step consists of."""
    table = Table(title="the run", title_justify="left", title_style="bold", show_header=False)
    share = plan.num_trainable / plan.num_weights
    table.add_row("parameters", f"{plan.num_weights:,}, trainable {plan.num_trainable:,} ({share:.2%})")
    table.add_row("devices", f"{devices.world_size}, strategy {devices.strategy}, precision {devices.precision}")
    prompts = devices.share(workload.prompts_per_step)
    table.add_row("a step", f"{workload.prompts_per_step} prompts, {prompts} on a device")
    new, group, forced = workload.target_tokens, 1, 0
    if isinstance(module, GroupRollouts):
        new, group = module.sampling.max_new_tokens, module.group_size
        forced = len(module.processor.encode_prefix(module.sampling.prefix))
        rows = -(-prompts // module.updates_per_rollout)
        micro = min(module.micro_batch_prompts or rows, rows)
        table.add_row("", f"{group} completions of each, {module.updates_per_step} updates of {rows} prompts")
        table.add_row("", f"{-(-rows // micro)} micro-batches of {micro} prompts in an update")
    tokens = prompts * (workload.prompt_tokens + forced + group * new)
    asked = f"{workload.prompt_tokens:,}" + (f" + {forced:,} of sampling.prefix" if forced else "")
    table.add_row("", f"up to {asked} + {group} x {new:,} tokens a prompt, {tokens:,} on a device")
    return table


def phase_table(plan: Plan) -> Table:
    """Memory of each device, by phase and kind."""
    table = Table(title="memory of a device, worst batch", title_justify="left", title_style="bold")
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right", overflow="fold", style="bold" if phase is plan.peak else "")
    for kind in dict.fromkeys(kind for phase in plan.phases for kind in phase.kinds):
        cells = [size(phase.kinds[kind]) if kind in phase.kinds else "-" for phase in plan.phases]
        table.add_row(kind, *cells)
    table.add_section()
    table.add_row("all", *[size(phase.total) for phase in plan.phases])
    return table


def verdict(plan: Plan, gpu: str, room: int) -> Text:
    """Whether it fits."""
    fits = plan.peak.total <= room
    text = "fits" if fits else "WILL NOT FIT"
    line = f"{text}: the {plan.peak.name} needs {size(plan.peak.total)}, {gpu} has {size(room)} for tensors"
    return Text(line, style="green" if fits else "bold red")


def advice(module: PostTraining, plan: Plan) -> list[str]:
    """The largest kinds of memory in the worst phase, and which options make them smaller."""
    kinds = sorted(plan.peak.kinds.items(), key=lambda item: -item[1])[:2]
    return [f"  {kind} {size(num_bytes)}: {_mend(module, plan.peak.name, kind)}" for kind, num_bytes in kinds]


def _mend(module: PostTraining, phase: str, kind: str) -> str:
    if kind in ADVICE:
        return ADVICE[kind]
    phase = phase.split(" ")[0]
    if phase == "update" and not isinstance(module, GroupRollouts):
        return SFT_ADVICE
    return ADVICE_BY_PHASE.get(phase, CALLBACK_ADVICE)
