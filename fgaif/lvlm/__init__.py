"""Loading LVLMs, prompts, token log-probabilities, LoRA and export."""
