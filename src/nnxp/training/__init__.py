"""Training: losses, optimisers, schedules, and the loop that fits a model to rows."""
