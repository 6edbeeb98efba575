"""A battery of measurements for one GPU: numerics, real-size kernels and memory, whole iterations (docs/gpu.md)."""
