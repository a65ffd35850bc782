"""RUN_OR_MODEL: which weights, under which contract, with whose settings."""

import json
import shutil
import typing

import pytest

from ballast.errors import ConfigError, ModelError
from ballast.pipeline.config_loading import dump_config, load_config
from ballast.pipeline.model_record import write_record
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.serving import model_server
from ballast.pipeline.serving.model_server import ServerOptions
from ballast.pipeline.serving.target import open_target

pytestmark = pytest.mark.model


@pytest.fixture
def run(tmp_path, embedded_folder, tokenizer):
    """A finished run: an aligned and a tuned model, and the adapter between them; weights are a few bytes."""
    folder = tmp_path / "one"
    for stage in ("align", "train"):
        model = folder / stage / "model"
        tokenizer.save_pretrained(model)
        shutil.copy(embedded_folder / "config.json", model)
        (model / "model.safetensors").write_bytes(stage.encode())
        write_record(model, PromptFormat(tokenizer, None))
    adapter = folder / "train" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 8, "rank_pattern": {"q_proj": 16}}))
    configure(folder)
    return folder


def configure(run, *overrides):
    config = load_config("demo", [f"out={json.dumps(str(run.parent))}", "name=one", *overrides])
    (run / "config.yaml").write_text(dump_config(config))


def test_a_run_serves_what_it_made_last_with_its_own_guard(run):
    target = open_target(str(run), ["serve.port=9000"])
    assert (target.name, target.model, target.adapter) == ("one", run / "train" / "model", None)
    assert target.settings.port == 9000
    assert target.guard.type == "embedded"
    shutil.copytree(run / "train" / "model", run / "restore" / "model")
    assert open_target(str(run)).model == run / "restore" / "model"


def test_an_adapter_is_served_over_what_it_was_trained_on_with_its_largest_rank(run):
    target = open_target(str(run), adapter=True)
    assert (target.model, target.adapter) == (run / "align" / "model", run / "train" / "adapter")
    assert target.lora_rank == 16


def test_weights_under_an_adapter_that_changed_after_training_are_refused(run):
    (run / "align" / "model" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ModelError, match=r"model\.safetensors changed after training"):
        open_target(str(run), adapter=True)


@pytest.mark.parametrize(("rank", "taken"), [(1, "1"), (2, "8"), (16, "16"), (24, "32"), (500, "512")])
def test_an_adapter_of_any_rank_is_served_under_a_rank_that_vllm_takes(rank, taken):
    words = ServerOptions("model", "name", adapter="adapter", lora_rank=rank).arguments(8000)
    assert words[words.index("--max-lora-rank") + 1] == taken


def test_an_adapter_beyond_vllms_largest_rank_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"rank 513.*merged weights"):
        ServerOptions("model", "name", adapter="adapter", lora_rank=513).arguments(8000)


@pytest.mark.vllm
def test_the_ranks_are_those_of_vllm():
    lora = pytest.importorskip("vllm.config.lora")
    assert typing.get_args(lora.MaxLoRARanks) == model_server._LORA_RANKS


def test_a_model_given_as_the_present_folder_is_named_after_it(run, monkeypatch):
    monkeypatch.chdir(run / "train" / "model")
    assert open_target(".").name == "model"


def test_a_run_whose_configuration_has_another_system_prompt_is_refused(run):
    configure(run, "prompting.system_prompt=Be kind.")
    with pytest.raises(ModelError, match=r"system_prompt: none in the contract, 'Be kind\.' here"):
        open_target(str(run))


def test_under_ptst_the_serving_prompt_may_be_chosen_after_training(run):
    configure(run, "prompting.policy=ptst", "prompting.serving_system_prompt=Be safe.")
    prompt_format = open_target(str(run)).prompt_format
    assert prompt_format.contract().served_system_prompt == "Be safe."
    # The training's own is still compared.
    configure(
        run, "prompting.policy=ptst", "prompting.serving_system_prompt=Be safe.", "prompting.system_prompt=Be kind."
    )
    with pytest.raises(ModelError, match="system_prompt: none in the contract"):
        open_target(str(run))


def test_a_run_without_a_model_says_how_to_finish_it(run):
    shutil.rmtree(run / "train")
    shutil.rmtree(run / "align")
    with pytest.raises(ModelError, match="holds no trained model yet"):
        open_target(str(run))


def test_a_model_folder_is_served_under_its_own_contract_and_names_no_guard(run):
    target = open_target(str(run / "train" / "model"), ["serve.guarding.threshold=0.3"])
    assert (target.name, target.guard, target.settings.guarding.threshold) == ("model", None, 0.3)
