"""Verifiers of the demo's world, and the rewards and judges made of them."""
