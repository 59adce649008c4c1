"""Rewards by name: whose names they are, and what options go where."""

import pytest
import torch

from fdfo_engine.config import load_config
from fdfo_engine.rewards import Reward, build, register
from fdfo_engine.rewards import registry as registry_module
from fdfo_engine.rewards.registry import find, with_own_rewards
from fdfo_engine.runtime.errors import UsageError

IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def forgets():
    """What a test registers is gone after it, but for bundled rewards, whose modules are imported once."""
    before, own = set(registry_module._registered), set(registry_module._own)
    yield
    for name in registry_module._registered.keys() - before - registry_module._BUILT_IN.keys():
        del registry_module._registered[name]
    registry_module._own.intersection_update(own)


def sums(prompts, images, factor=1.0, shift=0.0):
    return factor * images.flatten(1).sum(1) + shift


def test_a_name_is_given_once():
    register("mine_alone")(sums)
    with pytest.raises(ValueError, match="'mine_alone' is registered already"):
        register("mine_alone")(sums)
    assert find("mine_alone", "x") is sums


def test_options_of_a_function_go_behind_its_prompts_and_images():
    register("summed")(sums)
    found = build("summed", {"factor": 2.0, "shift": 1.0}, "rewards.0.name")(["a", "b"], IMAGES)
    torch.testing.assert_close(found, 2 * IMAGES.flatten(1).sum(1) + 1)
    for taken in ("prompts", "images", "colour"):
        with pytest.raises(UsageError, match=rf"rewards\.0\.name: options \['{taken}'\]"):
            build("summed", {taken: 1}, "rewards.0.name")


def test_options_of_a_class_go_to_its_constructor():
    @register("classy")
    class Classy(Reward):
        def __init__(self, prompts, images="none"):
            self.given = prompts, images

    assert build("classy", {"prompts": 1, "images": 2}, "x").given == (1, 2)
    assert build("classy", {"prompts": 1}, "x").given == (1, "none")
    with pytest.raises(UsageError, match="options"):
        build("classy", {}, "rewards.0.name")


def test_a_url_is_the_server_at_it_with_the_options_that_are_given():
    reward = build("https://host:1/score/", {"batch_size": 3}, "rewards.0.name")
    assert (reward.options.url, reward.options.batch_size) == ("https://host:1/score", 3)


def here(name):
    """A function as a notebook has it."""

    def scores(prompts, images):
        return images.flatten(1).mean(1)

    scores.__module__, scores.__qualname__ = "__main__", name
    return scores


def test_functions_take_the_place_of_a_configs_rewards_each_at_weight_1():
    config = load_config("shapes", ["run.dir=x"])
    assert with_own_rewards(config, []) is config
    found = with_own_rewards(config, [here("one"), here("made_in.<locals>.two"), sums])
    assert [(part.name, part.weight) for part in found.rewards] == [
        ("one", 1.0), ("two", 1.0), (f"{sums.__module__}:sums", 1.0),
    ]  # fmt: skip
    again = here("one")
    with_own_rewards(config, [again])
    assert find("one", "x") is again, "defined anew"


def test_names_of_others_and_two_of_one_name_are_refused():
    config = load_config("shapes", ["run.dir=x"])
    register("registered_by_somebody")(sums)
    for name in ("pickscore", "registered_by_somebody"):
        with pytest.raises(UsageError, match=f"'{name}' is the name of a registered reward"):
            with_own_rewards(config, [here(name)])
    with pytest.raises(UsageError, match="two are named 'one'"):
        with_own_rewards(config, [here("one"), here("two"), here("one")])
    with pytest.raises(UsageError, match="3 is a int; takes functions"):
        with_own_rewards(config, [3])
