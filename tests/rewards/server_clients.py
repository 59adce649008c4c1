"""Rewards whose servers are fake ones, and what those answer."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from fdfo_engine.rewards import build

PROMPTS = [f"prompt {i} {{x}} %s <script>" for i in range(5)]
IMAGES = (torch.rand(5, 3, 9, 14, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


def pixels_of(item):
    picture = Image.open(io.BytesIO(base64.b64decode(item["image"])))
    assert picture.format == "PNG"
    return np.asarray(picture)


def brightness(path, request, number):
    return {"scores": [{"id": i["id"], "score": pixels_of(i).mean() / 255} for i in reversed(request["items"])]}


def http(url, **options):
    settings = {"batch_size": 2, "concurrency": 1, "timeout_s": 5.0, "give_up_after_s": 5.0, **options}
    return build(url, settings, "rewards.0.name")


def completion(**logprobs):
    top = [{"token": t, "logprob": v, "bytes": None} for t, v in logprobs.items()]
    content = [{"token": "x", "logprob": -1.0, "top_logprobs": top}]
    return {"id": "c", "choices": [{"index": 0, "logprobs": {"content": content}, "finish_reason": "length"}]}


def vlm_server(url, **options):
    settings = {"url": f"{url}/v1", "model": "eye", "image_size": 56, "timeout_s": 5.0, "give_up_after_s": 1.0}
    return build("vlm_server", {**settings, **options}, "rewards.0.name")
