"""ComfyUI nodes for a served run: connect, sample pairs, send feedback, update, get the LoRA.

Put this folder into ComfyUI's `custom_nodes/`, with `pip install 'fdfo-engine[serve]'` or a copy of
`fdfo_engine/client.py` as `client.py` beside this file; start `fdfo serve --config C` on the same machine.
"""

from __future__ import annotations

import io as bytes_io
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io
from PIL import Image

try:
    from .client import Client
except ImportError:
    from fdfo_engine.client import Client

Connection, Round = io.Custom("FDFO_CONNECTION"), io.Custom("FDFO_ROUND")
CHOICES = {"l": "left", "r": "right", "t": "tie", "s": "skip"}


def schema(name: str, inputs: list, outputs: list, **options: bool) -> io.Schema:
    """Of one node; all but Connect act anew each time they run."""
    return io.Schema(
        node_id=f"FDFO_{name.replace(' ', '')}", display_name=f"FDFO {name}", category="fdfo", inputs=inputs,
        outputs=outputs, **options,
    )  # fmt: skip


def as_image(png: bytes) -> torch.Tensor:
    """ComfyUI's IMAGE of one picture: float32 `[1, H, W, C]` in 0..1."""
    pixels = np.asarray(Image.open(bytes_io.BytesIO(png)).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]


class Connect(io.ComfyNode):
    """The served run of a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        run_dir = io.String.Input("run_dir", default="runs/shapes", tooltip="where serve.json and serve.token lie")
        return schema("Connect", [run_dir], [Connection.Output(display_name="connection")])

    @classmethod
    def execute(cls, run_dir: str) -> io.NodeOutput:
        client = Client.of_run(run_dir)
        client.capabilities()  # a wrong folder or a server that is down is told here
        return io.NodeOutput(client)


class SamplePairs(io.ComfyNode):
    """Samples a round; pair n is image n of `left` and of `right`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        prompts = io.String.Input("prompts", multiline=True, default="", tooltip="one a line; empty: the run's next")
        count = io.Int.Input("count", default=4, min=1, max=64, tooltip="how many of the run's own prompts")
        sides = [io.Image.Output(display_name=side) for side in ("left", "right")]
        outputs = [Round.Output(display_name="round"), *sides]
        return schema("Sample Pairs", [Connection.Input("connection"), prompts, count], outputs, not_idempotent=True)

    @classmethod
    def execute(cls, connection: Client, prompts: str, count: int) -> io.NodeOutput:
        lines = [line for line in prompts.splitlines() if line.strip()]
        sampled = connection.create_round(lines) if lines else connection.create_round(count=count)
        pairs = connection.pairs(sampled["round"], rater="comfyui")
        sides = [torch.cat([as_image(connection.image(pair[side])) for pair in pairs]) for side in ("left", "right")]
        return io.NodeOutput({"name": sampled["round"], "pairs": pairs}, *sides)


class SendFeedback(io.ComfyNode):
    """One letter a pair: l, r, t (no preference) or s (skip)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = io.String.Input("choices", default="", tooltip="such as lrtl: left, right, tie, left")
        inputs = [Connection.Input("connection"), Round.Input("round"), choices]
        return schema("Send Feedback", inputs, [Round.Output(display_name="round")], not_idempotent=True)

    @classmethod
    def execute(cls, connection: Client, round: dict, choices: str) -> io.NodeOutput:
        letters = choices.replace(" ", "").lower()
        if len(letters) != len(round["pairs"]) or set(letters) - CHOICES.keys():
            raise ValueError(f"choices {choices!r}: takes {len(round['pairs'])} letters of l, r, t, s")
        judgements = [
            {"pair_id": pair["pair_id"], "choice": CHOICES[c]} for pair, c in zip(round["pairs"], letters, strict=True)
        ]
        connection.feedback(round["name"], judgements, rater="comfyui")
        return io.NodeOutput(round)


class Update(io.ComfyNode):
    """Trains on the round's feedback."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [Connection.Input("connection"), Round.Input("round")]
        return schema("Update", inputs, [io.String.Output(display_name="checkpoint")], not_idempotent=True)

    @classmethod
    def execute(cls, connection: Client, round: dict) -> io.NodeOutput:
        return io.NodeOutput(connection.train(round["name"])["checkpoint"])


class GetLora(io.ComfyNode):
    """Puts the trained LoRA, in the names that ComfyUI reads, among its LoRAs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        checkpoint = io.String.Input("checkpoint", force_input=True, tooltip="from Update, so that it comes first")
        inputs = [Connection.Input("connection"), checkpoint, io.String.Input("folder", default="models/loras")]
        outputs = [io.String.Output(display_name="file")]
        return schema("Get LoRA", inputs, outputs, not_idempotent=True, is_output_node=True)

    @classmethod
    def execute(cls, connection: Client, checkpoint: str, folder: str) -> io.NodeOutput:
        export = connection.export("comfyui")
        (name,) = [file for file in export["files"] if file.endswith(".safetensors")]
        target = Path(folder) / f"fdfo_{checkpoint}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(connection.exported(export, name))
        return io.NodeOutput(str(target))


class FdfoExtension(ComfyExtension):
    """All nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """What ComfyUI registers."""
        return [Connect, SamplePairs, SendFeedback, Update, GetLora]


async def comfy_entrypoint() -> FdfoExtension:
    """What ComfyUI calls."""
    return FdfoExtension()
