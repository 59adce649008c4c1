"""Each prompt is encoded once while it is in use; a bound keeps memory flat on long prompt lists."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from fdfo_engine.models.advice import without_advice
from fdfo_engine.models.cut_prompts import CutPrompts
from fdfo_engine.models.finite import require_finite_row
from fdfo_engine.models.flow_model import Conditioning, FlowModel
from fdfo_engine.models.prompt_store import PromptStore

CACHE_BYTES = 4 << 30
"""About 1,500 prompts of SD3 at 256 T5 tokens: the update asks for the whole epoch's again."""


class PromptCache:
    """Embeddings by prompt, the least recently used dropped first beyond `max_bytes`; held on the CPU.

    What is not there is looked up in `store`, where one is given, and else encoded and put there.
    """

    def __init__(self, model: FlowModel, store: PromptStore | None = None, max_bytes: int = CACHE_BYTES) -> None:
        self._model = model
        self._store = store
        self._max_bytes = max_bytes
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0
        self._cut = CutPrompts(model)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt, on the model's device.

        Raises:
            NumericsError: the text encoders gave a value that is not finite.
        """
        wanted = self._wanted(prompts)
        row_of = {prompt: row for row, prompt in enumerate(wanted)}
        each_once = Conditioning.cat(list(wanted.values())).to(self._model.device)
        return each_once.rows(torch.tensor([row_of[prompt] for prompt in prompts]))

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those that are not in memory, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]

    def tell_cut(self, prompts: Sequence[str]) -> None:
        """Says how many of `prompts` are longer than a text encoder reads, of those that were not looked at before."""
        self._cut.tell(prompts)

    def warm(self, prompts: Sequence[str], each: Callable[[int], None] = lambda _: None) -> None:
        """Encodes what is missing in one go: the text encoders then move to the device once. After each, `each(1)`."""
        self._wanted(prompts, each)

    def _wanted(self, prompts: Sequence[str], each: Callable[[int], None] = lambda _: None) -> dict[str, Conditioning]:
        self.tell_cut(prompts)
        wanted = {prompt: self._rows.get(prompt) or self._stored(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, row in wanted.items() if row is None]
        if missing:
            with torch.no_grad(), self._model.text_encoders(), without_advice():
                for prompt in missing:
                    wanted[prompt] = self._encoded(prompt)
                    each(1)
        rows = {prompt: row for prompt, row in wanted.items() if row is not None}
        for prompt, row in rows.items():
            self._keep(prompt, row)
        return rows

    def _stored(self, prompt: str) -> Conditioning | None:
        return None if self._store is None else self._store.load(prompt)

    def _encoded(self, prompt: str) -> Conditioning:
        row = self._model.encode_prompt(prompt).to(torch.device("cpu"))
        require_finite_row(self._model, prompt, row)
        if self._store is not None:
            self._store.save(prompt, row)
        return row

    def _keep(self, prompt: str, row: Conditioning) -> None:
        if prompt not in self._rows:
            self._rows[prompt] = row
            self._bytes += row.nbytes
        self._rows.move_to_end(prompt)
        while self._bytes > self._max_bytes and len(self._rows) > 1:
            self._bytes -= self._rows.popitem(last=False)[1].nbytes
