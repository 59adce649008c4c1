"""The console script `fdfo`: one file a verb, with its `add_parser` and the function that runs it."""
