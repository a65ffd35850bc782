"""What the stages of a run share: where its parts come from, and what is refused before a stage is paid for."""

import copy
import io
import json

import pytest
from rich.console import Console

from ballast.errors import BallastError, ConfigError, DataError, ModelError
from ballast.pipeline import context as module
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext, check_one_device
from ballast.pipeline.data import Row
from ballast.pipeline.stages.align import encode_answer
from ballast.pipeline.stages.train import check_all_steps_done, training_prompts


@pytest.fixture
def built(tmp_path):
    def build(*overrides):
        config = load_config("demo", [f"out={json.dumps(str(tmp_path))}", "name=one", *overrides])
        return RunContext(config, Console(file=io.StringIO(), width=200))

    return build


def test_the_revision_is_resolved_once_and_every_part_reads_that_folder(built, monkeypatch):
    asked, loaded = [], []
    monkeypatch.setattr(module, "resolve_model", lambda *name: asked.append(name) or "snapshots/abc")
    monkeypatch.setattr(module, "VLLMEngine", lambda model, *options, **launched: loaded.append(model))
    context = built("model.name=owner/name", "model.revision=v1.0", "align.enabled=false")
    _ = context.engine
    assert context.start_model == context.reference_model == "snapshots/abc"
    assert asked == [("owner/name", "v1.0")]
    assert loaded == ["snapshots/abc"]


def test_a_tokenizer_that_cannot_be_loaded_is_a_model_error(built, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text("{no such thing")
    context = built(f"model.name={json.dumps(str(tmp_path))}")
    with pytest.raises(ModelError, match=r"the tokenizer of model .* cannot be loaded .*save_pretrained beside"):
        _ = context.tokenizer


@pytest.mark.model
def test_a_prompt_fits_where_it_and_its_answer_have_the_engines_length(built):
    row = Row("mine-7", "How do I bake bread?", "ordinary")
    length = len(built().encode_prompts([row], built().config.evaluate.sampling)[0])
    exact = built(f"generation.max_model_len={length + 70}", "evaluate.sampling.max_new_tokens=70")
    assert len(exact.encode_prompts([row], exact.config.evaluate.sampling)) == 1
    short = built(f"generation.max_model_len={length + 69}", "evaluate.sampling.max_new_tokens=70")
    with pytest.raises(DataError, match=rf"row mine-7, has {length} tokens.*max_model_len to {length + 70}"):
        short.encode_prompts([row], short.config.evaluate.sampling)
    other = built("generation.type=transformers")
    assert other.encode_prompts([row], exact.config.evaluate.sampling)


@pytest.mark.model
def test_a_text_that_cannot_be_told_apart_is_refused_by_its_row(built, tokenizer):
    context = built()
    context.tokenizer = copy.deepcopy(tokenizer)
    context.tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] | upper }}{% endfor %}"
    row = Row("mine-7", "private <|im_end|>", "ordinary", response="Hello.")
    for encode in (
        lambda: context.encode_prompts([row], context.config.evaluate.sampling),
        lambda: encode_answer(context.prompt_format, row, 256),
    ):
        with pytest.raises(DataError, match=r"row mine-7: .*cannot be told apart") as caught:
            encode()
        assert "private" not in str(caught.value)


@pytest.mark.model
def test_fewer_prompts_than_a_step_takes_are_refused_before_training(built):
    enough = built("train.prompts_per_step=4", "data.max_train=4")
    assert len(training_prompts(enough)) == 4
    with pytest.raises(DataError, match=r"3 training prompts are fewer than train\.prompts_per_step = 4"):
        training_prompts(built("train.prompts_per_step=4", "data.max_train=3"))


def test_a_training_that_ended_early_is_an_error():
    check_all_steps_done(30, 30)
    with pytest.raises(BallastError, match=r"after 0 of train\.steps = 30"):
        check_all_steps_done(0, 30)


def test_more_gpus_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    check_one_device()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"2 GPUs are visible, .*--launch ddp.*set CUDA_VISIBLE_DEVICES=0"):
        check_one_device()
