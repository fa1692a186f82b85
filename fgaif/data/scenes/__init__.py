"""The embedded world: drawn scenes, their English, their truth, and two tiny LLaVA models."""
