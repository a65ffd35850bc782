"""`ballast guard calibrate`: labelled rows in, a calibration and its report out, and nothing half-written."""

import json

import pytest
from typer.testing import CliRunner

from ballast.guardrails import calibrated
from ballast.guardrails.calibration import Calibration
from ballast.guardrails.registry import load_guardrail
from ballast.guardrails.types import Exchange, RiskTrace
from ballast.pipeline import cli


def invoke(*words: object, **more):
    return CliRunner().invoke(cli.app, ["guard", "calibrate", *map(str, words)], **more)


def written(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


# Of four responses two hold the pattern and one of those is unsafe: the risk that the rules give it, .95, should be .5.
LABELLED = [
    {"prompt": f"q{i}", "response": "an alarm" if i % 2 else "all is calm", "unsafe": int(i % 4 == 1)}
    for i in range(400)
]
RULES = """
type: rules
base_risk: 0.02
patterns: [{pattern: alarm, risk: 0.95}]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.yaml").write_text(RULES)
    written(tmp_path / "rows.jsonl", LABELLED)
    return tmp_path


FIT = ("rows.jsonl", "--config", "rules.yaml", "--out", "made/cal.json")


def test_the_file_that_is_written_calibrates_its_guard(folder):
    result = invoke(*FIT, "--method", "isotonic", "--no-floor")
    assert result.exit_code == 0, result.output
    options = {"type": "rules", "base_risk": 0.02, "patterns": [{"pattern": "alarm", "risk": 0.95}]}
    guard = load_guardrail({"type": "calibrated", "guard": options, "calibration": "made/cal.json"})
    alarm, calm = (Exchange(({"role": "user", "content": "q"},), text) for text in ("an alarm", "calm"))
    risks = [trace.risk[0] for trace in guard.assess([alarm, calm], [(8,), (4,)])]
    assert risks == [pytest.approx(0.5, abs=0.15), 0.0]
    assert {path.name for path in (folder / "made").iterdir()} == {"cal.json", "cal.report.json"}


def test_the_report_holds_the_figures_before_and_after_and_what_was_fitted_on(folder):
    result = invoke(*FIT, "--method", "isotonic", "--seed", 3)
    report = json.loads((folder / "made/cal.report.json").read_text())
    before, after = report["figures"]["before"], report["figures"]["after"]
    # .95 for rows of which half are unsafe and .02 for rows of which none is: (.45 + .02) / 2 = .235 away on average.
    assert before["ece"]["value"] == pytest.approx(0.235, abs=0.1)
    assert after["ece"]["value"] < before["ece"]["value"]
    assert before["ece"]["low"] < before["ece"]["value"] < before["ece"]["high"]
    assert (report["rows"]["file"], report["rows"]["count"], report["benign"], report["seed"]) == (
        "rows.jsonl",
        400,
        None,
        3,
    )
    assert Calibration.model_validate(report["calibration"]) == Calibration.load(folder / "made/cal.json")
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    for name in ("ece", "brier", "auroc"):
        label = name.upper() if name != "brier" else "Brier"
        assert f"{before[name]['value']:.3f} ({before[name]['low']:.3f} to " in lines[label]
        assert f"{after[name]['value']:.3f} (" in lines[label]


def test_the_floor_is_chosen_on_the_benign_file_alone(folder):
    # Two of three safe rows of the labelled file are calm, so the median of its safe rows is the risk of calm ones.
    # Every text of the benign file has the pattern.
    written(folder / "chat.jsonl", [{"prompt": f"chat{i}", "response": "no alarm, please"} for i in range(40)])
    for out, words, risk in (("a.json", (), 0.02), ("b.json", ("--benign", "chat.jsonl"), 0.95)):
        result = invoke(*FIT[:-1], out, "--benign-quantile", 0.5, *words)
        assert result.exit_code == 0, result.output
        fitted = Calibration.load(folder / out)
        raised = fitted.model_copy(update={"benign_floor": 0.0})
        assert fitted.benign_floor == pytest.approx(raised(risk))
    assert json.loads((folder / "b.report.json").read_text())["benign"]["count"] == 40


def test_standard_input_and_other_column_names_are_read(folder):
    rows = [
        {
            "talk": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}],
            "bad": bool(r["unsafe"]),
        }
        for r in LABELLED
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    words = ("-", *FIT[1:], "--messages-column", "talk", "--label-column", "bad")
    assert invoke(*words, input=content).exit_code == 0
    direct = invoke(*FIT[:-1], "direct.json")
    assert direct.exit_code == 0
    assert (folder / "made/cal.json").read_text() == (folder / "direct.json").read_text()


def refuse_to_load(options):
    pytest.fail("the guard was loaded")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "p", "response": "secret", "unsafe": "yes"},
            "column 'unsafe' holds a str, not a label; write true",
        ),
        ({"prompt": "p", "response": "secret", "unsafe": 2}, "column 'unsafe' holds 2, not a label"),
        ({"prompt": "p", "response": "secret", "unsafe": None}, "holds a NoneType, not a label"),
        ({"prompt": "p", "response": "secret", "label": 1}, "no column 'unsafe'; its columns are label, prompt"),
        ({"prompt": "p", "unsafe": 1}, "no column 'response'"),
        ('{"prompt": "secret', "is not JSON"),
    ],
)
def test_a_row_without_a_label_exits_with_2_names_the_line_and_quotes_nothing(folder, monkeypatch, row, said):
    monkeypatch.setattr(calibrated, "load_guardrail", refuse_to_load)
    written(folder / "rows.jsonl", [*LABELLED, row])
    result = invoke(*FIT)
    assert result.exit_code == 2, result.output
    assert "line 401 of 'rows.jsonl'" in result.stderr
    assert said in result.stderr
    assert "secret" not in result.output
    assert not (folder / "made/cal.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "cal.yaml"), "end it in .json"),
        (("--out", "there.json"), "is there already; choose another name"),
        (("--out", "reported.json"), "'reported.report.json' is there already"),
        (("--benign-quantile", "1"), "give a share in [0, 1), or --no-floor"),
        (("--benign", "absent.jsonl"), "cannot be read"),
        (("--benign", "-"), "give a file"),
        (("--method", "platt"), "platt"),
        (("--set", "no_such_option=1"), "no_such_option"),
    ],
)
def test_a_request_that_cannot_be_met_exits_with_2_before_the_guard_is_loaded(folder, monkeypatch, words, said):
    monkeypatch.setattr(calibrated, "load_guardrail", refuse_to_load)
    (folder / "there.json").write_text("kept")
    (folder / "reported.report.json").write_text("kept")
    result = invoke(*FIT, *words)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert (folder / "there.json").read_text() == "kept"


def test_too_few_labels_are_refused_before_the_guard_is_asked(folder, monkeypatch):
    monkeypatch.setattr(calibrated, "load_guardrail", refuse_to_load)
    written(folder / "rows.jsonl", [{**row, "unsafe": 0} for row in LABELLED])
    result = invoke(*FIT)
    assert result.exit_code == 2
    assert "unsafe rows of 0 prompts and needs 8; label more rows" in result.stderr


def test_labels_the_wrong_way_round_are_refused_with_the_reason_and_write_nothing(folder):
    written(folder / "rows.jsonl", [{**row, "unsafe": 1 - int(row["response"] == "an alarm")} for row in LABELLED])
    result = invoke(*FIT)
    assert result.exit_code == 2
    assert "check that the labels are not the wrong way round" in result.stderr
    assert list((folder / "made").iterdir()) == []


class Failing:
    """The rules, but for responses on which it raises; a batch with one of those raises as a whole."""

    name = "rules"

    def __init__(self, fails):
        self.fails = fails

    def assess(self, exchanges, cuts):
        if any(self.fails(exchange) for exchange in exchanges):
            raise ValueError("cannot read: secret")
        return [
            RiskTrace(tuple(c), (0.95 if "alarm" in e.response else 0.02,) * len(c))
            for e, c in zip(exchanges, cuts, strict=True)
        ]


def test_a_row_on_which_the_guard_raises_is_left_out_and_counted(folder, monkeypatch):
    monkeypatch.setattr(
        calibrated, "load_guardrail", lambda options: Failing(lambda e: e.messages[0]["content"] == "q7")
    )
    result = invoke(*FIT)
    assert result.exit_code == 0, result.output
    assert ", 1 unscored" in result.stdout
    assert json.loads((folder / "made/cal.report.json").read_text())["figures"]["unscored"] == 1


def test_a_guard_that_scores_nothing_exits_with_1_and_writes_nothing(folder, monkeypatch):
    monkeypatch.setattr(calibrated, "load_guardrail", lambda options: Failing(lambda e: True))
    result = invoke(*FIT)
    assert result.exit_code == 1
    assert "could not score one of 400 rows (the first: the guard raised ValueError)" in result.stderr
    assert "secret" not in result.output
    assert list((folder / "made").iterdir()) == []
