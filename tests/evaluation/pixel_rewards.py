"""Rewards for the guard: one asks for an artefact, loud colours, whatever the prompt; one climbs by itself."""

from fdfo_engine.metrics.health import saturation


def loud(prompts, images):
    return saturation(images)


scored = 0


def ever_better(prompts, images):
    """Scores that climb by themselves with each call, so that a guard has something to be suspicious of."""
    global scored
    scored += 1
    return scored + images.flatten(1).mean(1)
