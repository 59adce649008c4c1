"""Silence for what libraries advise and a run knows already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_advice() -> Iterator[None]:
    """Within it diffusers and transformers tell errors alone.

    transformers advises to install torchvision for image processors that no text-to-image pipeline uses. diffusers
    tells at length that the hub was not reached, although all files are here; of each part that a pipeline does not
    have that it cannot be saved; of a LoRA for the transformer that it has none for the text encoders. Both say of each
    prompt alone that it is cut, of some encoders only, and not from a cache.
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = [(logging, logging.get_verbosity()) for logging in (of_diffusers, of_transformers)]
    for logging, _ in levels:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        for logging, level in levels:
            logging.set_verbosity(level)
