"""The embedded default: a miniature world of coloured shapes, its pictures, its judge and its base model."""
