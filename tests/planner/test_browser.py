"""The page in a browser: nothing on the console, and the curves really drawn."""

import pytest

from commfuse.planner.cluster import parse_cluster
from commfuse.planner.model import load_model
from commfuse.planner.page import page
from commfuse.planner.plan import Question, plan
from commfuse.testing import browser

pytestmark = pytest.mark.skipif(bool(browser.obstacle()), reason=f"browser: {browser.obstacle()}")

# Of 50 points of each curve, how many show the curve itself or one of its dots; and the area of
# what is drawn.
SCRIPT = """
(() => {
  const shown = (curve) => {
    let hits = 0;
    for (let i = 0; i < 50; i++) {
      const at = curve.getPointAtLength(curve.getTotalLength() * i / 49);
      const {x, y} = at.matrixTransform(curve.getScreenCTM());
      hits += document.elementsFromPoint(x, y).some((e) => e.matches('.curve, .dot'));
    }
    return hits;
  };
  const area = (e) => { const box = e.getBoundingClientRect(); return box.width * box.height; };
  const all = (selector) => [...document.querySelectorAll(selector)];
  return {
    curves: all('.curve').map(shown),
    bands: all('.band').map(area),
    dots: all('.dot').map(area),
    bars: all('rect').map(area),
    drawings: all('svg').map(area),
  };
})()
"""


@pytest.fixture(scope="module")
def text():
    cluster = parse_cluster("2x8:a100-80g-sxm,ib-hdr")
    return page(plan(Question(load_model("llama-3.1-405b"), cluster)))


def test_the_curves_are_drawn(text):
    found = browser.look(text, SCRIPT)
    assert found.console == []
    answer = found.answer
    assert len(answer["curves"]) == 2 and min(answer["curves"]) == 50
    assert len(answer["bands"]) == 2 and min(answer["bands"]) > 1000
    assert len(answer["drawings"]) == 3 and min(answer["drawings"]) > 100_000
    assert min(answer["dots"]) > 20 and len(answer["bars"]) > 20 and max(answer["bars"]) > 1000


def test_a_page_that_is_broken_is_noticed(text):
    broken = text.replace(".curve { fill: none; stroke: var(--accent);", ".curve { fill: none;")
    broken = broken.replace("<h1>", "<script>nothing()</script><h1>")
    found = browser.look(broken, SCRIPT)
    assert max(found.answer["curves"]) < 25  # the dots alone
    assert any("nothing is not defined" in line for line in found.console)
