"""Step 2: reward models and dense rewards."""
