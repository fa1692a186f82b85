"""Preference pairs and SFT rows made of our scores, and TRL's trainers run on them."""
