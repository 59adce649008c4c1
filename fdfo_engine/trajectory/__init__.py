"""What a rollout leaves for the update."""
