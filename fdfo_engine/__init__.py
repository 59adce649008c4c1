"""FDFO engine: online RL post-training of text-to-image flow models by paired trajectories (arXiv 2603.12893)."""

from fdfo_engine._source_tree import map_kernels

map_kernels()
__version__ = "0.1.0"
