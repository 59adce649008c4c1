"""The flow models: one protocol, one file a family."""

import logging

# peft imports bitsandbytes where it is installed, and that advises a CPU at every start to fetch a kernel from the hub
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
