"""Shared fixtures: the embedded tokenizer, tiny models, one vLLM engine for all tests that need it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, a file stays in one, and so do all tests that need the one vLLM engine."""
    for item in items:
        needs_engine = "vllm_engine" in getattr(item, "fixturenames", ()) or item.get_closest_marker("vllm")
        item.add_marker(pytest.mark.xdist_group("vllm" if needs_engine else str(item.path)))


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The embedded model's folder, converted on first use."""
    from ballast.models import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def tokenizer(embedded_folder: Path) -> Any:
    """The embedded model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_folder)


@pytest.fixture
def tiny_model(tokenizer: Any) -> Any:
    """A random Llama of 2 layers with the embedded model's vocabulary, fp32."""
    return random_llama(len(tokenizer))


def random_llama(vocabulary: int, tied: bool = True) -> Any:
    """A random Llama of 2 layers, fp32; with tied embeddings its likeliest token is the last one again."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


class SmallDisk:
    """A disk of 1 MB of memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Leave so many bytes free, in whole pages."""
        with suppress(OSError), self._ballast.open("wb", buffering=0) as handle:
            while True:
                handle.write(bytes(4096))
        os.truncate(self._ballast, self._ballast.stat().st_size // 4096 * 4096 - leave)

    def make_room(self) -> None:
        self._ballast.unlink()

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(self.path)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """One that can be filled and made read-only; tests with it are skipped where nothing may be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if mount is None or subprocess.run([mount, *options], capture_output=True, check=False).returncode != 0:
        pytest.skip("no disk can be mounted here")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="session")
def vllm_engine(embedded_folder: Path) -> Iterator[Any]:
    """One vLLM engine with the embedded model. A test that loads other weights puts the first ones back."""
    from ballast.pipeline.config_inputs import VLLMGeneration
    from ballast.pipeline.vllm_engine import VLLMEngine

    engine = VLLMEngine(str(embedded_folder), VLLMGeneration(max_model_len=512))
    yield engine
    engine.close()
