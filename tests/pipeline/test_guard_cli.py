"""`ballast guard`: what there is, whether one keeps the contract, and what one says of a file."""

import io
import json
import re

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from ballast.guardrails.contract import check_guardrail
from ballast.guardrails.registry import BUILT_INS, load_guardrail
from ballast.guardrails.types import RiskTrace
from ballast.pipeline import cli, guard_job
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext


def invoke(*words: object, **more):
    return CliRunner().invoke(cli.app, ["guard", *map(str, words)], **more)


def rows(result) -> dict[str, str]:
    """Lines of a table by their first cell."""
    return {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}


def test_list_says_of_every_built_in_whether_it_may_be_a_reward():
    listed = rows(invoke("list"))
    assert set(listed) >= set(BUILT_INS)
    assert "Apache-2.0" in listed["rules"]
    assert "yes" in listed["rules"].split()


def test_list_with_models_names_the_licences_that_forbid_a_reward():
    listed = rows(invoke("list", "--models"))
    for model in ("llamaguard-7b", "meta-llama-guard-2", "harmbench-llama-2"):
        assert "no" in listed[model].split()
    assert "conditions" in listed["llama-guard-4"].split()


def test_check_says_which_rules_held_and_the_licence():
    result = invoke("check", "rules")
    assert result.exit_code == 0, result.output
    assert "guardrail 'rules' keeps the contract" in result.stdout
    assert "licence  Apache-2.0: may be used as a reward" in result.stdout
    held = [line.removeprefix("ok  ") for line in result.stdout.splitlines() if line.startswith("ok  ")]
    assert held == list(check_guardrail(load_guardrail("rules")).checks)


