"""How fast whole transformers run on a machine, timed side by side, with where each number comes from."""
