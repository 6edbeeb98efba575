"""The mathematics of flow-matching post-training: pure functions on tensors, on top of torch alone.

The convention, everywhere in this project, is that of diffusers and of arXiv 2606.27608:

    t (= sigma) runs from 1 (noise) to 0 (data)
    x_t     = (1 - t) x_0 + t eps
    v       = eps - x_0                     what the network predicts
    x_next  = x + v (sigma_next - sigma)    one ODE step; sigma_next < sigma, so dt < 0
    x_0_hat = x_t - t v,    eps_hat = x_t + (1 - t) v

Parts of the literature run time the other way, data at t = 1: check before copying a formula from a paper.

Everything is computed in float32 (group statistics in float64), whatever dtype comes in.

The function `rollout` is imported from its module, `flow_rl.flow.rollout`, whose name it would hide here.
"""

from flow_rl.flow.advantages import group_advantages
from flow_rl.flow.guidance import Guidance, guide
from flow_rl.flow.noise import Stream, batch_noise, keyed_generator, keyed_noise
from flow_rl.flow.objectives import (
    clipped_policy_loss,
    guarded_policy_loss,
    kl_to_reference,
    nft_loss,
    step_weights,
    velocity_matching_loss,
)
from flow_rl.flow.schedule import noise_latents, predict_noise, predict_x0, shift_mu, sigma_schedule
from flow_rl.flow.states import choose_states, kl_weights
from flow_rl.flow.transitions import KINDS, Transition, transition
from flow_rl.flow.windows import all_steps, high_noise_steps, low_noise_steps, sliding_window

__all__ = [
    "KINDS",
    "Guidance",
    "Stream",
    "Transition",
    "all_steps",
    "batch_noise",
    "choose_states",
    "clipped_policy_loss",
    "group_advantages",
    "guarded_policy_loss",
    "guide",
    "high_noise_steps",
    "keyed_generator",
    "keyed_noise",
    "kl_to_reference",
    "kl_weights",
    "low_noise_steps",
    "nft_loss",
    "noise_latents",
    "predict_noise",
    "predict_x0",
    "shift_mu",
    "sigma_schedule",
    "sliding_window",
    "step_weights",
    "transition",
    "velocity_matching_loss",
]
