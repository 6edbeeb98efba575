"""What is minimised: policy gradients on recorded steps, DiffusionNFT, and velocity matching.

Every loss is the mean over the rows given. Given `denominator`, it is their sum divided by that number: with
the row count of the whole batch there, the losses of its micro-batches sum to the loss of the whole, and so
do the gradients. `weights` multiply the rows' losses and do not change the divisor. Metrics are always
means (or maxima) over the rows given, detached and without weights.

Everything is computed in float32. "Old", reference and target quantities are constants: detached here.
"""

from flow_rl.flow.objectives.nft import nft_loss
from flow_rl.flow.objectives.policy_gradient import (
    clipped_policy_loss,
    guarded_policy_loss,
    kl_to_reference,
    step_weights,
)
from flow_rl.flow.objectives.rows import Metrics
from flow_rl.flow.objectives.velocity_matching import velocity_matching_loss

__all__ = [
    "Metrics",
    "clipped_policy_loss",
    "guarded_policy_loss",
    "kl_to_reference",
    "nft_loss",
    "step_weights",
    "velocity_matching_loss",
]
