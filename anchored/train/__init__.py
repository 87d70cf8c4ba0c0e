"""Pairs to checkpoints: reference log-probabilities, the training loop, checkpoints, metrics."""
