"""On-policy distillation: teachers, states and the gap between velocities."""
