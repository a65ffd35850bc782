"""What the engine promises about new weights, on a stand-in for vLLM."""

from types import SimpleNamespace
from typing import Any

import pytest

from ballast.errors import EngineError
from ballast.pipeline import vllm_engine
from ballast.pipeline.vllm_engine import VLLMEngine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine whose vLLM takes any weights, and drops its cached prefixes where `drops` says so."""
    monkeypatch.setattr(vllm_engine, "_repack_tied_head", lambda model: None)
    engine: Any = VLLMEngine.__new__(VLLMEngine)
    engine.model, engine.weights_version, engine.drops = "model", 0, True
    runner = SimpleNamespace(reload_weights=lambda weights_iterator: list(weights_iterator), get_model=lambda: None)
    worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
    engine.llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_executor=worker), reset_prefix_cache=lambda: engine.drops
    )
    return engine


def test_new_weights_count_once_the_cached_prefixes_are_gone(engine: Any) -> None:
    engine.load_weights([])
    assert engine.weights_version == 1


def test_cached_prefixes_that_stay_are_an_error(engine: Any) -> None:
    engine.drops = False
    with pytest.raises(EngineError, match="kept cached prefixes"):
        engine.load_weights([])
    assert engine.weights_version == 0
