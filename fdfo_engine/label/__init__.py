"""The page where a person's choices are the reward: a client of the server's rounds, in a process of its own."""
