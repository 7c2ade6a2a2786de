"""What is emitted: guidance, constraints and rejection. Knows predictions, not models."""
