"""The mathematics of flow-matching post-training: pure functions on tensors, on top of torch alone.

The convention, everywhere in this project, is that of diffusers and of arXiv 2606.27608:

    t (= sigma) runs from 1 (noise) to 0 (data)
    x_t     = (1 - t) x_0 + t eps
    v       = eps - x_0                     what the network predicts
    x_next  = x + v (sigma_next - sigma)    one ODE step; sigma_next < sigma, so dt < 0
    x_0_hat = x_t - t v,    eps_hat = x_t + (1 - t) v

Parts of the literature run time the other way, data at t = 1: check before copying a formula from a paper.

Everything is computed in float32 (group statistics in float64), whatever dtype comes in.
"""
