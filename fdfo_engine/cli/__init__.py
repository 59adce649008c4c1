"""The console script `fdfo`: one file a verb, each with `add_parser` and a function that returns nothing or a status."""
