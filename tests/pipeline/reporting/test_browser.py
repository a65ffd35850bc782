"""The report in headless Chromium, as a reader has it: from a file, without a network."""

import os
import shutil

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
FIRST = "harmful question 0"


@pytest.fixture(scope="module")
def chromium():
    driver = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)")
    with driver.sync_playwright() as playwright:
        # Chromium keeps no sandbox of its own as root, which containers often are.
        alone = [] if os.geteuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=alone, timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


@pytest.fixture
def opened(chromium, reported):
    """Opens the report; the test fails on any error in its console, and on any request but that for the file."""
    contexts, said, asked = [], [], []

    def open_page(scheme: str = "light"):
        context = chromium.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((reported / "report.html").as_uri())
        page.wait_for_selector(".row")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [(reported / "report.html").as_uri()] * len(
        contexts
    )


def contrast(page, selector: str) -> float:
    """WCAG's contrast of an element's text against the page, from 1 to 21."""
    return page.evaluate(
        """(selector) => {
          const rgb = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
          const part = (v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
          const style = getComputedStyle(document.querySelector(selector));
          const ink = selector.includes("text") ? style.fill : style.color;
          const [a, b] = [ink, getComputedStyle(document.body).backgroundColor].map((c) => light(rgb(c)));
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }""",
        selector,
    )


def test_charts_are_drawn_and_everything_is_readable_in_light_and_dark(opened, scheme):
    page = opened(scheme)
    boxes = page.eval_on_selector_all("figure svg", "all => all.map(svg => svg.getBoundingClientRect().height)")
    assert len(boxes) >= 5
    assert min(boxes) > 100
    drawn = "all => all.filter(path => path.getTotalLength() > 50 && getComputedStyle(path).stroke !== 'none').length"
    assert page.eval_on_selector_all("figure svg path", drawn) > 20
    for selector in ("body", ".soft", "a", "figure svg text", ".kind.harmful", "td.off"):
        assert contrast(page, selector) >= 4.5, (scheme, selector)


def test_search_finds_words_in_any_order_and_says_how_many(opened):
    page = opened()
    page.fill("#search", "7 ordinary answer")
    # Answers 7 and 17 of each of three models; "Answer 7 to ..." and "ordinary question 7" hold all three words.
    page.wait_for_function("document.getElementById('count').textContent.startsWith('6 of 504')")
    assert page.locator(".row").count() == 6
    page.fill("#search", "there is no such text")
    assert page.locator(".row").count() == 0
    page.fill("#search", "")
    assert page.inner_text("#count") == "504 of 504 shown"


def test_order_and_filters(opened):
    page = opened()
    page.select_option("#source", "training")
    assert page.inner_text("#count") == "324 of 504 shown"
    page.select_option("#order", "riskiest")
    assert "guard 0.90" in page.locator(".row").first.inner_text()
    page.select_option("#source", "after GRPO")
    page.select_option("#kind", "scary")
    assert page.inner_text("#count") == "20 of 504 shown"


def test_text_is_blurred_until_it_is_clicked_and_only_that_one_is_shown_then(opened):
    page = opened()
    page.fill("#search", FIRST)
    rows = page.locator(".row")
    blurred = "all => all.map(text => getComputedStyle(text).filter)"
    assert set(rows.locator(".text").evaluate_all(blurred)) == {"blur(7px)"}
    assert rows.first.locator("[aria-hidden=true]").count() == 1
    rows.first.get_by_role("button", name="Show this text").click()
    assert rows.locator(".text").evaluate_all(blurred)[:2] == ["none", "blur(7px)"]
    assert "Answer 0 to a harmful question." in rows.first.inner_text()
    page.fill("#search", "ordinary question 0")
    assert rows.first.locator(".veil").count() == 0
    page.check("#reveal")
    page.fill("#search", FIRST)
    assert page.locator(".veil").count() == 0


def test_what_a_model_wrote_stays_text(opened):
    page = opened()
    page.select_option("#source", "training")
    page.check("#reveal")
    first = page.locator(".row").first
    assert "</script><script>document.title='taken'" in first.inner_text()
    assert page.locator("main img").count() == 0
    assert page.title() == "told · Ballast"


def test_pieces_of_the_heat_map_are_the_text_also_beyond_the_basic_plane(opened):
    page = opened()
    page.check("#reveal")
    page.fill("#search", "faces")
    spans = page.locator(".row").first.locator(".heat")
    assert "".join(spans.all_text_contents()) == "A naïve 🙂 answer 🙂🙂 with faces."
    assert spans.evaluate_all("all => all.map(span => span.title)") == ["risk 0.20", "risk unscored"]
    # Unscored is hatched, and so told from risk 0 without its colour.
    assert "repeating-linear-gradient" in spans.nth(1).evaluate("span => getComputedStyle(span).backgroundImage")


def test_high_risk_is_underlined_and_not_only_coloured(opened):
    page = opened()
    page.check("#reveal")
    page.select_option("#source", "training")
    lines = (
        page.locator(".row")
        .first.locator(".heat")
        .evaluate_all("all => all.map(span => getComputedStyle(span).textDecorationLine)")
    )
    assert lines == ["underline", "underline"]  # risks of .7 and .9
    assert page.locator(".row").nth(2).locator(".heat").first.get_attribute("class") == "heat"  # .2


def test_one_completion_is_shown_piece_by_piece_and_stays_blurred_there(opened):
    page = opened()
    page.fill("#search", FIRST)
    page.locator(".row .open").first.click()
    dialog = page.locator("#detail")
    assert dialog.locator(".veil").count() == 1
    assert "judge's risk" in dialog.inner_text()
    dialog.get_by_role("button", name="Show this text").click()
    assert dialog.locator(".veil").count() == 0
    assert dialog.locator(".token").count() == 1
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_500_completions_scroll_with_few_of_them_in_the_page(opened):
    page = opened()
    found = page.evaluate(
        """async () => {
          const list = document.getElementById("list");
          const height = document.querySelector(".row").getBoundingClientRect().height;
          let most = 0, steps = 0;
          const work = [];
          for (let top = 0; top < list.scrollHeight; top += 2000) {
            list.scrollTop = top;
            const before = performance.now();
            list.dispatchEvent(new Event("scroll"));
            work.push(performance.now() - before);
            await new Promise((done) => requestAnimationFrame(done));
            most = Math.max(most, document.querySelectorAll(".row").length);
            steps++;
          }
          work.sort((a, b) => a - b);
          const place = Math.max(...[...document.querySelectorAll(".row")].map((row) => Number(row.dataset.place)));
          return { most, steps, place, whole: list.scrollHeight / height, work: work[Math.floor(work.length / 2)] };
        }"""
    )
    assert found["place"] == 503  # the last of 504 was reached
    assert 503 < found["whole"] < 505
    assert found["most"] < 40
    assert found["work"] < 16  # milliseconds a jump of 15 rows, half of them: within a frame


def test_it_fits_a_phone_and_can_be_used_by_keyboard(opened):
    page = opened()
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.fill("#search", FIRST)
    page.locator(".row button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".row").first.locator(".veil").count() == 0
    assert page.evaluate("document.activeElement.closest('.row') !== null")
