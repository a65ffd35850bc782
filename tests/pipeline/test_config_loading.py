"""Files and overrides become a run's configuration, or one screen that says what to change."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ballast.errors import ConfigError
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_inputs import TransformersGeneration, VLLMGeneration
from ballast.pipeline.config_loading import config_hash, dump_config, load_config, shipped_configs

SMALLEST = {"name": "tiny", "model": {"name": "some/model"}, "guard": {"type": "embedded"}, "judge": {"type": "ngram"}}


@pytest.fixture
def write(tmp_path):
    """Write the smallest configuration, with sections replaced or added, and return its path."""

    def write_file(**sections: object) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(SMALLEST | sections))
        return path

    return write_file


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_the_smallest_file_takes_every_default(write):
    config = load_config(write(), [])
    assert (config.train.steps, config.data.train, config.out) == (30, ("shipped",), "runs")
    assert isinstance(config.generation, VLLMGeneration)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("train.learning_rate=2e-4", "train.learning_rate", 2e-4),  # YAML 1.1 alone reads this as text
        ("align.enabled=false", "align.enabled", False),
        ("data.max_train=null", "data.max_train", None),
        ("data.train=prompts.jsonl", "data.train", ("prompts.jsonl",)),
        ("data.train=[a.jsonl, b.jsonl]", "data.train", ("a.jsonl", "b.jsonl")),
        ("prompting.system_prompt=You are: kind #1", "prompting.system_prompt", "You are: kind #1"),
        ("prompting.system_prompt=*help", "prompting.system_prompt", "*help"),
        ("prompting.system_prompt='42'", "prompting.system_prompt", "42"),
        ("out=a=b", "out", "a=b"),
        ("name=2026-01-02", "name", "2026-01-02"),
        ("train.lora={r: 4, alpha: 8}", "train.lora.r", 4),
    ],
)
def test_an_override_is_read_as_a_person_means_it(write, override, key, value):
    found = load_config(write(), [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_override_writes_into_a_section_that_the_file_lacks_or_leaves_empty(write):
    assert load_config(write(), ["train.lora.r=4"]).train.lora.r == 4
    assert load_config(write(train=None), ["train.lora.r=4"]).train.lora.r == 4


def test_a_component_without_type_in_the_file_keeps_its_default_type(write):
    config = load_config(write(), ["generation.max_model_len=333"])
    assert config.generation == VLLMGeneration(max_model_len=333)


@pytest.mark.parametrize("order", [1, -1])
def test_a_type_changed_by_override_starts_its_component_afresh_in_any_order(write, order):
    path = write(generation={"type": "vllm", "max_num_seqs": 3})
    overrides = ["generation.type=transformers", "generation.batch_size=5"][::order]
    assert load_config(path, overrides).generation == TransformersGeneration(batch_size=5)


def test_a_type_repeated_by_override_keeps_what_the_file_says(write):
    path = write(generation={"type": "vllm", "max_num_seqs": 3})
    assert load_config(path, ["generation.type=vllm"]).generation == VLLMGeneration(max_num_seqs=3)


def test_all_problems_stand_on_one_screen_with_key_value_reason_and_remedy(write):
    path = write(train={"stepps": 30, "group_size": 1}, guard={"type": "embeded"})
    message = refused(path, "evaluate.samples=none")
    assert "4 problems" in message
    assert "train.stepps = 30\n  there is no such key; did you mean train.steps?" in message
    assert "train.group_size = 1\n  must be at least 2" in message
    assert "guard.type = embeded" in message
    assert "did you mean embedded?" in message
    assert "evaluate.samples (override) = none\n  must be a whole number" in message
    assert len(message.splitlines()) <= 20


def test_the_validation_library_never_speaks_to_the_user(write):
    path = write(
        train={"loss_type": "dapp", "lora": {"target_modules": 3}}, data={"train": []}, shaping=None, seed=-1, model={}
    )
    message = refused(path, "generation.type=openai", "judge=null", "rewards.refusal=0")
    for foreign in ("pydantic", "Input should", "validation error", "Value error", "type=", "tuple["):
        assert foreign not in message
    assert "did you mean dapo?" in message


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(write):
    message = refused(write(), "train.temperature=0.5")
    assert "train.sampling.temperature" in message


def test_a_missing_component_names_what_there_is_to_choose_from(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x")
    message = refused(path)
    assert "model\n  missing, and it has no default; add it: model.name" in message
    assert re.search(r"guard\.type, one of .*\bembedded, .*\bngram, ", message)


def test_a_component_given_as_a_word_is_told_about_its_type(write):
    assert "write guard.type=ngram" in refused(write(), "guard=ngram")


def test_a_rule_across_keys_keeps_its_own_words(write):
    message = refused(write(), "judge.type=embedded")
    assert "a policy learns to please its guard" in message


PROMPTED = {"type": "prompted", "model": "their/guard"}
PLUGIN = {"type": "plugin", "name": "theirs"}
RULES = {"type": "rules", "patterns": [{"pattern": "bomb"}]}


@pytest.mark.parametrize(
    ("guard", "option"),
    [
        ({"type": "embedded"}, {"batch_size": 3}),
        (PROMPTED, {"verdict_prefix": " "}),
        (PLUGIN, {"options": {"a": 1}}),
        (RULES, {"base_risk": 0.2}),
    ],
    ids=lambda value: value.get("type"),
)
def test_a_guard_with_other_options_is_no_other_judge(write, guard, option):
    assert "judge and guard are the same" in refused(write(guard=guard, judge=guard | option))


@pytest.mark.parametrize(
    ("guard", "other"),
    [
        (PROMPTED, {"model": "another/guard"}),
        (PLUGIN, {"name": "another"}),
        (RULES, {"patterns": [{"pattern": "gun"}]}),
    ],
    ids=lambda value: value.get("type"),
)
def test_two_guards_of_one_type_may_judge_each_other_where_what_decides_differs(write, guard, other):
    assert load_config(write(guard=guard, judge=guard | other)).judge.type == guard["type"]


def test_greedy_completions_cannot_be_trained_on_and_can_be_measured(write):
    assert "train.sampling.temperature = 0" in refused(write(), "train.sampling.temperature=0")
    assert load_config(write(), ["evaluate.sampling.temperature=0"]).evaluate.sampling.temperature == 0


@pytest.mark.parametrize("value", [".inf", ".nan"])
@pytest.mark.parametrize("key", ["safegrad.rho", "train.learning_rate", "rewards.star"])
def test_a_number_that_is_not_finite_is_refused(write, key, value):
    assert "finite number" in refused(write(), f"{key}={value}")


def test_a_run_without_any_reward_is_refused(write):
    nothing = ("rewards={star: 0, refusal: 0, coherence: 0}", "shaping.drop.weight=0")
    assert "every advantage would be 0" in refused(write(), *nothing)
    # Each of these is something to learn.
    for something in ("rewards.coherence=0.1", "shaping.drop.weight=0.1", "train.reward_functions=[m:f]"):
        load_config(write(), [*nothing, something])


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-rf", "_", "a/b", ""])
def test_a_name_that_could_leave_or_hide_its_folder_is_refused(write, name):
    assert "name" in refused(write(name=name))


def test_an_override_below_a_plain_value_is_refused(write):
    assert "'name' is the value 'tiny', not a section" in refused(write(), "name.first=x")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3"])
def test_an_override_that_is_no_assignment_shows_how_to_write_one(write, override):
    assert "write it like train.steps=10" in refused(write(), override)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "is a list, not a mapping"),
        ("name: a\nmodel: b: c\n", "is not YAML in line 2"),
        ("name: a\nname: b\n", "line 2, column 1: the key 'name' is written twice"),
        ("name: !!python/name:os.system\n", "is not YAML in line 1"),
    ],
)
def test_a_file_that_is_no_configuration_says_so_with_its_line(tmp_path, text, fact):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert fact in refused(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert "is not UTF-8 text" in refused(path)


def test_a_missing_file_names_the_shipped_ones(tmp_path):
    message = refused(tmp_path / "absent.yaml")
    assert "there is no such file" in message
    assert "demo" in message


def test_a_folder_is_no_configuration(tmp_path):
    assert "is a folder" in refused(tmp_path)


def test_shipped_configs_are_found_by_bare_name():
    assert {"demo", "grpo"} <= set(shipped_configs())
    assert load_config("demo", []).name == "demo"


def test_what_is_dumped_reads_back_as_the_same_configuration(write, tmp_path):
    config = load_config(write(), ["prompting.system_prompt=Ja: 'ö'\t#", "train.learning_rate=1e-7"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy, []) == config


def test_the_hash_depends_on_values_and_not_on_how_they_were_written(write):
    plain = config_hash(load_config(write(), []))
    assert config_hash(load_config(write(train={"steps": 30}), [])) == plain  # 30 is the default
    assert config_hash(load_config(write(), ["train.steps=31"])) != plain
    assert config_hash(RunConfig.model_validate(dict(reversed(SMALLEST.items())))) == plain
    plugin = "guard={type: plugin, name: theirs, options: %s}"
    first, second = (load_config(write(), [plugin % options]) for options in ("{a: 1, b: 2}", "{b: 2, a: 1}"))
    assert config_hash(first) == config_hash(second)


def test_loading_a_configuration_needs_no_torch():
    code = (
        "import sys; from ballast.pipeline.config_loading import load_config; load_config('demo', []);"
        "print([m for m in ('torch', 'transformers', 'trl', 'vllm', 'scipy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
