"""On the command line only Ballast speaks, unless it is asked otherwise; errors are always shown."""

import io
import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console

from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.quiet import VERBOSE, quiet_libraries

# What a run does with the libraries, in small: bars of saving, loading and mapping, advice, a warning, an error.
CHATTY = """
import os, sys, warnings
from ballast.pipeline.quiet import quiet_libraries
quiet_libraries()
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as chatter
import datasets
folder = sys.argv[1]
shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
LlamaForCausalLM.from_pretrained(folder)
datasets.Dataset.from_list([{"a": 1}] * 4).map(lambda row: row, desc="Building labels")
chatter.get_logger("transformers.anything").warning("advice of a library")
warnings.warn("'pin_memory' argument is set as true but no accelerator is found")
warnings.warn("a warning of our own")
chatter.get_logger("transformers.anything").error("a true error")
"""


def stderr_of_chatter(tmp_path, **environment):
    settings = {k: v for k, v in os.environ.items() if not k.endswith(("_VERBOSITY", "_PROGRESS_BARS"))}
    done = subprocess.run(
        [sys.executable, "-c", CHATTY, str(tmp_path)],
        capture_output=True,
        text=True,
        env=settings | {"HF_DATASETS_CACHE": str(tmp_path / "cache")} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_bars_and_advice_are_gone_while_errors_and_other_warnings_stay(tmp_path):
    said = stderr_of_chatter(tmp_path)
    for noise in ("Writing model shards", "Loading weights", "Building labels", "advice of a library", "pin_memory"):
        assert noise not in said
    assert "a true error" in said
    assert "a warning of our own" in said


def test_verbose_leaves_the_libraries_as_they_are(tmp_path):
    said = stderr_of_chatter(tmp_path, **{VERBOSE: "1"})
    for noise in ("Building labels", "advice of a library", "pin_memory", "a true error"):
        assert noise in said


@pytest.fixture
def clean(monkeypatch):
    """The state that quieting changes, put back afterwards."""
    for name in ("VLLM_LOGGING_LEVEL", "TRANSFORMERS_VERBOSITY", VERBOSE):
        monkeypatch.delenv(name, raising=False)
    environment, level = dict(os.environ), logging.getLogger("trl").level
    yield monkeypatch
    os.environ.clear()
    os.environ.update(environment)
    logging.getLogger("trl").setLevel(level)


def test_what_the_user_has_set_stays(clean):
    clean.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    quiet_libraries()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert not logging.getLogger("trl").isEnabledFor(logging.WARNING)
    assert logging.getLogger("trl").isEnabledFor(logging.ERROR)


def shown_by(block, **terminal):
    context = RunContext(load_config("demo", []), Console(file=io.StringIO(), width=80, **terminal))
    block(context)
    return context.console.file.getvalue()


def wait(context):
    with context.console.status("starting vLLM"), context.progress("answering", 3) as done:
        done(3)


def test_bars_and_spinners_are_silent_where_there_is_no_terminal():
    assert shown_by(wait) == ""


def test_a_line_inside_a_silent_bar_is_shown():
    def block(context):
        with context.progress("answering", 3) as done:
            done(1)
            context.say("a line")

    assert shown_by(block) == "a line\n"


def test_in_a_terminal_a_bar_says_what_is_done():
    def block(context):
        with context.progress("answering", 3) as done:
            done(3)

    assert "answering" in shown_by(block, force_terminal=True)


def test_a_line_in_a_log_is_not_broken():
    text = "word " * 40 + "end"
    assert shown_by(lambda context: context.say(text)) == text + "\n"
