"""Step 3: the maths of PPO with per-token rewards."""
