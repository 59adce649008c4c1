"""What is asked about an image, how large it is shown, and what the answers' probabilities become."""

import math

import pytest
import torch
from pydantic import ValidationError

from fdfo_engine.rewards.questions import AnswerMass, QuestionOptions, asked, score_of, seen


def test_a_score_is_a_hundred_times_the_sigmoid_of_the_difference():
    differences = torch.tensor([-math.inf, -3.0, 0.0, 0.5, 20.0, math.inf])
    wanted = [0.0, *(100 / (1 + math.exp(-d)) for d in (-3.0, 0.0, 0.5, 20.0)), 100.0]
    found = score_of(differences)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    assert torch.isnan(score_of(torch.tensor([math.nan]))).all()


def test_a_prompt_stands_where_the_question_says_and_is_text():
    assert asked('Is it "{prompt}"? {prompt}!', "a {cat} %s") == 'Is it "a {cat} %s"? a {cat} %s!'
    assert asked("Is it good?", "a cat") == "Is it good?"


@pytest.mark.parametrize(
    ("shape", "size", "shown"),
    [
        ((64, 64), 56, (56, 56)), ((64, 64), 28, (28, 28)), ((50, 150), 84, (56, 140)), ((150, 50), 84, (140, 56)),
        ((8, 400), 56, (28, 392)), ((30, 41), None, (30, 41)),
    ],
)  # fmt: skip
def test_sides_are_multiples_of_28_of_the_same_shape_and_number_of_pixels(shape, size, shown):
    found = seen(torch.full((2, 3, *shape), 0.5), size)
    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (2, 3, *shown))
    assert found.unique().tolist() == [128]


def test_masses_are_taken_once_and_in_order():
    masses = AnswerMass()
    assert masses.take()["answer_mass"].tolist() == []
    masses.keep(torch.tensor([0.5, math.nan], dtype=torch.float64))
    masses.keep(torch.tensor([0.25]))
    taken = masses.take()
    assert taken.keys() == {"answer_mass"}
    assert taken["answer_mass"].dtype == torch.float32
    assert taken["answer_mass"].nan_to_num(-1).tolist() == [0.5, -1.0, 0.25]
    assert masses.take()["answer_mass"].tolist() == []


def test_options_that_ask_nothing_are_refused():
    for wrong in (
        {"target": "No"}, {"target": ""}, {"contrast": ""}, {"question": ""}, {"image_size": 27}, {"least_mass": 0.0},
        {"least_mass": 1.01},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            QuestionOptions(**wrong)
    assert QuestionOptions(least_mass=1.0, image_size=28).image_size == 28
    assert QuestionOptions(target="No", contrast="Yes").target == "No"
    assert QuestionOptions(target="Y", contrast="N", question="?").contrast == "N", "one letter will do"
