"""Tensors, gradients and weights over several ranks."""
