"""The template contract: one changed character is refused, and shown, wherever a conversation is encoded anew."""

import copy
import json
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from ballast.errors import ConfigError, ModelError
from ballast.pipeline.checkpoints.resumable import ResumableTraining
from ballast.pipeline.config_inputs import PromptingConfig
from ballast.pipeline.model_record import check_record, hold_contract, read_contract, write_contract, write_record
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.serving.contract import check_served, served_format
from ballast.pipeline.template_contract import TemplateContract, differences, text_difference

pytestmark = pytest.mark.model

SYSTEM = "Be kind and brief."


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A model folder of a training with a system prompt; its weights are a few bytes."""
    made = tmp_path / "model"
    tokenizer.save_pretrained(made)
    (made / "model.safetensors").write_bytes(b"weights")
    write_record(made, PromptFormat(tokenizer, SYSTEM))
    return made


def edited(folder, name, old, new):
    path = folder / name
    text = path.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        served_format(folder)
    return str(caught.value)


def test_a_folder_that_nobody_touched_is_served_in_its_format(folder):
    assert served_format(folder).serving().system_prompt == SYSTEM


def test_one_character_of_the_template_is_refused_and_shown(folder):
    edited(folder, "chat_template.jinja", "<|im_start|>assistant", "<|im_start|>assistent")
    told = refusal(folder)
    assert "chat_template differs at character" in told
    assert "U+0061 in the contract, U+0065 here" in told  # a, e
    lines = told.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("    contract  "))
    mark = lines[at + 2].index("^")
    assert (lines[at][mark], lines[at + 1][mark]) == ("a", "e")
    assert lines[at + 2].count("^") == 1


def test_a_letter_that_looks_the_same_is_told_by_its_code_point(folder):
    edited(folder, "chat_template.jinja", "assistant", "аssistant")  # a Cyrillic letter
    assert "U+0061 in the contract, U+0430 here" in refusal(folder)


def test_a_template_that_differs_where_no_id_does_is_refused_too(folder):
    # What the probes do not reach may matter to another conversation.
    edited(folder, "chat_template.jinja", "{% if add_generation_prompt %}", "{# #}{% if add_generation_prompt %}")
    assert "chat_template differs" in refusal(folder)


def test_one_character_of_the_recorded_system_prompt_is_refused_and_shown(folder):
    edited(folder, "prompt_format.json", f'"system_prompt": "{SYSTEM}"', '"system_prompt": "Be kind end brief."')
    told = refusal(folder)
    # The ids of the probes still say what it was.
    assert "Be kind and brief." in told
    assert "Be kind end brief." in told
    assert "U+0061 in the contract, U+0065 here" in told


def test_one_character_of_the_present_system_prompt_is_refused_and_shown(folder, tokenizer):
    with pytest.raises(
        ModelError, match=r"system_prompt differs at character 9 .*U\+0061 in the contract, U\+0065 here"
    ):
        check_record(folder, PromptFormat(tokenizer, "Be kind end brief."))


def test_one_character_of_a_special_token_is_refused_and_shown(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text(encoding="utf-8").replace("<|im_end|>", "<|im_end!>"), encoding="utf-8")
    told = refusal(folder)
    assert "special_tokens, id 2, differs at character 9" in told
    assert "U+007C in the contract, U+0021 here" in told


def test_another_stop_token_is_refused(folder):
    edited(folder, "tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')
    assert "stop_tokens" in refusal(folder)


def test_a_stop_token_of_the_generation_config_counts(folder, tokenizer):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert "stop_tokens: '<|endoftext|>' (id 0) is here and not in the contract" in refusal(folder)


def test_an_edited_fingerprint_is_refused(folder):
    record = json.loads((folder / "prompt_format.json").read_text())
    edited(folder, "prompt_format.json", record["fingerprint"], "0" * 64)
    assert "was edited" in refusal(folder)


def test_a_folder_without_a_contract_is_refused_with_two_remedies(folder):
    (folder / "prompt_format.json").unlink()
    told = refusal(folder)
    assert "has no template contract" in told
    assert "--adopt-template" in told
    assert served_format(folder, adopt=True, system_prompt="Be calm.").system_prompt == "Be calm."


def test_a_contract_is_not_overridden_by_an_option(folder):
    with pytest.raises(ModelError, match="leave --system-prompt out"):
        served_format(folder, system_prompt="Be calm.")


def test_the_contract_survives_its_file(folder, tokenizer):
    ours = PromptFormat(tokenizer, SYSTEM).contract()
    read = read_contract(folder)
    assert read.fingerprint() == ours.fingerprint()
    assert differences(ours, read) == []
    assert read == TemplateContract.from_json(json.loads(json.dumps(ours.to_json())))


def test_the_templates_own_system_prompt_is_named(tokenizer):
    contract = PromptFormat(tokenizer).contract()
    assert contract.default_system_prompt == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert contract.generation_prompt == "<|im_start|>assistant\n"
    # Made explicit, it gives the ids that the template's own injection gives.
    spelled = PromptFormat(tokenizer, contract.default_system_prompt).contract()
    assert spelled.probes == contract.probes


def test_a_template_without_a_default_has_none(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    assert PromptFormat(plain).contract().default_system_prompt is None


def test_a_template_that_writes_the_date_has_one_contract_on_all_days(tokenizer, monkeypatch):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%d %B %Y %H:%M:%S.%f') }}" + tokenizer.chat_template
    assert PromptFormat(dated).contract() == PromptFormat(dated).contract()
    assert PromptFormat(dated).encode([{"role": "user", "content": "a"}]) != PromptFormat(dated).encode(
        [{"role": "user", "content": "a"}]
    )  # the microseconds have moved on


# --- the policies


def test_ptst_trains_without_and_serves_with_the_safety_prompt(tokenizer, tmp_path):
    trained = PromptFormat(tokenizer, None, "ptst", "Be safe.")
    assert trained.messages("Hello")[0]["role"] == "user"
    assert trained.serving().messages("Hello")[0] == {"role": "system", "content": "Be safe."}
    write_contract(tmp_path, trained)
    assert read_contract(tmp_path).served_system_prompt == "Be safe."
    # What is served is no part of the training: it may still be chosen.
    check_record(tmp_path, PromptFormat(tokenizer, None))
    with pytest.raises(ModelError, match="policy differs"):
        check_record(tmp_path, PromptFormat(tokenizer, None), serving=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"system_prompt": "a", "serving_system_prompt": "b"}, "policy = consistent"),
        ({"policy": "ptst"}, "is not set"),
        ({"policy": "ptst", "system_prompt": "a", "serving_system_prompt": "a"}, "is that of training"),
    ],
)
def test_system_prompts_that_do_not_fit_the_policy_are_refused(settings, said, tokenizer):
    with pytest.raises(ValidationError, match=said):
        PromptingConfig(**settings)
    with pytest.raises(ConfigError, match=said):
        PromptFormat(tokenizer, **settings)


# --- stages and checkpoints


def test_a_stage_refuses_the_contract_of_another_one_and_of_the_process_before_it(tmp_path, tokenizer):
    earlier, scratch = tmp_path / "align", tmp_path / "train.partial"
    earlier.mkdir()
    scratch.mkdir()
    hold_contract(earlier, [], PromptFormat(tokenizer, SYSTEM))
    hold_contract(scratch, [earlier], PromptFormat(tokenizer, SYSTEM))
    hold_contract(scratch, [earlier], PromptFormat(tokenizer, SYSTEM))  # gone on with
    changed = PromptFormat(tokenizer, SYSTEM.replace("kind", "kin"))
    with pytest.raises(ModelError, match=r"align' was made under another prompt format"):
        hold_contract(scratch, [earlier], changed)
    with pytest.raises(ModelError, match=r"train\.partial' was made under another prompt format"):
        hold_contract(scratch, [], changed)


def test_a_checkpoint_holds_the_contract_and_is_not_gone_on_from_under_another(tmp_path, tokenizer, monkeypatch):
    def write(trainer, folder):
        (folder / "weights").write_text("weights")

    monkeypatch.setattr("ballast.pipeline.checkpoints.training_state.write_training", write)

    def training(system_prompt):
        return ResumableTraining(SimpleNamespace(prompt_format=PromptFormat(tokenizer, system_prompt)), tmp_path)

    saved = training(SYSTEM).store.save(None, 3)
    assert read_contract(saved.path).system_prompt == SYSTEM
    assert training(SYSTEM).step == 3
    with pytest.raises(ModelError, match=r"(?s)step-00000003' was made under another.*system_prompt differs"):
        training("Be kind and brief!")


# --- what a server reports


def test_a_server_that_tokenises_as_the_contract_says_passes(tokenizer):
    prompt_format = PromptFormat(tokenizer, SYSTEM)
    assert check_served(prompt_format, prompt_format.encode_exactly) is False


def test_a_server_that_reads_special_tokens_in_text_is_found_out(tokenizer):
    # Such text must be kept from it; ordinary conversations are the same.
    prompt_format = PromptFormat(tokenizer, SYSTEM)
    assert check_served(prompt_format, prompt_format.encode_naively) is True


def test_a_server_with_another_template_is_refused_with_the_difference(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>assistant ")
    with pytest.raises(ModelError, match=r"U\+000A in the contract, U\+0020 here") as caught:
        check_served(PromptFormat(tokenizer), PromptFormat(other).encode_exactly)
    assert "assistant\\n" in str(caught.value)


def test_a_server_that_adds_a_token_is_refused(tokenizer):
    prompt_format = PromptFormat(tokenizer)
    with pytest.raises(ModelError, match="does not tokenise as the contract says"):
        check_served(prompt_format, lambda messages: [1, *prompt_format.encode_naively(messages)])


# --- how differences look


@pytest.mark.parametrize(
    ("contract", "found", "lines"),
    [
        ("abc", "abd", ["contract  abc", "here      abd", "            ^"]),  # under the third letter
        ("ab", "abc", ["contract  ab", "here      abc", "            ^"]),
        ("a\nb", "a b", ["contract  a\\nb", "here      a b", "           ^^"]),  # as wide as \n is shown
        ("aa", "a", ["contract  aa", "here      a", "           ^"]),
    ],
)
def test_a_difference_is_marked_below_the_characters(contract, found, lines):
    assert [line.removeprefix("    ") for line in text_difference("text", contract, found).splitlines()[1:]] == lines


def test_a_long_text_is_shown_around_its_difference_only():
    told = text_difference("text", "x" * 500 + "a" + "y" * 500, "x" * 500 + "b" + "y" * 500)
    assert "differs at character 501" in told
    assert max(map(len, told.splitlines())) < 120
