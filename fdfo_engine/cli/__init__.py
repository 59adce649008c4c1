"""The verbs of the fdfo command, one short file each."""
