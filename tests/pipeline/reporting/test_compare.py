"""Runs beside each other, and the command that does it."""

import pytest
from typer.testing import CliRunner

from ballast.errors import ConfigError, DataError
from ballast.pipeline import cli
from ballast.pipeline.reporting.compare import charts, comparison_page, differences_table, named, safeguards_table
from ballast.pipeline.reporting.run_record import read_run


@pytest.fixture(scope="module")
def paths(make_run):
    short = {"group": 3, "steps": 2}
    return make_run("first", **short), make_run("second", "seed=7", "safegrad.enabled=true", **short)


@pytest.fixture(scope="module")
def runs(paths):
    return named([read_run(path) for path in paths])


def test_differences_are_the_keys_that_differ_and_the_names_of_the_runs_are_none(runs):
    headings, rows = differences_table(runs)
    assert headings == ["", "first", "second"]
    assert rows == [["seed", "0", "7"], ["safegrad.enabled", "false", "true"]]


def test_a_safeguard_that_one_run_lacks_has_a_dash_there(runs):
    rows = {row[0]: row[1:] for row in safeguards_table(runs)[1]}
    assert rows["SafeGrad"][0] == "–"
    assert rows["SafeGrad"][1].startswith("mode project")
    assert "frozen safety layers" not in rows


def test_every_chart_has_a_line_a_run(runs):
    outcome, *curves = charts(runs)
    assert outcome.models == ("first", "second")
    assert [chart.name for chart in curves] == ["safety", "reward", "risk", "loss"]
    assert all([series.label for series in chart.series] == ["first", "second"] for chart in curves)


def test_the_page_has_no_script_and_says_where_figures_cannot_be_compared(runs):
    page = comparison_page(runs)
    assert "script-src 'none'" in page
    assert "<script" not in page
    assert "cannot be compared" not in page
    second = runs["second"]
    data = second.config.data.model_copy(update={"test": ("other.jsonl",)})
    other = type(second)(**{**vars(second), "config": second.config.model_copy(update={"data": data})})
    assert "cannot be compared" in comparison_page({"first": runs["first"], "second": other})


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run):
    one, two = (read_run(make_run("same", group=3, steps=2)) for _ in range(2))
    names = list(named([one, two]))
    assert [name.split("/")[-1] for name in names] == ["same", "same"]
    assert len(set(names)) == 2
    with pytest.raises(DataError, match="named twice"):
        named([one, one])


def test_the_command_writes_the_page_and_prints_the_tables(paths, tmp_path):
    out = tmp_path / "both.html"
    result = CliRunner().invoke(cli.app, ["report", "compare", *map(str, paths), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "first" in result.stdout
    assert f"written: {out}" in result.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{run}"], "two or more"),
        (["{run}", "nowhere"], "is no run folder"),
        (["{run}", "{run}", "--out", "{there}"], "is there already"),
        (["{run}", "{run}", "--out", "no/such/folder.html"], "there is no folder"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(paths, tmp_path, words, told, capsys):
    there = tmp_path / "there.html"
    there.write_text("mine")
    given = [word.format(run=paths[0], there=there) for word in words]
    result = CliRunner().invoke(cli.app, ["report", "compare", *given])
    assert result.exit_code == ConfigError.exit_code
    assert told in result.stderr.replace("\n", " ")
    assert there.read_text() == "mine"


def test_compare_is_a_command_and_another_word_a_configuration(monkeypatch):
    from ballast.pipeline import run

    seen = []
    monkeypatch.setattr(run, "run", lambda config, stages=None, **_: seen.append((config.name, stages)))
    assert CliRunner().invoke(cli.app, ["report", "demo", "name=mine"]).exit_code == 0
    assert seen == [("mine", ["report"])]
