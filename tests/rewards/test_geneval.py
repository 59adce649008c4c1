"""GenEval's checks: the rules on made-up objects, the detector and the colours against transformers' own code."""

import json

import pytest
import torch
from PIL import Image
from rewards.tiny_clip import build_tiny_clip
from rewards.tiny_owl import build_tiny_owl
from transformers import AutoTokenizer, CLIPModel, Owlv2ForObjectDetection, Owlv2Processor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fdfo_engine.rewards import WeightedRewards, build
from fdfo_engine.rewards.geneval import Colors, Geneval, cut_out
from fdfo_engine.rewards.geneval_rules import (
    COLORS,
    Box,
    Detected,
    Requirements,
    fulfilled,
    read_requirements,
    relations,
    without_doubles,
)
from fdfo_engine.runtime.errors import PromptError, RewardError, UsageError

LINES = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "counting", "include": [{"class": "cat", "count": 3}], "exclude": [{"class": "cat", "count": 4}],
     "prompt": "a photo of three cats"},
    {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "blue"}], "prompt": "a photo of a blue bus"},
    {"tag": "position", "include": [{"class": "dog", "count": 1},
     {"class": "cat", "count": 1, "position": ["left of", 0]}], "prompt": "a photo of a cat left of a dog"},
    {"tag": "color_attr", "include": [{"class": "cat", "count": 1, "color": "red"},
     {"class": "dog", "count": 1, "color": "green"}], "prompt": "a photo of a red cat and a green dog"},
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("geneval")
    (base / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    build_tiny_owl(base / "owl")
    build_tiny_clip(base / "clip")
    return base


def options(folders, **more):
    return {"model": str(folders / "owl"), "clip": str(folders / "clip"),
            "metadata": str(folders / "metadata.jsonl"), "device": "cpu", **more}  # fmt: skip


def pictures(count, height=40, width=48):
    coarse = torch.rand(count, 3, 5, 6, generator=torch.Generator().manual_seed(count))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (fine * 255).round() / 255


def pil(image):
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def at(left, top, size=10.0, confidence=0.9):
    return Detected(Box(left, top, left + size, top + size), confidence)


def wanted(number):
    return Requirements.model_validate_json(json.dumps(LINES[number]))


def never(name, box):
    raise AssertionError("no colour was asked for")


@pytest.mark.parametrize(
    ("number", "objects", "facts"),
    [
        (0, {"cat": [at(0, 0)]}, [True]),
        (0, {"cat": [at(0, 0), at(50, 0)]}, [True]),
        (0, {"cat": []}, [False]),
        (1, {"cat": [at(0, 0), at(20, 0), at(40, 0)]}, [True, True]),
        (1, {"cat": [at(0, 0), at(20, 0)]}, [False, True]),
        (1, {"cat": [at(20 * i, 0) for i in range(4)]}, [True, False]),
        (3, {"dog": [at(60, 0)], "cat": [at(0, 0)]}, [True, True, True]),
        (3, {"dog": [at(0, 0)], "cat": [at(60, 0)]}, [True, True, False]),
        (3, {"dog": [], "cat": [at(60, 0)]}, [False, True, False]),
        (3, {"dog": [at(60, 0)], "cat": []}, [True, False, False]),
        (3, {"dog": [at(60, 0)], "cat": [at(90, 0, confidence=0.95), at(0, 0)]}, [True, True, False]),
    ],
)
def test_counts_and_places(number, objects, facts):
    """The last: an entry speaks of its surest object, not of whichever fits."""
    assert fulfilled(wanted(number), objects, never) == facts


@pytest.mark.parametrize(
    ("colors", "facts"),
    [
        ({"cat": "red", "dog": "green"}, [True] * 4),
        ({"cat": "green", "dog": "red"}, [True, False, True, False]),
        ({"cat": "red", "dog": "red"}, [True, True, True, False]),
    ],
)
def test_each_object_has_its_own_colour(colors, facts):
    objects = {"cat": [at(0, 0)], "dog": [at(30, 0)]}
    assert fulfilled(wanted(4), objects, lambda name, box: colors[name]) == facts
    assert fulfilled(wanted(4), {"cat": objects["cat"]}, lambda name, box: colors[name])[2:] == [False, False]


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-40, 0, {"left of"}), (40, 0, {"right of"}), (0, -40, {"above"}), (0, 40, {"below"}),
        (30, 30, {"right of", "below"}), (-30, 30, {"left of", "below"}), (40, -10, {"right of"}),
        (0, 0, set()), (2, 0, set()), (-2, -2, set()), (3.9, 0, set()), (4.1, 0, {"right of"}),
        (20, 11, {"right of"}), (4, 0, set()), (0, -4, set()), (0, 4.1, {"below"}),
    ],
)  # fmt: skip
def test_places_by_the_papers_formula(dx, dy, expected):
    """Boxes of 10 a side: 2 pixels are free on each axis; what is left must exceed half of the distance."""
    assert relations(at(100 + dx, 100 + dy).box, at(100, 100).box) == expected
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(at(100, 100).box, at(100 + dx, 100 + dy).box) == {mirrored[name] for name in expected}


