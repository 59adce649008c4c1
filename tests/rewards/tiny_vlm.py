"""Tiny random chat models that see: a LLaVA as a folder that transformers loads whole, and a Qwen2.5-VL.

Qwen-VL's processor class insists on a video processor, which needs torchvision: tests give it none.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = ["<pad>", "<s>", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<end>"]
WORDS = [*SPECIAL, "[UNK]", "Yes", "No", "user", "assistant", "red", "circle", "blue", "square", "Is", "it", "so", "?"]
TEMPLATE = (
    "<s> {% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE {% else %}{{ c['text'] }} {% endif %}{% endfor %}<end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 7,
}  # fmt: skip


def _tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="<end>", unk_token="[UNK]",
        additional_special_tokens=SPECIAL[2:7],
    )  # fmt: skip


def _randomised(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    return model.eval()


def build_tiny_llava(folder, template=TEMPLATE):
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=2)
    _randomised(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), _tokenizer(),
        patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template and template.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


class ProcessorWithoutVideo(Qwen2_5_VLProcessor):
    def check_argument_for_proper_class(self, argument_name, argument):
        pass


def build_tiny_qwen(folder):
    """The model goes to `folder`; returns its processor."""
    config = Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
        },
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip
    _randomised(Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    template = TEMPLATE.replace("IMAGE", "<|vision_start|> <|image_pad|> <|vision_end|>")
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    return ProcessorWithoutVideo(images, _tokenizer(), None, chat_template=template)
