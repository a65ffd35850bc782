"""A trained model folder is checked against its own record before it is used."""

import json
from types import SimpleNamespace

import pytest

from ballast.errors import ModelError
from ballast.pipeline.model_record import check_record, write_contract, write_record
from ballast.pipeline.stages import evaluate
from ballast.pipeline.template_contract import TemplateContract


def prompt_format(system_prompt=None, template="abc"):
    """A prompt format that is nothing but its contract."""
    contract = TemplateContract(
        chat_template=template,
        special_tokens={"<end>": 2},
        stop_tokens={"<end>": 2},
        generation_prompt="",
        default_system_prompt=None,
        system_prompt=system_prompt,
        probes={},
        policy="consistent",
        serving_system_prompt=system_prompt,
        serving_probes={},
    )
    return SimpleNamespace(contract=lambda: contract, decode=str)


@pytest.fixture
def folder(tmp_path):
    for number in (1, 2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(number))
    write_record(tmp_path, prompt_format())
    return tmp_path


def test_a_folder_that_matches_its_record_passes_and_one_without_is_taken_as_it_is(folder, tmp_path):
    check_record(folder, prompt_format())
    (folder / "prompt_format.json").unlink()
    check_record(folder, prompt_format("other", "abd"))


def test_changed_added_and_missing_weights_are_named(folder):
    (folder / "model-2.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match=r"model-2\.safetensors changed after training"):
        check_record(folder, prompt_format())
    (folder / "model-2.safetensors").unlink()
    (folder / "model-3.safetensors").write_bytes(b"new")
    with pytest.raises(ModelError, match=r"model-2\.safetensors, model-3\.safetensors changed"):
        check_record(folder, prompt_format())


def test_another_prompt_format_is_refused_with_its_difference_and_remedy(folder):
    with pytest.raises(
        ModelError, match=r"system_prompt: none in the contract, 'kind' here.*\n.*Put prompting\.system_prompt"
    ):
        check_record(folder, prompt_format("kind"))
    with pytest.raises(
        ModelError, match=r"chat_template differs at character 3 .*: U\+0063 in the contract, U\+0064 here"
    ):
        check_record(folder, prompt_format(None, "abd"))


def test_a_folder_without_weights_has_its_contract_alone(tmp_path):
    write_contract(tmp_path, prompt_format())
    (tmp_path / "adapter.safetensors").write_bytes(b"written later")
    check_record(tmp_path, prompt_format())
    with pytest.raises(ModelError, match="chat_template differs"):
        check_record(tmp_path, prompt_format(None, "abd"))


@pytest.mark.parametrize("content", ["{no json", "[]", json.dumps({"fingerprint": "abc", "system_prompt": None})])
def test_a_record_that_cannot_be_read_is_refused(folder, content):
    (folder / "prompt_format.json").write_text(content)
    with pytest.raises(ModelError, match="is no record of a model"):
        check_record(folder, prompt_format())


def test_both_models_are_checked_before_the_first_is_measured(tmp_path, monkeypatch):
    for stage in ("align", "train"):
        model = tmp_path / stage / "model"
        model.mkdir(parents=True)
        (model / "model.safetensors").write_bytes(b"weights")
        write_record(model, prompt_format())
    (tmp_path / "train" / "model" / "model.safetensors").write_bytes(b"others")
    measured = []
    monkeypatch.setattr(evaluate, "measure_model", lambda *values: measured.append(values))
    context = SimpleNamespace(
        config=SimpleNamespace(align=SimpleNamespace(enabled=True)),
        folder=SimpleNamespace(stage=lambda name: tmp_path / name),
        prompt_format=prompt_format(),
    )
    with pytest.raises(ModelError, match="changed after training"):
        evaluate.run_stage(context, tmp_path)
    assert measured == []
