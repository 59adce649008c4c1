"""Which layers `lora.targets` adapts, against names written out and peft's own rule; what is refused, and how."""

import family_checks as checks
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from family_checks import CPU, Tiny, adapted_modules
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_flux import build_tiny_flux
from tiny_sd3 import tiny_config

from fdfo_engine.models.lora import ATTENTION_PROJECTIONS, add_lora
from fdfo_engine.models.lora_targets import describe_layers
from fdfo_engine.models.registry import load_model
from fdfo_engine.runtime.errors import UsageError


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = build_tiny_flux(tmp_path_factory.mktemp("flux"))
    return Tiny(folder, FluxPipeline, None, {"sampling": {"embedded_guidance": 2.0}})


@pytest.fixture
def network():
    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=2, num_single_layers=2)


DOUBLE = {"transformer_blocks.0.attn", "transformer_blocks.1.attn"}
SINGLE = {"single_transformer_blocks.0", "single_transformer_blocks.1"}


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["single_transformer_blocks.*.proj_out"], {f"{block}.proj_out" for block in SINGLE}),
        (["proj_out"], {"proj_out"} | {f"{block}.proj_out" for block in SINGLE}),
        (["transformer_blocks.*.attn.to_q"], {f"{attn}.to_q" for attn in DOUBLE}),
        (["transformer_blocks.1.attn.to_q"], {"transformer_blocks.1.attn.to_q"}),
        (["transformer_blocks.*.attn.to_out.*"], {f"{attn}.to_out.0" for attn in DOUBLE}),  # not the dropout, .1
        (["to_q"], {f"{attn}.to_q" for attn in DOUBLE} | {f"{block}.attn.to_q" for block in SINGLE}),
        (["add_*_proj"], {f"{attn}.add_{part}_proj" for attn in DOUBLE for part in "qkv"}),
        (["to_add_out", "to_add_out", "attn.to_add_out"], {f"{attn}.to_add_out" for attn in DOUBLE}),
    ],
)  # fmt: skip
def test_targets_name_these_layers_and_no_others(network, targets, wanted):
    assert set(add_lora(network, rank=2, alpha=2.0, targets=targets, seed=0)) == wanted
    adapted = {name for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    assert adapted == wanted


@pytest.mark.parametrize("targets", [["to_q", "ff.net.2"], ["proj_out", "norm1.linear"], ["0.proj"], ["x_embedder"]])
def test_without_a_star_it_is_pefts_own_rule(network, targets):
    found = add_lora(network, rank=2, alpha=2.0, targets=targets, seed=0)
    with torch.device("meta"):
        other = FluxTransformer2DModel(num_layers=2, num_single_layers=2)
        other.add_adapter(LoraConfig(r=2, target_modules=targets))
    assert found == [name for name, module in other.named_modules() if isinstance(module, BaseTunerLayer)]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_q", "to_kk"], "'to_kk' names no layer of this model; the nearest names are to_k"),
        (["single_blocks.*.proj_out"], r"the nearest names are single_transformer_blocks\.\*\.proj_out"),
        (["transformer.transformer_blocks.0.attn.to_q"], r"nearest names are transformer_blocks\.\*\.attn\.to_q"),
        (["attn.to_[qk]"], "names no layer .* is no regular expression: only [*] is special"),
        (["attn.to_(q|k)"], "is no regular expression"),
        ([".*to_q"], "names no layer"),
        (["o_q"], "'o_q' names no layer"),
        ([" to_q"], "' to_q' names no layer"),
        (["norm_q"], r"attn\.norm_q is a RMSNorm; adapters are for linear layers"),
        (["to_q", "attn.norm_*"], "norm_q is a RMSNorm"),
        (["to_out"], r"to_out is a ModuleList; .* it holds transformer_blocks\.0\.attn\.to_out\.0"),
        (["self_attn.q_proj"], r"names layers of text_encoder, and only the transformer"),
        (["decoder.conv_in"], "names layers of vae"),
    ],
)
def test_a_target_that_is_no_layer_is_refused(flux, tmp_path, targets, message):
    with pytest.raises(UsageError, match=rf"lora\.targets = .*{message}"):
        load_model(flux.config(tmp_path, lora={"targets": targets}), CPU)


def test_a_short_name_of_two_kinds_of_layers_asks_for_a_longer_one(tiny_sd3, tmp_path):
    wanted = r"pos_embed\.proj is a Conv2d; .* in full, such as transformer_blocks\.\*\.ff\.net\.0\.proj"
    with pytest.raises(UsageError, match=wanted):
        load_model(tiny_config(tiny_sd3, tmp_path, lora={"targets": ["proj"]}), CPU)


def test_what_matched_is_said_in_one_line(flux, tmp_path, capsys):
    load_model(flux.config(tmp_path, lora={"targets": ["proj_out", "attn.to_out.0"]}), CPU)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lora: ")]
    assert lines == [
        "lora: 5 layers: transformer_blocks.*.attn (to_out.0), single_transformer_blocks.* (proj_out), proj_out",
        "lora: export in style comfyui has no name for proj_out; diffusers and merged do",
    ]


def test_the_second_attention_is_told_apart(tiny_sd3, tmp_path, capsys):
    """`attn2` of SD3.5-M is not the family's own choice: who names `to_q` alone gets it too, and reads so."""
    load_model(tiny_config(tiny_sd3, tmp_path, lora={"targets": ["to_q"]}), CPU)
    assert "3 layers: transformer_blocks.*.attn (to_q), transformer_blocks.*.attn2 (to_q)" in capsys.readouterr().out
    assert describe_layers(["x_embedder"]) == "1 layer: x_embedder"


def test_a_familys_own_targets_need_not_all_be_there(tiny_sd3):
    """The last block of an SD3 drops its text stream: with one block no layer is a `to_add_out`."""
    config = SD3Transformer2DModel.load_config(tiny_sd3 / "transformer") | {"num_layers": 1}
    with torch.device("meta"):
        network = SD3Transformer2DModel.from_config(config)
    found = add_lora(network, rank=2, alpha=2.0, targets=ATTENTION_PROJECTIONS, seed=0)
    assert {name.removeprefix("transformer_blocks.0.") for name in found} == set(ATTENTION_PROJECTIONS[:-1])


def test_the_advice_for_flux_trains_and_exports(flux, tmp_path):
    """As docs/FAMILIES.md has it: the single blocks' `proj_out` with the attention projections, in both styles."""
    tiny = Tiny(flux.folder, FluxPipeline, None, {
        **flux.settings, "lora": {"targets": ["attn.to_q", "single_transformer_blocks.*.proj_out"]},
    })  # fmt: skip
    engine, _, tensors = checks.comfyui_export(tiny, tmp_path)
    assert "proj_out" not in adapted_modules(engine.model)
    exact = checks.changes(engine.trainer.weights(), scale=2.0)["single_transformer_blocks.1.proj_out"]
    found = checks.native_change(tensors, "single_blocks_1_linear2")
    assert checks.largest(found - exact) < 1e-6 * checks.largest(exact)
    engine.export(tmp_path / "diffusers")
