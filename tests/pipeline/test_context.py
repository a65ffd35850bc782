"""What the stages of a run share: where its parts come from, and what is refused before a stage is paid for."""

import io
import json

import pytest
from rich.console import Console

from ballast.errors import ModelError
from ballast.pipeline import context as module
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext


@pytest.fixture
def built(tmp_path):
    def build(*overrides):
        config = load_config("demo", [f"out={json.dumps(str(tmp_path))}", "name=one", *overrides])
        return RunContext(config, Console(file=io.StringIO(), width=200))

    return build


def test_the_revision_is_resolved_once_and_every_part_reads_that_folder(built, monkeypatch):
    asked, loaded = [], []
    monkeypatch.setattr(module, "resolve_model", lambda *name: asked.append(name) or "snapshots/abc")
    monkeypatch.setattr(module, "VLLMEngine", lambda model, *options: loaded.append(model))
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
