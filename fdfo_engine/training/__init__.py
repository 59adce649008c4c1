"""What the loop is made of: pairs and their scores, what watches them, evaluations, saving, stopping, telling."""
