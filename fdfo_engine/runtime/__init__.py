"""What every run needs around the maths: errors, folders, checkpoints, logs, ranks."""
