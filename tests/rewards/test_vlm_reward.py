"""The VLM reward against one-token generation by transformers, one image at a time, on tiny random chat models."""

import numpy as np
import pytest
import torch
from PIL import Image
from rewards.tiny_vlm import WORDS, build_tiny_llava, build_tiny_qwen
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

from fdfo_engine.config import load_config
from fdfo_engine.rewards import WeightedRewards, build
from fdfo_engine.rewards.questions import asked, seen
from fdfo_engine.runtime.errors import RewardError, UsageError

PROMPTS = ["red circle", "blue", "red red red square square circle so so so", "blue square"]
QUESTION = "Is it {prompt} ?"


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = build_tiny_llava(tmp_path_factory.mktemp("llava"))
    return str(folder), LlavaProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return str(folder), build_tiny_qwen(folder)


@pytest.fixture(params=["llava", "qwen"])
def chat(request, monkeypatch):
    folder, processor = request.getfixturevalue(request.param)
    if request.param == "qwen":
        monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    return folder, processor


def pictures(count, side=56):
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return (torch.nn.functional.interpolate(coarse, size=(side, side), mode="nearest") * 255).round() / 255


def by_generation(chat, prompts, images, question=QUESTION, dtype=torch.float32):
    """100 * sigmoid(Yes - No) of the first generated token's logits."""
    folder, processor = chat
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    scores = []
    for prompt, image in zip(prompts, images, strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        content = [{"type": "image"}, {"type": "text", "text": question.replace("{prompt}", prompt)}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=Image.fromarray(pixels), add_special_tokens=False, return_tensors="pt")
        out = model.generate(
            **inputs.to(dtype=dtype), max_new_tokens=1, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        logits = out.logits[0][0].double()
        scores.append(100 * torch.sigmoid(logits[WORDS.index("Yes")] - logits[WORDS.index("No")]))
    return torch.stack(scores).float()


def reward(folder, **options):
    settings = {"model": folder, "question": QUESTION, "image_size": 56, "dtype": "float32", **options}
    return build("vlm", settings, "rewards.0.name")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_score_is_the_first_answer_tokens(chat, batch_size):
    images = pictures(4)
    expected = by_generation(chat, PROMPTS, images)
    scores = reward(chat[0], batch_size=batch_size)(PROMPTS, images)
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    assert (scores - expected).abs().max() < 1e-3
    assert scores.std() > 1  # it tells them apart


def test_one_image_alone(chat):
    images = pictures(1)
    assert (reward(chat[0])(PROMPTS[:1], images) - by_generation(chat, PROMPTS[:1], images)).abs() < 1e-3


def test_bfloat16_is_near_and_padding_changes_little(chat):
    images = pictures(4)
    exact = reward(chat[0])(PROMPTS, images)
    alone = reward(chat[0], dtype="bfloat16", batch_size=1)(PROMPTS, images)
    together = reward(chat[0], dtype="bfloat16")(PROMPTS, images)
    assert together.dtype == torch.float32
    assert (alone - exact).abs().max() < 4
    assert (together - exact).abs().max() < 4


def test_the_image_and_the_question_matter(chat):
    images = pictures(2)
    scores = reward(chat[0])(["red", "red"], images)
    assert abs(scores[0] - scores[1]) > 0.1
    assert abs(reward(chat[0], target="No", contrast="Yes")(["red"], images[:1]) + scores[0] - 100) < 1e-3


def test_answers_of_next_to_no_mass_are_no_opinion(llava, capsys):
    """Against a softmax over the whole vocabulary, in float64."""
    images = pictures(4)
    model, processor = AutoModelForImageTextToText.from_pretrained(llava[0], dtype=torch.float32).eval(), llava[1]
    content = [{"type": "image"}, {"type": "text", "text": "Is it red ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pixels = [Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for image in images]
    inputs = processor(text=[text] * 4, images=pixels, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits[:, -1].double().softmax(-1)
    mass = probabilities[:, WORDS.index("Yes")] + probabilities[:, WORDS.index("No")]
    least = float(mass.sort().values[1:3].mean())  # two of the four are below
    asked_about = reward(llava[0], question="Is it red ?", least_mass=least)
    scores = asked_about(["red"] * 4, images)
    assert torch.equal(torch.isnan(scores), mass < least)
    assert (asked_about.take_notes()["answer_mass"] - mass).abs().max() < 1e-5
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    assert "no opinion on 2 images: 'Yes' and 'No' hold less than least_mass" in line
    likeliest = WORDS[int(probabilities[int((mass < least).nonzero()[0])].argmax())]
    assert line.endswith(f"the likeliest is {likeliest!r}")


def test_images_get_the_papers_size():
    assert seen(torch.rand(1, 3, 512, 512), 504).shape == (1, 3, 504, 504)
    assert seen(torch.rand(1, 3, 256, 512), 504).shape == (1, 3, 364, 700)  # the same shape and number of pixels
    assert seen(torch.rand(1, 3, 30, 41), None).shape == (1, 3, 30, 41)


def bilinear(image, side):
    """Each new pixel from the four old ones round its centre, in float64: no antialiasing, edges repeated."""
    found = image.double().numpy()
    for axis in (1, 2):
        size = found.shape[axis]
        place = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, None)
        first = place.astype(int)
        share = (place - first).reshape([-1 if i == axis else 1 for i in range(3)])
        second = np.minimum(first + 1, size - 1)
        found = found.take(first, axis) * (1 - share) + found.take(second, axis) * share
    return found


def by_the_paper(folder, processor, prompts, images, side):
    """The float square goes to the model as it is, but for the colours' normalisation; one image at a time."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    mean = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    scores = []
    for prompt, image in zip(prompts, images, strict=True):
        pixels = ((bilinear(image, side) - mean) / std).astype(np.float32)
        content = [{"type": "image"}, {"type": "text", "text": QUESTION.replace("{prompt}", prompt)}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        as_given = {"do_resize": False, "do_rescale": False, "do_normalize": False}
        inputs = processor(
            text=text, images=pixels, images_kwargs=as_given, add_special_tokens=False, return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].double()
        scores.append(100 * torch.sigmoid(logits[WORDS.index("Yes")] - logits[WORDS.index("No")]))
    return torch.stack(scores).float()


@pytest.mark.parametrize("size", [(56, 56), (40, 96), (201, 133), (7, 9)])
def test_the_papers_rule_is_a_float_square(qwen, monkeypatch, size):
    folder, processor = qwen
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(5))
    scores = reward(folder, preprocess="paper", batch_size=2)(PROMPTS[:3], images)
    assert (scores - by_the_paper(folder, processor, PROMPTS[:3], images, 56)).abs().max() < 1e-3
    if size != (56, 56):
        assert (scores - reward(folder)(PROMPTS[:3], images)).abs().max() > 0.05  # the other rule is another


def test_the_papers_rule_sees_less_than_a_grey_level(qwen, monkeypatch):
    folder, processor = qwen
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    images = pictures(1).clamp(0.1, 0.9)
    shifted = images + 0.3 / 255
    exact = reward(folder, preprocess="paper")
    assert (exact(["red"], images) - exact(["red"], shifted)).abs() > 1e-4
    coarse = reward(folder)
    assert torch.equal(coarse(["red"], images), coarse(["red"], shifted))
    with pytest.raises(ValueError, match="NaN"):
        exact(["red"], torch.full((1, 3, 8, 8), torch.nan))


def test_what_cannot_follow_the_papers_rule_is_refused(llava):
    for size in (None, 500):
        with pytest.raises(UsageError, match="multiple of 28"):
            build("vlm_alignment", {"preprocess": "paper", "image_size": size}, "rewards.0.name")
    with pytest.raises(RewardError, match="paper takes a model that sees images of any size"):
        reward(llava[0], preprocess="paper")(["red"], pictures(1))


@pytest.mark.parametrize("config", ["sd35m_combined", "sd35m_vlm"])
def test_the_papers_runs_follow_the_papers_rule(config):
    ((_, vlm),) = [value for name, value in WeightedRewards.from_config(load_config(config).rewards).rewards.items()
                   if name == "vlm_alignment"]  # fmt: skip
    assert (vlm.options.preprocess, vlm.options.image_size) == ("paper", 504)


def test_a_prompt_is_text():
    assert asked("Is it {prompt}? {x}", "{prompt} {0} %s") == "Is it {prompt} {0} %s? {x}"


def test_an_answer_of_two_tokens_is_refused(llava):
    with pytest.raises(RewardError, match="'Yes No' is not one token"):
        reward(llava[0], target="Yes No")(["red"], pictures(1))
    with pytest.raises(RewardError, match="'maybe' is not one token"):
        reward(llava[0], contrast="maybe")(["red"], pictures(1))


def test_the_answers_must_differ():
    with pytest.raises(UsageError, match=r"rewards\.0\.contrast: is the target too"):
        build("vlm", {"target": "Yes", "contrast": "Yes"}, "rewards.0.name")


def test_a_model_without_a_template_is_refused(tmp_path):
    with pytest.raises(RewardError, match="no chat template"):
        reward(str(build_tiny_llava(tmp_path, template=None)))(["red"], pictures(1))


def test_two_questions_share_one_model(llava):
    first, second = reward(llava[0]), reward(llava[0], target="No", contrast="Yes")
    images = pictures(1)
    first(["red"], images), second(["red"], images)
    assert first._chat.network is second._chat.network


def test_presets_ask_their_questions():
    questions = {build(f"vlm_{name}", {}, "x").options.question for name in ("alignment", "quality", "photorealism")}
    assert len(questions) == 3
    assert build("vlm_alignment", {}, "x").options.model == "Qwen/Qwen2.5-VL-7B-Instruct"
