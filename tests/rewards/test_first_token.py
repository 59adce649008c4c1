"""What a server's log-probabilities may say: of one text the sum, and no opinion where numbers can mean nothing."""

import math

import pytest

from fdfo_engine.rewards.first_token import Candidate, LittleMassError, leaning
from fdfo_engine.rewards.json_server import NoOpinionError
from fdfo_engine.rewards.questions import QuestionOptions

OPTIONS = QuestionOptions()


def read(*candidates, **options):
    return leaning([Candidate(*candidate) for candidate in candidates], QuestionOptions(**options))


def test_it_is_the_difference_and_the_mass():
    answer = read(("Yes", -0.1), ("No", -2.5), ("Maybe", -6.0))
    assert answer.difference == pytest.approx(2.4)
    assert answer.mass == pytest.approx(math.exp(-0.1) + math.exp(-2.5))


@pytest.mark.parametrize("order", [1, -1])
def test_of_tokens_with_one_text_probabilities_add_up(order):
    rows = [("Yes", -0.7, [89]), ("No", -2.5), ("Yes", -1.2, [89, 0]), ("Yes", -15.0), ("yes", -16.0)]
    answer = read(*rows[::order])
    yes = math.exp(-0.7) + math.exp(-1.2) + math.exp(-15.0)
    assert answer.difference == pytest.approx(math.log(yes) + 2.5)
    assert answer.mass == pytest.approx(yes + math.exp(-2.5))


def test_a_token_that_is_listed_twice_counts_once():
    """Some servers list the sampled token beside the likeliest ones."""
    twice = read(("Yes", -0.1, [89]), ("Yes", -0.1, [89]), ("No", -2.5))
    assert twice == read(("Yes", -0.1, [89]), ("No", -2.5))


@pytest.mark.parametrize("value", [None, "high", "-inf", True, [1], {}, -(10**400), -9999.0, -math.inf])
def test_what_does_not_matter_may_be_anything(value):
    answer = read((None, -1.0), ("#", value), ("Yes", -0.1), ("No", -2.5), ("Yes", value), (["x"], None))
    assert answer.difference == pytest.approx(2.4)


def test_one_answer_may_be_as_unlikely_as_can_be():
    assert read(("Yes", 0.0), ("No", -9999)).difference == 9999.0
    assert read(("Yes", -math.inf), ("No", -0.01)).difference == -math.inf


def test_tokens_of_another_text_are_no_answers():
    with pytest.raises(
        NoOpinionError, match=r"'Yes' and 'No' not among the answer's tokens: ' Yes', 'yes', 'NO', '\\n'"
    ):
        read((" Yes", -0.1), ("yes", -3.0), ("NO", -3.0), ("\n", -3.0))
    assert read(
        (" Yes", -0.1), (" No", -2.5), ("Yes", -5.0), target=" Yes", contrast=" No"
    ).difference == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("Yes", None), ("No", -0.1)], "no log-probabilities of 'Yes': it is null"),
        ([("Yes", -0.1), ("No", "NaN")], "no log-probabilities of 'No': it is 'NaN'"),
        ([("Yes", -0.1), ("No", False)], "no log-probabilities of 'No': it is False"),
        ([("Yes", -0.1), ("Maybe", -2.5)], "^'No' not among the answer's tokens: 'Yes', 'Maybe'$"),
        ([], "'Yes' and 'No' not among"),
        ([("Yes", 25.3), ("No", 20.1)], "logits or probabilities where .*raw_logprobs.*: 25.3"),
        ([("Yes", -1.5), ("No", -3.0), ("The", 12.0)], "logits or probabilities where"),
        ([("Yes", 0.9), ("No", 0.05)], "logits or probabilities where"),
        ([("Yes", math.inf), ("No", -1.0)], "logits or probabilities where"),
        ([("Yes", 0.0), ("No", 0.0)], "add up to a probability above 1: 2"),
        ([("Yes", -0.5), ("No", -0.6), ("a", -0.7), ("b", -0.8)], "add up to a probability above 1: 2"),
    ],
)
def test_numbers_that_mean_nothing_are_no_opinion(rows, reason):
    with pytest.raises(NoOpinionError, match=reason):
        read(*rows)


@pytest.mark.parametrize("floor", [-9999, -9999.0, -100, -math.log(1e10), -math.inf])
def test_both_at_a_floor_are_no_opinion(floor):
    with pytest.raises(LittleMassError, match="both answers are at -"):
        read(("<think>", -1e-5), ("Yes", floor), ("No", floor))
    with pytest.raises(LittleMassError, match="both answers are at -"):
        read(("<think>", -1e-5), ("Yes", floor), ("No", floor), least_mass=1e-300)


def test_answers_of_next_to_no_mass_are_no_opinion():
    rows = [("<think>\n", -0.002), ("Yes", -7.0), ("No", -9.0)]
    with pytest.raises(
        LittleMassError, match=r"'Yes' and 'No' hold less .*: 0.001; the likeliest is '<think>\\n'"
    ) as caught:
        read(*rows)
    assert caught.value.mass == pytest.approx(math.exp(-7) + math.exp(-9))
    assert read(*rows, least_mass=0.0005).difference == pytest.approx(2.0)


def test_a_tie_is_an_opinion():
    assert read(("Yes", -0.7), ("No", -0.7)).difference == 0.0


def test_just_enough_mass_is_an_opinion():
    mass = math.exp(-4.0) + math.exp(-5.0)
    rows = [("Yes", -4.0), ("No", -5.0), ("x", -0.1)]
    assert read(*rows, least_mass=mass).mass == mass
    with pytest.raises(LittleMassError):
        read(*rows, least_mass=mass * (1 + 1e-12))


def test_rounding_above_zero_and_above_one_is_let_pass():
    assert read(("Yes", 0.01), ("No", -5.0)).difference == pytest.approx(5.01)
    with pytest.raises(NoOpinionError, match="logits or probabilities where"):
        read(("Yes", 0.0101), ("No", -5.0))
    assert read(("Yes", 0.0), ("No", math.log(0.4999))).difference == pytest.approx(-math.log(0.4999))
    with pytest.raises(NoOpinionError, match="add up to a probability above 1"):
        read(("Yes", 0.0), ("No", math.log(0.5001)))


def test_equal_answers_are_a_floor_below_a_thousandth():
    little, enough = math.log(0.000499), math.log(0.000501)
    with pytest.raises(LittleMassError, match="both answers are at -"):
        read(("x", -0.1), ("Yes", little), ("No", little), least_mass=1e-6)
    assert read(("x", -0.1), ("Yes", enough), ("No", enough), least_mass=1e-6).difference == 0.0
    assert read(("x", -0.1), ("Yes", little), ("No", little - 0.1), least_mass=1e-6).difference == pytest.approx(0.1)
