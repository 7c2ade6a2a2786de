"""What is skipped: scores, masks and budgets. Knows weights and activations, not models."""
