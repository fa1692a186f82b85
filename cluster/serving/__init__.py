"""Trained reward models on Ray Serve."""
