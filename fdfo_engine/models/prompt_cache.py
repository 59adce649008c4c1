"""Each prompt is encoded once while it is in use; a bound keeps memory flat on long prompt lists."""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from fdfo_engine.models.flow_model import Conditioning, FlowModel

CACHE_BYTES = 1 << 30


class PromptCache:
    """Embeddings by prompt, the least recently used dropped first beyond `max_bytes`; held on the CPU."""

    def __init__(self, model: FlowModel, max_bytes: int = CACHE_BYTES) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt, on the model's device."""
        rows = [self._row(prompt) for prompt in prompts]
        return Conditioning.cat(rows).to(self._model.device)

    def _row(self, prompt: str) -> Conditioning:
        if prompt not in self._rows:
            with torch.no_grad():
                self._rows[prompt] = self._model.encode_prompt(prompt).to(torch.device("cpu"))
            self._bytes += self._rows[prompt].nbytes
        self._rows.move_to_end(prompt)
        row = self._rows[prompt]
        while self._bytes > self._max_bytes and len(self._rows) > 1:
            self._bytes -= self._rows.popitem(last=False)[1].nbytes
        return row
