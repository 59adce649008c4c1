"""What a run takes of memory: sizes counted of a model, an epoch's sum from them, and whether it fits here."""
