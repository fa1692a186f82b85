"""Chat models behind one door: an OpenAI-compatible API, or our own vLLM actors."""
