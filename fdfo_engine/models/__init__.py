"""The flow models: one protocol, one file a family."""

import logging


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed tells a machine without a GPU at every start that it has none; `fdfo doctor` tells who asks."""
    return "Setting accelerator to CPU" not in record.getMessage()


logging.getLogger("DeepSpeed").addFilter(_is_news)

# peft imports bitsandbytes where it is installed, and that advises a CPU at every start to fetch a kernel from the hub
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
