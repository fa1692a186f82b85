"""Where things run: placement, launch, the PPO driver, stages and the command line."""
