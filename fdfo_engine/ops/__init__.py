"""Public ops: the only surface other frontends import kernels through."""
