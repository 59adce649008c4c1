"""Diversity on constructed images, a tiny random CLIP against transformers' own processor, a fake DreamSim."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from fdfo_engine.metrics import DIVERSITY
from fdfo_engine.metrics.diversity import embedding_diversity, mean_pairwise, pixel_diversity, structure_diversity
from fdfo_engine.metrics.embeddings import CLIP_STD, ClipEmbedder, clip_diversity, dreamsim_diversity
from fdfo_engine.runtime.errors import EnvironmentProblem

CPU = torch.device("cpu")
IMAGES = torch.rand(3, 4, 3, 40, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, projection_dim=12, num_hidden_layers=2, num_attention_heads=2,
            image_size=32, patch_size=8, initializer_factor=20.0,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    model.eval().save_pretrained(folder)
    return str(folder), model


def stripes(vertical):
    wave = (torch.arange(64) // 8 % 2).float()
    return (wave[None, :] if vertical else wave[:, None]).expand(3, 64, 64)


@pytest.mark.parametrize("measure", DIVERSITY.values(), ids=DIVERSITY)
def test_equal_images_have_none_and_order_does_not_matter(measure):
    same = IMAGES[:, :1].expand(-1, 3, -1, -1, -1)
    assert measure(same).tolist() == pytest.approx([0, 0, 0], abs=1e-7)
    assert torch.allclose(measure(IMAGES), measure(IMAGES.flip(1)), rtol=1e-6)
    assert measure(IMAGES)[1] == measure(IMAGES[1:2])[0], "a prompt does not depend on the others"
    with pytest.raises(ValueError, match="takes 2 or more"):
        measure(IMAGES[:, :1])


def test_pixel_diversity_is_the_rms_of_what_64_pixels_show():
    black_white = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])[None]
    assert pixel_diversity(black_white).item() == pytest.approx(1)
    small = IMAGES.double().numpy()
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    expected = [np.mean([np.sqrt(((p[a] - p[b]) ** 2).mean()) for a, b in pairs]) for p in small]
    assert pixel_diversity(IMAGES).tolist() == pytest.approx(expected, rel=1e-6)
    wide = torch.rand(1, 2, 3, 32, 64)
    assert torch.allclose(
        pixel_diversity(wide.repeat_interleave(4, -1).repeat_interleave(4, -2)), pixel_diversity(wide)
    )


def test_structure_sees_edges_and_not_colours():
    turned = torch.stack([stripes(True), stripes(False)])[None]
    dyed = torch.stack([stripes(True), stripes(True) * torch.tensor([0.9, 0.2, 0.1])[:, None, None]])[None]
    assert structure_diversity(turned).item() > 0.9
    assert structure_diversity(dyed).item() < 1e-6
    assert pixel_diversity(dyed).item() > 0.2
    assert structure_diversity(torch.rand(1, 3, 3, 1, 1).expand(1, 3, 3, 16, 16)).item() == 0, "no edges"


def test_embedding_diversity_is_one_minus_cosine():
    vectors = torch.tensor([[[1.0, 0], [0, 2]], [[1, 0], [3, 0]], [[1, 0], [-1, 0]]])
    found = embedding_diversity(vectors[..., None, None].expand(3, 2, 2, 4, 4), lambda x: x[:, :, 0, 0])
    assert found.tolist() == pytest.approx([1, 0, 2])
    assert torch.isnan(mean_pairwise(torch.full((1, 2, 3), torch.nan), lambda a, b: (a - b).sum(-1)))


def test_clip_sees_what_transformers_own_processor_makes_of_the_picture(tiny_clip):
    """Up to the processor's rounding to 8 bits, after each of PIL's two passes; no value is near where they clip."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    folder, model = tiny_clip
    processor = Processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    embed = ClipEmbedder(folder, CPU)
    for shape in ((32, 32), (40, 56), (96, 64), (31, 20), (49, 98)):
        limit = 1e-6 if shape == (32, 32) else 2 / 255
        pixels = torch.randint(80, 176, (2, *shape, 3), generator=torch.Generator().manual_seed(1))
        pictures = [Image.fromarray(p.numpy().astype(np.uint8)) for p in pixels]
        seen = processor(images=pictures, return_tensors="pt")["pixel_values"]
        ours = embed.pixels(pixels.permute(0, 3, 1, 2) / 255)
        assert (ours - seen).abs().max() * max(CLIP_STD) < limit, shape
        with torch.no_grad():
            expected = model(pixel_values=ours).image_embeds
        assert torch.allclose(embed(pixels.permute(0, 3, 1, 2) / 255), expected, rtol=1e-5)


def test_clip_diversity_by_hand(tiny_clip):
    folder, _ = tiny_clip
    found = clip_diversity(folder, CPU)(IMAGES)
    vectors = torch.nn.functional.normalize(ClipEmbedder(folder, CPU)(IMAGES[2]), dim=-1)
    cosines = vectors @ vectors.T
    assert found[2].item() == pytest.approx((1 - cosines[*torch.triu_indices(4, 4, 1)]).mean().item(), abs=1e-5)
    assert (found > 0).all()


def test_an_absent_clip_is_not_fetched_in_silence():
    with pytest.raises(EnvironmentProblem, match="--allow-download"):
        ClipEmbedder("nobody/no-such-clip", CPU)


def test_dreamsim_is_an_extra(monkeypatch):
    """The real package needs torchvision; a stand-in shows what it is given."""
    with pytest.raises(EnvironmentProblem, match="--allow-download"):
        dreamsim_diversity(CPU)
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(EnvironmentProblem, match=r"fdfo-engine\[dreamsim\]"):
        dreamsim_diversity(CPU, allow_download=True)
    seen = []

    def embed(images):
        seen.append(tuple(images.shape))
        return images.mean((2, 3))

    fake = types.ModuleType("dreamsim")
    fake.dreamsim = lambda pretrained, device: (types.SimpleNamespace(embed=embed), None)
    monkeypatch.setitem(sys.modules, "dreamsim", fake)
    found = dreamsim_diversity(CPU, allow_download=True)(IMAGES)
    assert seen == [(12, 3, 224, 224)]
    means = torch.nn.functional.interpolate(IMAGES.flatten(0, 1), (224, 224), mode="bicubic", antialias=True)
    means = means.clamp(0, 1).mean((2, 3)).view(3, 4, 3)
    expected = 1 - torch.nn.functional.cosine_similarity(means[0, 0], means[0, 1], dim=0)
    two = dreamsim_diversity(CPU, allow_download=True)(IMAGES[:1, :2])
    assert two.item() == pytest.approx(expected.item(), abs=1e-6)
    assert found.shape == (3,)
