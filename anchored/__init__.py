"""Anchored: align language models with contrastive revisions (CLAIR) and anchored preference optimization (APO)."""

__version__ = "0.1.0"
