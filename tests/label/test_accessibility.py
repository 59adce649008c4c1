"""Every scene of the page before axe-core, whose file AXE_CORE names: `npm pack axe-core`, then package/axe.min.js."""

import os
from pathlib import Path

import pytest
from label.test_browser import at_the_desk, labelling, press, run

__all__ = ["run"]  # a fixture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("AXE_CORE" not in os.environ, reason="AXE_CORE names no axe.min.js (npm pack axe-core)"),
]
SERIOUS = ("serious", "critical")


def findings(tab):
    """Rules that elements break, with the elements; planted ones are told alike (see the last test)."""
    tab.evaluate(Path(os.environ["AXE_CORE"]).read_text())
    told = tab.evaluate("() => axe.run(document)")
    return [(each["id"], each["nodes"][0]["html"]) for each in told["violations"] if each["impact"] in SERIOUS]


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_scene_has_a_serious_finding(chromium, run, scheme, width):
    run.add_round(3)
    found = {}
    with at_the_desk(chromium, run, color_scheme=scheme, viewport={"width": width, "height": 860}) as tab:
        found["labelling"] = findings(tab)
        press(tab, "ArrowLeft")
        if width > 400:
            tab.click("#train-early")
            found["the question before training early"] = findings(tab)
            tab.keyboard.press("Escape")
        press(tab, "ArrowLeft")
        press(tab, "ArrowRight")
        tab.wait_for_function("() => document.body.dataset.scene !== 'labelling'")
        found["the round is answered"] = findings(tab)
        tab.keyboard.press("Enter")
        tab.wait_for_function("() => /Training on your choices/.test(document.body.innerText)")
        found["training"] = findings(tab)
        run.add_round(2, kind="compare")
        tab.reload()
        labelling(tab)
        press(tab, "ArrowLeft")
        press(tab, "ArrowLeft")
        tab.wait_for_function("() => document.getElementById('card-title').textContent.startsWith('The trained model')")
        found["the result of a comparison"] = findings(tab)
    assert found == {scene: [] for scene in found}
    assert len(found) >= 4


def test_a_planted_finding_is_told(chromium, run):
    run.add_round(2)
    with at_the_desk(chromium, run) as tab:
        tab.evaluate("() => { document.querySelector('.picture img').removeAttribute('alt') }")
        assert "image-alt" in [rule for rule, _ in findings(tab)]