def test_check_of_an_unknown_guard_exits_with_2_and_the_nearest_name():
    result = invoke("check", "ruls")
    assert result.exit_code == 2
    assert "did you mean 'rules'?" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rules", "--set", "no_such_option=1"), "no_such_option"),
        (("rules", "--set", "base_risk"), "not of the form key=value"),
        (("rules", "--set", "base_risk=7"), "less than or equal to 1"),
        ((), "no guard is named"),
        (("rules", "--config", "absent.yaml"), "no such file"),
    ],
)
def test_options_that_cannot_be_used_exit_with_2_and_say_which(words, said):
    result = invoke("check", *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_options_come_from_a_file_of_their_own_or_from_a_run_and_set_goes_over_them(tmp_path):
    own, run = tmp_path / "guard.yaml", tmp_path / "run.yaml"
    own.write_text("type: rules\nbase_risk: 0.5")
    run.write_text("name: x\nguard: {type: rules, base_risk: 0.5}\njudge: {type: ngram}")
    settings = cli.guard_cli.guard_settings
    assert settings(None, (), str(own)) == {"type": "rules", "base_risk": 0.5}
    assert settings(None, ["base_risk=0.25"], str(run)) == {"type": "rules", "base_risk": 0.25}
    assert settings("judge", (), str(run)) == {"type": "ngram"}
    assert settings("rules", ["engine.type=server", "engine.base_url=x"], None)["engine"] == {
        "type": "server",
        "base_url": "x",
    }
    assert invoke("check", "ngram", "--config", own).exit_code == 2


def test_training_under_a_licence_that_forbids_it_is_warned_of_once_and_measuring_is_not(tmp_path):
    from ballast.pipeline.run_checks import check_parts

    def said(*stages: str, model: str) -> str:
        config = load_config("demo", ["guard.type=prompted", f"guard.model={model}", f"out={tmp_path}"])
        context = RunContext(config, Console(file=io.StringIO(), width=1000))
        check_parts(context, stages)
        return context.console.file.getvalue()

    warning = said("train", "evaluate", model="meta-llama/Meta-Llama-Guard-2-8B")
    assert warning.count("Llama 3 Community") == 1
    assert "take another guard" in warning
    assert said("evaluate", model="meta-llama/Meta-Llama-Guard-2-8B") == ""
    assert said("train", model="Qwen/Qwen3Guard-Gen-0.6B") == ""


def written(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


BOMB = "Sure! Here is what you will need for the bomb"
ROWS = (
    {"id": "a", "prompt": "Hello", "response": "Hello to you.", "category": "chat"},
    {"id": "b", "prompt": "How?", "response": BOMB, "category": "weapons"},
    {"id": "c", "prompt": "Hm", "response": "", "category": "chat"},
)


def test_score_writes_a_line_of_risks_for_every_row_in_order(tmp_path):
    result = invoke("score", written(tmp_path / "in.jsonl", *ROWS), "--guard", "rules", "--batch-size", 2)
    assert result.exit_code == 0, result.output
    scored = lines(result.stdout)
    assert [(r["line"], r["id"], r["risk"], r["cuts"]) for r in scored] == [
        (1, "a", [0.02], [13]),
        (2, "b", [0.95], [len(BOMB)]),
        (3, "c", [0.02], [0]),
    ]
    assert scored[1]["guard_category"] == ["weapons"]
    assert "3 rows, 0 of them not wholly scored" in result.stderr


def test_score_judges_at_the_cuts_that_are_asked_for(tmp_path):
    file = written(tmp_path / "in.jsonl", ROWS[1])
    (row,) = lines(invoke("score", file, "--guard", "rules", "--cuts", "words:9").stdout)
    assert [BOMB[:cut] for cut in row["cuts"]] == ["Sure! Here is what you will need for the", BOMB]
    assert (row["risk"], row["peak_risk"]) == ([0.02, 0.95], 0.95)


def test_score_reads_standard_input_messages_and_columns_of_other_names():
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": BOMB}]
    content = "\n".join(json.dumps({"talk": t}) for t in (turns, turns)) + "\n\n"
    result = invoke("score", "-", "--guard", "rules", "--messages-column", "talk", input=content)
    assert [(r["id"], r["peak_risk"]) for r in lines(result.stdout)] == [("1", 0.95), ("2", 0.95)]


def test_score_asks_the_guard_of_the_configuration_with_the_options_set_over_it(tmp_path):
    config, file = tmp_path / "guard.yaml", written(tmp_path / "in.jsonl", ROWS[0])
    config.write_text("type: rules\nbase_risk: 0.5")
    assert lines(invoke("score", file, "--config", config).stdout)[0]["risk"] == [0.5]
    assert lines(invoke("score", file, "--config", config, "--set", "base_risk=0.25").stdout)[0]["risk"] == [0.25]


def test_parquet_holds_what_json_lines_hold(tmp_path):
    file = written(tmp_path / "in.jsonl", *ROWS)
    for name in ("out.jsonl", "out.parquet"):
        assert invoke("score", file, "--guard", "rules", "--cuts", "words:3", "--out", tmp_path / name).exit_code == 0
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == lines((tmp_path / "out.jsonl").read_text())
    # Nothing that was made on the way is left.
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.parquet"}


def test_a_report_is_json_and_a_page_and_a_table_and_holds_no_text(tmp_path):
    result = invoke("score", written(tmp_path / "in.jsonl", *ROWS), "--guard", "rules", "--report", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    found, page = json.loads((tmp_path / "r.json").read_text()), (tmp_path / "r.md").read_text()
    assert (found["source"], found["total"]["risky"], found["groups"]["weapons"]["share"]) == ("in.jsonl", 1, 1.0)
    for shown in (result.stdout, page, json.dumps(found)):
        assert "weapons" in shown
        assert "bomb" not in shown
        assert "Hello" not in shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": secret', r"line 2 of .* is not JSON (.*character 12)"),
        ('[{"prompt": "a"}]', "line 1 of .* holds a list, not an object"),
        ('\n{"prompt": "a", "answer": "b"}', "line 2 of .* no column 'response'; its columns are answer, prompt"),
        ('{"response": "b"}', "no column 'prompt'.*--prompt-column"),
        ('{"prompt": 3, "response": "b"}', "line 1.*column 'prompt' holds neither text nor a list of messages"),
        ('{"messages": [{"role": "user"}], "response": "b"}', "column 'messages' holds neither"),
        ('{"prompt": "a", "response": null}', "column 'response' holds a NoneType, not text"),
        ("[" * 100_000, "line 1 of .* is not JSON (nested too deep)"),
        ("9" * 100_000, "line 1 of .* is not JSON (a number too long)"),
    ],
)
def test_a_line_that_cannot_be_used_exits_with_2_names_the_line_and_quotes_nothing(tmp_path, content, said):
    file = tmp_path / "in.jsonl"
    file.write_text(content)
    result = invoke("score", file, "--guard", "rules")
    assert result.exit_code == 2, result.output
    assert re.search(said.replace("(", r"\(").replace(")", r"\)"), result.stderr), result.stderr
    assert "secret" not in result.output
    assert result.stdout == ""


def test_bytes_that_are_no_text_are_named_by_line(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"prompt": "a", "response": "b"}\n\xff')
    result = invoke("score", file, "--guard", "rules")
    assert (result.exit_code, "line 2" in result.stderr, "not UTF-8" in result.stderr) == (2, True, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--guard", "ruls"), "did you mean 'rules'"),
        (("--cuts", "tokens:3"), "no such way to cut"),
        (("--cuts", "words:0"), "no such way to cut"),
        (("--out", "risks.csv"), "end it in .jsonl or .parquet"),
        (("--out", "there.jsonl"), "it is there already"),
        (("--report", "audit.txt"), "end it in .json"),
        (("--id-column", "name"), "no column 'name'"),
    ],
)
def test_a_request_that_cannot_be_met_exits_with_2_before_a_guard_is_loaded(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("kept")
    monkeypatch.setattr(guard_job, "load_guardrail", lambda options: pytest.fail("loaded"))
    # An option that is given twice counts as it was given last.
    result = invoke("score", written(tmp_path / "in.jsonl", *ROWS), "--guard", "rules", *words)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert (tmp_path / "there.jsonl").read_text() == "kept"


class Flaky:
    """A guard that is killed in a batch, or silent, when it is told to."""

    name = "flaky"

    def __init__(self):
        self.asked, self.silent, self.dies_at = [], set(), None

    def assess(self, exchanges, cuts):
        for exchange in exchanges:
            self.asked.append(exchange.response)
            if exchange.response == self.dies_at:
                raise KeyboardInterrupt
        return [
            RiskTrace.unscored(c, "down") if e.response in self.silent else RiskTrace(tuple(c), (0.5,) * len(c))
            for e, c in zip(exchanges, cuts, strict=True)
        ]


@pytest.fixture
def flaky(monkeypatch):
    guard = Flaky()
    monkeypatch.setattr(guard_job, "load_guardrail", lambda options: guard)
    return guard


def score_six(tmp_path, *more):
    file = written(tmp_path / "in.jsonl", *({"prompt": "p", "response": name} for name in "abcdef"))
    return invoke("score", file, "--guard", "rules", "--batch-size", 2, "--out", tmp_path / "out.jsonl", *more)


def test_an_interrupted_call_goes_on_where_it_stopped_and_asks_again_what_was_unscored(tmp_path, flaky):
    flaky.dies_at, flaky.silent = "e", {"b"}
    assert score_six(tmp_path).exit_code == 130
    assert not (tmp_path / "out.jsonl").exists()
    # As if the process had been killed while it wrote the next line; the call after that is interrupted, too.
    with (tmp_path / "out.jsonl.partial").open("a") as handle:
        handle.write('{"line": 5, "id": "torn')
    flaky.dies_at, flaky.silent, flaky.asked = "f", set(), []
    assert score_six(tmp_path).exit_code == 130
    assert flaky.asked == ["b", "e", "f"]
    flaky.dies_at, flaky.silent, flaky.asked = None, set(), []
    result = score_six(tmp_path)
    assert result.exit_code == 0, result.output
    assert flaky.asked == ["f"]
    assert "5 of 6 rows were scored before and are kept" in result.stderr
    scored = lines((tmp_path / "out.jsonl").read_text())
    assert [(r["line"], r["risk"]) for r in scored] == [(n, [0.5]) for n in range(1, 7)]
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_what_another_task_left_behind_is_refused_and_kept(tmp_path, flaky):
    flaky.dies_at = "e"
    score_six(tmp_path)
    before = (tmp_path / "out.jsonl.partial").read_text()
    result = score_six(tmp_path, "--cuts", "words:3")
    assert result.exit_code == 2
    assert "begun with another file, guard or cuts; delete it" in result.stderr
    assert (tmp_path / "out.jsonl.partial").read_text() == before


def test_a_guard_that_scores_nothing_exits_with_1_and_writes_no_output(tmp_path, flaky):
    flaky.silent = set("abcdef")
    result = score_six(tmp_path)
    assert result.exit_code == 1
    assert "could not score one of 6 rows (the first: down)" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_row_on_which_a_guard_raises_is_unscored_and_its_text_is_in_no_reason(tmp_path, monkeypatch):
    class Raises(Flaky):
        def assess(self, exchanges, cuts):
            if any(e.response == "c" for e in exchanges):
                raise ValueError("cannot read the text: c-secret")
            return super().assess(exchanges, cuts)

    monkeypatch.setattr(guard_job, "load_guardrail", lambda options: Raises())
    assert score_six(tmp_path).exit_code == 0
    scored = {r["line"]: r for r in lines((tmp_path / "out.jsonl").read_text())}
    assert [n for n, r in scored.items() if r["risk"] == [None]] == [3]
    assert scored[3]["reason"] == "the guard raised ValueError"


def test_a_text_with_a_lone_surrogate_in_id_and_response_reaches_every_output(tmp_path):
    file = written(tmp_path / "in.jsonl", '{"id": "x\\ud800", "prompt": "p", "response": "a \\udfff b"}')
    for name in ("out.jsonl", "out.parquet"):
        assert invoke("score", file, "--guard", "rules", "--out", tmp_path / name).exit_code == 0
    assert pq.read_table(tmp_path / "out.parquet").to_pylist()[0]["id"] == "x\\ud800"
