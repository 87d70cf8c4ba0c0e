"""Talking to language models: one protocol, real endpoints and local models behind it, and a store of replies."""
