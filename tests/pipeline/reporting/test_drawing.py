"""Charts as pictures: in the page's colours, alone in their ids, and the same on paper."""

import re
from xml.etree import ElementTree

import pytest

from ballast.pipeline.evaluation.statistics import Estimate
from ballast.pipeline.reporting.chart import Curves, Intervals, Mark, Series
from ballast.pipeline.reporting.drawing import draw

MARKS = (Mark(1, "evaluation", ""), Mark(1, "trip", ""), Mark(1, "rollback", ""), Mark(1, "slower", ""))
LINE = Series("cost in $ and 100%$ of <it>", [(0, 0.1), (1, None), (2, 0.3)], [(0.0, 0.2), None, None])
CURVES = Curves(
    "reward", 'Reward "so far"', "mean", (LINE, Series("b", [(0, 1.0)], (), False)), MARKS, ((0.5, "half"),)
)
INTERVALS = Intervals(
    "outcome",
    "Outcome",
    ("start", "after"),
    {
        "unsafe": (Estimate(0.5, 0.4, 0.6, 9), None),
        "reward": (Estimate(None, None, None, 0), Estimate(1.5, 1.2, 1.9, 9)),
    },
)


@pytest.fixture(scope="module", params=[CURVES, INTERVALS], ids=["curves", "intervals"])
def picture(request):
    return draw(request.param)


def test_every_colour_is_the_pages_so_that_it_is_readable_in_light_and_dark(picture):
    assert re.findall(r"#[0-9a-f]{6}\b", picture.svg) == []
    assert "black" not in picture.svg
    assert {"var(--ink)", "var(--series-1)"} <= set(re.findall(r"var\(--[\w-]+\)", picture.svg))


def test_the_picture_brings_no_style_font_or_address_of_its_own(picture):
    for part in ("<style", "font-family", "<?xml", "<!DOCTYPE", "http://", "https://", "<image"):
        assert part not in picture.svg.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_ids_carry_the_charts_name_and_every_reference_finds_one(picture):
    ids = re.findall(r'\bid="([^"]+)"', picture.svg)
    assert all(one.startswith(f"{picture.name}-") for one in ids)
    assert len(set(ids)) == len(ids)
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', picture.svg)
    assert {one or other for one, other in references} <= set(ids)


def test_text_stays_text_and_a_name_is_no_formula_and_no_markup():
    svg = draw(CURVES).svg
    texts = [node.text for node in ElementTree.fromstring(svg.replace("xlink:href", "href")).iter() if node.text]
    assert LINE.label in texts
    assert 'aria-label="Reward &quot;so far&quot;"' in svg


def test_lines_differ_by_dashes_and_markers_and_not_by_colour_alone():
    two = Curves("two", "Two", "y", tuple(Series(name, [(0, 0.0), (1, 1.0)]) for name in "ab"))
    svg = draw(two).svg
    lines = re.findall(r"stroke: var\(--series-(\d)\)[^\"]*", svg)
    assert {"1", "2"} <= set(lines)
    assert re.search(r"stroke-dasharray[^\"]*stroke: var\(--series-2\)", svg)
    assert not re.search(r"stroke-dasharray[^\"]*stroke: var\(--series-1\)", svg)


def test_the_same_chart_gives_the_same_picture():
    assert draw(INTERVALS).svg == draw(INTERVALS).svg


def test_the_png_is_one(picture):
    assert picture.png.startswith(b"\x89PNG\r\n")
