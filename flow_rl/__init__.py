"""Reinforcement-learning post-training of flow-matching image models, without Lightning.

Each room imports only those below it:
planning > curation > monitoring > distillation > rl > evaluation > rewards > distributed > models > flow.
`batches`, `errors` and `suggestions` lie below all of them.
"""
