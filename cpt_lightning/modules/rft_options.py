"""What the options of :class:`~cpt_lightning.modules.RFT` may be, and which go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cpt_lightning.functional import kl_k1, kl_k2, kl_k3

if TYPE_CHECKING:
    from cpt_lightning.modules.rft import RFT

PolicyLoss = Literal["ppo", "gspo", "cispo"]
"""What an update maximises."""
USUAL_CLIPS: dict[PolicyLoss, tuple[float, float]] = {"ppo": (0.2, 0.3), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
"""How far below and above 1 each lets ratios go by default."""
KLEstimator = Literal["k1", "k2", "k3", "full"]
"""How the divergence from the reference is computed, see :mod:`cpt_lightning.functional.kl`."""
KL_ESTIMATES = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
"""Those that need log-probabilities of the sampled tokens only."""
COMPARED_WITH_NO_SIBLING = ("remax", "reinforce_plus_plus", "one_zero")
"""Advantages that groups of one completion have too."""


def check_options(module: RFT) -> None:
    """Refuses options that are out of range, or do not go together.

    Raises:
        ValueError: Names the option, its value and what is wrong with it.
    """
    for name in ("clip_low", "clip_high"):
        if (value := getattr(module, name)) < 0:
            raise ValueError(f"{name}={value} must not be negative")
    if module.dual_clip is not None and module.dual_clip <= 1:
        raise ValueError(f"dual_clip={module.dual_clip} bounds ratios above 1, so it must be above 1 (paper A: 3.0)")
    if module.dual_clip is not None and module.policy_loss == "cispo":
        raise ValueError(
            f"dual_clip={module.dual_clip} has no meaning for policy_loss=cispo, whose clip_high is a bound"
        )
    if module.kl_in_reward and module.kl_estimator == "full":
        raise ValueError("kl_in_reward needs a number per sampled token: kl_estimator k1, k2 or k3, not full")
    if (module.reference_kind == "synchronised") != (module.reference_every is not None):
        raise ValueError(
            f"reference={module.reference_kind}, reference_every={module.reference_every}: a synchronised reference, "
            "and no other, is renewed every so many steps"
        )
    if module.importance_sampling is not None and module.sampler is None:
        raise ValueError(
            f"importance_sampling={module.importance_sampling} corrects for another engine than ours: set sampler, or "
            "leave it out"
        )
    if module.importance_cap < 1:
        raise ValueError(f"importance_cap={module.importance_cap} must be at least 1, the weight of what fits exactly")
    if module.group_size < 2 and module.advantage not in COMPARED_WITH_NO_SIBLING:
        raise ValueError(
            f"group_size={module.group_size}: a completion is compared with its siblings, so sample 2 or more"
        )
