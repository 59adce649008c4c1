"""The flow models: one protocol, one file a family."""