def test_a_place_holds_for_each_object_of_both_entries():
    entries = [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["right of", 0]}]
    both = Requirements.model_validate({"prompt": "x", "include": entries})
    cats = [at(0, 0), at(0, 30)]
    assert fulfilled(both, {"cat": cats, "dog": [at(90, 0), at(90, 30)]}, never) == [True, True, True]
    assert fulfilled(both, {"cat": cats, "dog": [at(90, 0), at(-90, 30)]}, never) == [True, True, False]
    assert fulfilled(both, {"cat": [at(0, 0), at(180, 0)], "dog": [at(90, 0), at(90, 9)]}, never)[2] is False
    assert fulfilled(both, {"cat": cats[:1], "dog": [at(90, 0), at(90, 30)]}, never) == [False, True, False]


def test_boxes_of_no_size_at_one_place_have_no_relation():
    point = at(5, 5, size=0.0).box
    assert relations(point, point) == set()
    assert relations(at(6, 5, size=0.0).box, point) == {"right of"}


def test_boxes_that_share_just_so_much_are_two():
    half_over = [at(0, 0), at(5, 0, confidence=0.8)]  # 50 of 150
    assert without_doubles(half_over, 1 / 3) == half_over
    assert without_doubles(half_over, 0.33) == half_over[:1]
    apart = [at(0, 0), at(10, 0, confidence=0.8)]
    assert without_doubles(apart, 0.0) == apart


def test_doubles_are_one_object():
    one, shifted, apart = at(0, 0, confidence=0.5), at(2, 0, confidence=0.8), at(6, 0, confidence=0.4)
    assert without_doubles([one, shifted, apart], 0.5) == [shifted, apart]  # 80 / 120 of the first two's union
    assert without_doubles([one, shifted, apart], 0.7) == [shifted, one, apart]
    assert without_doubles([], 0.5) == []


def by_transformers(folders, classes, image, least):
    """Its own processor, network and post-processing, one image and its own classes: no batch, no filling."""
    network = Owlv2ForObjectDetection.from_pretrained(folders / "owl").eval()
    processor = Owlv2Processor.from_pretrained(folders / "owl")
    texts = [f"a photo of a {name}" for name in classes]
    inputs = processor(text=[texts], images=[pil(image)], return_tensors="pt")
    with torch.no_grad():
        outputs = network(**inputs)
    (found,) = processor.post_process_grounded_object_detection(
        outputs, threshold=least, target_sizes=[tuple(image.shape[-2:])], text_labels=[texts]
    )
    rows = zip(found["labels"].tolist(), found["boxes"], found["scores"].tolist(), strict=True)
    return [(classes[label], box, score) for label, box, score in rows]


@pytest.mark.parametrize("count", [1, 5])
def test_what_is_found_is_what_transformers_finds_one_image_at_a_time(folders, count):
    """Images with different numbers of classes share a batch."""
    images, classes = pictures(count), [wanted(i).classes for i in range(count)]
    detector = build("geneval", options(folders), "rewards.0")._detector
    with torch.no_grad():
        found = detector.find((images * 255).round().to(torch.uint8), classes, 0.1)
    assert any(len(boxes) > 1 for objects in found for boxes in objects.values())
    for objects, own, image in zip(found, classes, images, strict=True):
        expected = by_transformers(folders, own, image, 0.1)
        assert set(objects) == set(own)
        for name in own:
            mine = [(box, score) for label, box, score in expected if label == name]
            assert len(objects[name]) == len(mine)
            for one, (box, score) in zip(objects[name], mine, strict=True):
                assert one.confidence == pytest.approx(score, abs=1e-5)
                assert one.box == pytest.approx(box.tolist(), abs=1e-3)


