"""What is sampled: prompts, grid, churn, paired trajectories."""
