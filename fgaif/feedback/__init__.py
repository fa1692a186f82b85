"""Step 1: sub-sentences, atomic facts, verdicts and labels."""