def color_by_transformers(folders, name, crop):
    """Zero-shot classification by hand: a mean of three texts a colour, against the crop's embedding."""
    model = CLIPModel.from_pretrained(folders / "clip").eval()
    tokenizer = AutoTokenizer.from_pretrained(folders / "clip")
    prepare = CLIPImageProcessorPil.from_pretrained(folders / "clip")
    templates = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
    with torch.no_grad():
        seen = model.visual_projection(
            model.vision_model(prepare(crop, return_tensors="pt").pixel_values).pooler_output
        )
        likeness = []
        for color in COLORS:
            rows = []
            for template in templates:
                tokens = tokenizer([template.format(color, name)], truncation=True, max_length=40, return_tensors="pt")
                text = model.text_projection(model.text_model(**tokens).pooler_output)
                rows.append(text / text.norm())
            mean = torch.cat(rows).mean(0)
            likeness.append((seen[0] @ mean / mean.norm() / seen.norm()).item())
    return COLORS[max(range(len(COLORS)), key=likeness.__getitem__)]


def test_colours_are_clips_zero_shot_classes_of_the_crop(folders):
    colors = build("geneval", options(folders), "rewards.0")._colors
    found = []
    for i, image in enumerate(pictures(8)):
        crop = cut_out((image * 255).round().to(torch.uint8), Box(-3, 2.2, 20 + i, 39.6))
        assert crop.shape == (3, 38, 20 + i)
        with torch.no_grad():
            found.append(colors.of("bus", crop))
        theirs = pil(image).crop((0, 2, 20 + i, 40))
        assert found[-1] == color_by_transformers(folders, "bus", theirs)
    assert len(set(found)) > 1


def test_a_box_outside_the_image_still_has_a_pixel():
    assert cut_out(torch.zeros(3, 8, 8), Box(20, -9, 30, -5)).shape == (3, 1, 1)


def expected_score(folders, number, image, score, least=0.3, overlap=0.5):
    objects = {name: [] for name in wanted(number).classes}
    for name, box, confidence in by_transformers(folders, list(objects), image, least):
        objects[name].append(Detected(Box(*box.tolist()), confidence))
    kept = {name: without_doubles(found, overlap)[:16] for name, found in objects.items()}
    pixels = (image * 255).round().to(torch.uint8)

    def color(name, box):
        crop = cut_out(pixels, box)
        return color_by_transformers(folders, name, Image.fromarray(crop.permute(1, 2, 0).numpy()))

    facts = fulfilled(wanted(number), kept, color)
    return sum(facts) / len(facts) if score == "fraction" else float(all(facts))


