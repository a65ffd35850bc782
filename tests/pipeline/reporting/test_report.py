"""The report's files: whole, self-contained, and what a model wrote stays text in them."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from ballast.pipeline.reporting.report import write_report
from ballast.pipeline.reporting.run_record import read_run

from .conftest import HOSTILE


class Page(HTMLParser):
    """Elements and the text of scripts, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.text = ""
        self._script: dict | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs)
            self.scripts.append((self._script, ""))

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text += data
        else:
            self.scripts[-1] = (self._script, self.scripts[-1][1] + data)


@pytest.fixture(scope="module")
def text(reported):
    return (reported / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_a_page_with_500_completions_is_below_5_mb(reported, page):
    assert (reported / "report.html").stat().st_size < 5_000_000
    assert len(json.loads(page.scripts[0][1])) == 504


def test_a_closing_script_tag_in_a_completion_stays_text(text, page):
    rows = json.loads(page.scripts[0][1])
    assert [row["text"] for row in rows].count(HOSTILE) == 12
    assert HOSTILE not in text
    assert [attributes for attributes, _ in page.scripts] == [
        {"type": "application/json", "id": "completions-data"},
        {},
    ]
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "object", "embed")]


def test_lines_and_names_are_escaped_too(text):
    assert "&lt;b&gt;less&lt;/b&gt; risk" in text


def test_nothing_is_fetched_and_no_other_script_may_run(text, page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:,")), (tag, attributes)
    assert "url(http" not in text
    assert "@import" not in text
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    script = page.scripts[1][1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in policy


def test_the_page_says_what_was_trained_and_which_safeguards_were_left_out(page):
    for said in (
        "GRPO (TRL",
        "safety monitor",
        "● yes",
        "○ no",
        "every_n_steps 100",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ):
        assert said in page.text
    assert "step 6: back to the weights of step 0" in page.text
    assert "No guard of this run carries a fitted calibration" in page.text
    assert "monitor's 2 measurements 4 s" in page.text
    assert "Not logged by this training, and so not drawn: KL" in page.text


def test_every_chart_of_the_page_is_a_picture_beside_it_and_in_the_summary(reported, page):
    drawn = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    files = sorted(path.name for path in (reported / "charts").iterdir())
    summary = (reported / "summary.md").read_text()
    assert len(drawn) == len(files) == summary.count("](charts/")
    for name in ("outcome.png", "safety.png", "over-refusal.png", "reward.png", "risk.png"):
        assert name in files
        assert f"(charts/{name})" in summary


def test_the_summary_in_markdown_has_table_changes_and_safeguards(reported):
    summary = (reported / "summary.md").read_text()
    assert summary.startswith("# told\n\n| model |")
    assert "- start -> after GRPO: <b>less</b> risk\n" in summary
    assert "- safety monitor (every_n_steps 100, action rollback" in summary


def test_a_report_without_completions_holds_no_text_of_any(make_run, tmp_path):
    write_report(read_run(make_run("silent", "report.completions=0", group=3, steps=2)), tmp_path, [])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "report.completions = 0 keeps their text out" in text
    assert not re.search(r"question \d|Answer \d|Sentence \d", text)
    assert Page(text).scripts == []
    assert "script-src 'none'" in text


def test_a_kept_repair_is_the_last_model_and_one_of_a_former_training_is_none(make_run):
    from ballast.pipeline.run_folder import RunFolder

    path = make_run("repaired", group=3, steps=2)
    folder = RunFolder(path)
    for trained, expected in ((folder.digest("train"), "repaired by lox-1.25"), ("of before", "after GRPO")):
        with folder.writing("restore", {}, {"train": trained}) as scratch:
            (scratch / "choice.json").write_text(json.dumps({"best": "lox-1.25", "excluded": {}}))
            for suffix in (".json", ".parquet"):
                (scratch / f"lox-1.25{suffix}").write_bytes((path / "evaluate" / f"final{suffix}").read_bytes())
        run = read_run(path)
        assert list(run.models)[-1] == expected
        assert run.tuned == "after GRPO"
