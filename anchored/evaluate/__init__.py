"""Checkpoints in, scores out: every checkpoint and the starting model answer every benchmark."""