@pytest.mark.parametrize("score", ["fraction", "strict"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_are_the_rules_on_what_transformers_sees(folders, score, batch_size):
    images, prompts = pictures(5), [line["prompt"] for line in LINES]
    reward = build("geneval", options(folders, score=score, batch_size=batch_size), "rewards.0")
    scores = reward(prompts, images)
    assert scores.dtype == torch.float32
    expected = [expected_score(folders, i, image, score) for i, image in enumerate(images)]
    assert scores.tolist() == pytest.approx(expected)
    assert score == "strict" or scores.std() > 0


def test_bfloat16_runs_and_returns_float32(folders):
    scores = build("geneval", options(folders, dtype="bfloat16"), "rewards.0")([LINES[2]["prompt"]], pictures(1))
    assert scores.dtype == torch.float32
    assert 0 <= scores.item() <= 1


class Fake:
    """A detector whose objects a test sets; counts are asked for more strictly than presence."""

    def __init__(self, objects):
        self.objects, self.asked = objects, []

    def find(self, pixels, classes, least):
        self.asked.append((classes, least))
        return [self.objects] * len(pixels)


def with_fake(folders, monkeypatch, objects, color="blue", **more):
    reward = build("geneval", options(folders, **more), "rewards.0")
    monkeypatch.setattr(Geneval, "_detector", Fake(objects))
    monkeypatch.setattr(Colors, "of", lambda self, name, crop: color)
    return reward


def test_counting_has_its_own_threshold(folders, monkeypatch):
    cats = {"cat": [at(0, 0, confidence=0.9), at(20, 0, confidence=0.8), at(40, 0, confidence=0.4)]}
    reward = with_fake(folders, monkeypatch, cats, count_threshold=0.5)
    assert reward(["a photo of three cats"], pictures(1)).tolist() == [0.5], "two are sure enough, and not four"
    assert reward(["a photo of a cat"], pictures(1)).tolist() == [1.0]
    assert reward._detector.asked[0] == ([["cat"]], 0.3)


@pytest.mark.parametrize(("color", "fraction", "strict"), [("blue", 1.0, 1.0), ("red", 0.5, 0.0)])
def test_fraction_and_strict(folders, monkeypatch, color, fraction, strict):
    bus = {"bus": [at(0, 0)]}
    for score, expected in (("fraction", fraction), ("strict", strict)):
        reward = with_fake(folders, monkeypatch, bus, color, score=score)
        assert reward(["a photo of a blue bus"], pictures(1)).tolist() == [expected]


def test_a_prompt_without_requirements_stops_the_run(folders):
    rewards = WeightedRewards({"geneval": (1.0, build("geneval", options(folders), "rewards.0"))})
    with pytest.raises(RewardError, match=r"no requirements for the prompt 'a photo of a zebra'.*prompts\.source"):
        rewards(["a photo of a zebra"], pictures(1))
    with pytest.raises(RewardError, match="a photo of a zebra"):
        rewards.require_prompts(["a photo of a cat", "a photo of a zebra"])
    rewards.require_prompts([" a photo of a cat "])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no requirements in it"),
        ('{"prompt": "a"}', ":1: takes a list include, exclude, or both"),
        ('\n{"include": [{"class": "cat"}]}', ":2: prompt: field required"),
        ('{"prompt": "a", "include": [{"class": "cat", "colour": "red"}]}', "include.0.colour: extra inputs"),
        ('{"prompt": "a", "include": [{"class": "cat", "color": "beige"}]}', "include.0.color: input should be 'red'"),
        ('{"prompt": "a", "include": [{"class": "cat", "count": 0}]}', "include.0.count: input should be greater"),
        ('{"prompt": "a", "include": [{"class": "cat", "position": ["near", 0]}]}', "include.0.position.0"),
        ('{"prompt": "a", "include": [{"class": "cat", "position": ["above", 3]}]}', "no such entry of include"),
        ('{"prompt": "a", "include"', ":1: invalid JSON"),
        (
            '{"prompt":"a","include":[{"class":"b"}]}\n{"prompt":"a","include":[{"class":"c"}]}',
            ":2: other requirements",
        ),
    ],
)
def test_bad_requirements_are_named_by_their_line(tmp_path, text, message):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(PromptError) as caught:
        read_requirements(tmp_path / "m.jsonl")
    assert message in str(caught.value)


def test_requirements_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"prompt": "a", "include": [{"class": "b"}]}\n{"prompt": "na\xefve"')
    with pytest.raises(PromptError, match=r"m\.jsonl:2: not UTF-8"):
        read_requirements(tmp_path / "m.jsonl")


def test_a_missing_file_and_a_missing_option_are_named_before_anything_loads(tmp_path):
    with pytest.raises(PromptError, match="no such file"):
        build("geneval", {"metadata": str(tmp_path / "none.jsonl")}, "rewards.0")
    with pytest.raises(UsageError, match=r"rewards\.0\.metadata: field required"):
        build("geneval", {}, "rewards.0.name")


def test_another_kind_of_model_is_refused(folders, tmp_path):
    reward = build("geneval", options(folders, model=str(folders / "clip")), "rewards.0")
    with pytest.raises(RewardError, match=r"cannot load|takes owlv2 or owlvit"):
        reward([LINES[0]["prompt"]], pictures(1))
