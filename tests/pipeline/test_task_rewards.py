"""Task rewards from the configuration to TRL: names, columns, errors, and every example of docs/rewards.md."""

import json
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from ballast.errors import ConfigError, DataError
from ballast.pipeline.config_inputs import DataConfig
from ballast.pipeline.config_loading import dump_config, load_config
from ballast.pipeline.config_rewards import RewardConfig, TaskRewardConfig
from ballast.pipeline.config_train import TrainConfig
from ballast.pipeline.data import training_rows
from ballast.pipeline.run_checks import _check_rewards
from ballast.pipeline.stages.train import grpo_arguments
from ballast.pipeline.task_rewards import columns_read, refusal_detector, task_rewards
from ballast.rewards.refusal_guard import GuardRefusalDetector, keyword_detector

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"
TERMS: TypeAdapter[Any] = TypeAdapter(tuple[TaskRewardConfig, ...])


class Words:
    """A tokenizer whose ids are the text itself."""

    def batch_decode(self, ids: list[list[str]], skip_special_tokens: bool) -> list[str]:
        return ["".join(row) for row in ids]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sections() -> dict[str, str]:
    """The documented types, by heading."""
    parts = re.split(r"^## (\w+)$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def block(text: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def examples(text: str) -> list[tuple[str, str | None, float]]:
    """Rows of the table of a section: completion, answer, reward."""
    cell = r"(?:`([^`]*)`)?"
    rows = re.findall(rf"^\| `([^`]*)` \| {cell} ?\| ([\d.]+) \|$", text, re.MULTILINE)
    return [(completion.replace("\\n", "\n"), answer or None, float(reward)) for completion, answer, reward in rows]


TYPES = ("exact_match", "choice", "numeric", "rouge", "regex", "json", "function", "plugin")


@pytest.mark.parametrize("kind", TYPES)
def test_every_documented_example_gets_the_reward_that_is_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sections()[kind]
    (term,) = TERMS.validate_python([yaml.safe_load(block(text, "yaml"))])
    assert term.type == kind
    if kind in ("function", "plugin"):
        code = block(text, "python")
        name = code.split('"""')[1].partition(".py")[0]
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
    if kind == "plugin":
        points = tomllib.loads(block(text, "toml"))["project"]["entry-points"]["ballast.rewards"]
        package = tmp_path / "documented-1.0.dist-info"
        package.mkdir()
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: documented\nVersion: 1.0\n")
        lines = "\n".join(f"{name} = {target}" for name, target in points.items())
        (package / "entry_points.txt").write_text(f"[ballast.rewards]\n{lines}\n")
    (reward,) = task_rewards([term], Words())
    rows = examples(text)
    assert len(rows) >= 2
    batch: dict[str, Any] = {
        "completion_ids": [[completion] for completion, _, _ in rows],
        "completions": [[{"role": "assistant", "content": completion}] for completion, _, _ in rows],
        "kind": ["ordinary"] * len(rows),
        "answer": [answer for _, answer, _ in rows],
    }
    if kind == "function":
        batch["limit"] = [int(limit or 0) for _, limit, _ in rows]
    assert reward(**batch) == pytest.approx([wanted for _, _, wanted in rows])
    assert {wanted for _, _, wanted in rows} != {1.0}  # a failure is shown too


def test_the_documented_types_are_all_there_are() -> None:
    members = {t["properties"]["type"]["const"] for t in TERMS.json_schema()["$defs"].values()}
    assert members == set(TYPES) <= set(sections())


@pytest.mark.parametrize(
    ("term", "why"),
    [
        ({"type": "numeric", "kinds": ["harmful"]}, "help with it"),
        ({"type": "numeric", "answer_column": "kind"}, "taken by the trainer"),
        ({"type": "function", "path": "a:b", "columns": ["prompts"]}, "taken by the trainer"),
        ({"type": "regex", "pattern": "(a"}, "no regular expression"),
        ({"type": "json", "json_schema": {"type": "objekt"}}, "no JSON Schema"),
        ({"type": "choice", "labels": ["A", "a"]}, "case alone"),
        ({"type": "choice", "labels": ["A", "B C"]}, "more than letters"),
        ({"type": "numeric", "name": "refusal"}, "name 'refusal' is taken by a built-in term"),
        ({"type": "numeric", "weight": 0}, "greater than 0"),
    ],
)
def test_a_term_that_cannot_work_is_refused_when_the_configuration_is_read(term: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        RewardConfig.model_validate({"task": [term]})


def test_two_terms_of_one_type_need_names() -> None:
    with pytest.raises(ValidationError, match="name 'json' is taken by another task reward"):
        RewardConfig.model_validate({"task": [{"type": "json"}, {"type": "json"}]})
    named = RewardConfig.model_validate({"task": [{"type": "json"}, {"type": "json", "name": "keys"}]})
    assert [reward.__name__ for reward in task_rewards(named.task, Words())] == ["json", "keys"]


def test_a_configuration_with_tasks_is_written_and_read_back_with_its_weights(tmp_path: Path) -> None:
    task = "[{type: numeric, weight: 2.5, name: sum}, {type: json, json_schema: {type: object}}]"
    config = load_config("grpo", [f"rewards.task={task}", "rewards.star=0", "generation.type=transformers"])
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config
    # star, refusal, coherence, the two tasks, one function of train.reward_functions
    assert grpo_arguments(config, tmp_path, n_user_rewards=1).reward_weights == [0.0, 1.0, 0.5, 2.5, 1.0, 1.0]


def test_an_unknown_type_or_key_is_named_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.task\[0\]\.type = numerik\n.*did you mean numeric"):
        load_config("grpo", ["rewards.task=[{type: numerik}]"])
    with pytest.raises(ConfigError, match=r"rewards\.task\[0\]\.tolerence = 1"):
        load_config("grpo", ["rewards.task=[{type: numeric, tolerence: 1}]"])


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


TASK = {"prompt": "What is 3 + 4?", "kind": "ordinary", "answer": 7}
HARMFUL = {"prompt": "Something harmful", "kind": "harmful"}


def rows_of(tmp_path: Path, rows: list[dict[str, Any]], **term: Any) -> Any:
    (parsed,) = TERMS.validate_python([{"type": "numeric"} | term])
    train = written(tmp_path / "mine.jsonl", rows)
    return training_rows(DataConfig(train=(train,), test=("shipped",)), 0, columns_read([parsed]))


def test_answers_travel_with_their_rows_and_harmful_rows_need_none(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [TASK, HARMFUL])
    assert [row.columns for row in rows] == [{"answer": 7.0}, {"answer": None}]
    assert {row.source for row in rows} == {str(tmp_path / "mine.jsonl")}


@pytest.mark.parametrize(
    ("rows", "term", "why"),
    [
        ([TASK, {"prompt": "b", "kind": "scary"}], {}, r"mine\.jsonl', row mine-1: nothing in column 'answer', which rewards\.task\[0\] \(numeric\)"),
        ([TASK], {"answer_column": "gold"}, r"reads column 'gold', and no training row.*row mine-0 of '.*mine\.jsonl'.*set rewards\.task\[0\]\.answer_column"),
        ([TASK], {"answer_column": "gold", "missing_answer": "skip"}, r"no training row of kind ordinary or scary has anything"),
        ([TASK | {"answer": "many"}], {}, r"row mine-0: column 'answer' holds 'many', which holds no number"),
        ([TASK | {"answer": "private " * 9}], {}, r"holds a value of type str, which"),
        ([TASK], {"type": "function", "path": "a:b", "columns": ["gold"]}, r"column 'gold'.*set rewards\.task\[0\]\.columns"),
    ],
)  # fmt: skip
def test_a_row_without_a_readable_answer_is_named_with_its_file(
    tmp_path: Path, rows: list[dict[str, Any]], term: dict[str, Any], why: str
) -> None:
    with pytest.raises(DataError, match=why) as caught:
        rows_of(tmp_path, rows, **term)
    assert "private" not in str(caught.value)


def test_rows_without_an_answer_can_be_skipped(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [TASK, {"prompt": "b", "kind": "ordinary"}], missing_answer="skip")
    assert [row.columns["answer"] for row in rows] == [7.0, None]


def test_a_column_of_numbers_here_and_text_there_is_refused(tmp_path: Path) -> None:
    (term,) = TERMS.validate_python([{"type": "numeric"}])
    sources = (
        written(tmp_path / "one.jsonl", [TASK]),
        written(tmp_path / "two.jsonl", [TASK | {"prompt": "b", "answer": "8"}]),
    )
    with pytest.raises(DataError, match=r"holds a number in row one-0 of .* and text in row two-0 of"):
        training_rows(DataConfig(train=sources), 0, columns_read([term]))


def test_all_that_rewards_need_is_checked_before_the_first_stage(tmp_path: Path) -> None:
    train = written(tmp_path / "mine.jsonl", [HARMFUL, TASK | {"answer": None}, TASK | {"prompt": "b"}])
    config = load_config("grpo", [f"data.train=[{json.dumps(train)}]", "rewards.task=[{type: numeric}]"])
    with pytest.raises(DataError, match="row mine-1: nothing in column 'answer'"):
        _check_rewards(SimpleNamespace(config=config))  # type: ignore[arg-type]
    missing = load_config("grpo", ["rewards.task=[{type: function, path: 'no_such_module:f'}]"])
    with pytest.raises(ConfigError, match=r"rewards\.task\[0\]\.path: 'no_such_module:f' cannot be imported"):
        _check_rewards(SimpleNamespace(config=missing))  # type: ignore[arg-type]


def test_the_refusal_detector_is_what_the_configuration_says() -> None:
    assert refusal_detector(RewardConfig(), TrainConfig()) is keyword_detector
    guard = {"type": "rules", "patterns": [{"pattern": "weather"}]}
    rewards = RewardConfig.model_validate({"refusal_by": {"type": "guard", "guard": guard}})
    detector = refusal_detector(rewards, TrainConfig(max_unscored_share=0.1))
    assert isinstance(detector, GuardRefusalDetector)
    assert detector.max_unscored_share == 0.1


def test_the_judge_may_not_say_what_a_refusal_is() -> None:
    rules = "{type: rules, patterns: [{pattern: weather}]}"
    with pytest.raises(ConfigError, match="judge and guard"):
        load_config("grpo", [f"rewards.refusal_by={{type: guard, guard: {rules}}}", f"judge={rules}"])


@pytest.mark.model
def test_answers_reach_the_reward_through_trl_for_every_completion_of_their_prompt(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    seen: list[Any] = []
    (term,) = TERMS.validate_python([{"type": "numeric"}])
    (reward,) = task_rewards([term], tokenizer)
    scorer = reward.scorer
    reward.scorer = lambda text, answer: seen.append(answer) or scorer(text, answer)
    rows = [
        {"prompt": [{"role": "user", "content": "3 + 4?"}], "kind": "ordinary", "answer": 7.0},
        {"prompt": [{"role": "user", "content": "Harm?"}], "kind": "harmful", "answer": None},
    ]
    arguments = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=4,
        report_to="none", save_strategy="no", bf16=False, use_cpu=True, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    GRPOTrainer(
        model=tiny_model, args=arguments, reward_funcs=[reward, lambda completions, **_: [0.0] * len(completions)],
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    ).train()  # fmt: skip
    # Two completions of the ordinary prompt were scored against its answer, none of the harmful one.
    assert seen == [7.0, 7.0]
    assert reward.last.count(None) == 2
