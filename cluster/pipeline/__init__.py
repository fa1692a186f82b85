"""The stages of a run: what they need, whether they are done, and their work."""
