"""The official OpenAI SDK draws from a served run: `python examples/openai_images.py runs/shapes "a red circle"`."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

from openai import OpenAI


def connect(run_dir: Path) -> OpenAI:
    """An SDK client of the server of `run_dir`."""
    address = json.loads((run_dir / "serve.json").read_text())
    return OpenAI(base_url=f"{address['url']}/v1", api_key=(run_dir / "serve.token").read_text().strip())


def draw(client: OpenAI, prompt: str, model: str, *, seed: int = 0, steps: int | None = None) -> bytes:
    """One PNG; `seed`, steps and guidance travel as extras."""
    extras = {"seed": seed} | ({} if steps is None else {"num_inference_steps": steps})
    answer = client.images.generate(prompt=prompt, model=model, n=1, response_format="b64_json", extra_body=extras)
    return base64.b64decode(answer.data[0].b64_json)


def main() -> None:
    """Draws the prompt with every state of the weights that the run has."""
    run_dir, prompt = Path(sys.argv[1]), sys.argv[2]
    client = connect(run_dir)
    for model in client.models.list():
        path = Path(f"{model.id.replace('@', '_')}.png")
        path.write_bytes(draw(client, prompt, model.id))
        print(path)  # noqa: T201


if __name__ == "__main__":
    main()
