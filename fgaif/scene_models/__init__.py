"""The tiny LLaVA models of the embedded world: how they are made and measured."""
