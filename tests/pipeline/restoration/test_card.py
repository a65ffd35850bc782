"""The card of a restored model."""

import json
import re
from pathlib import Path

import pytest
from tests.pipeline.restoration.checkpoints import Three

import ballast
from ballast.pipeline.checkpoints.manifest import damage
from ballast.pipeline.model_card import CARD, is_ours


@pytest.fixture
def restored(tmp_path):
    three = Three(tmp_path)
    ballast.lox(three.base, three.aligned, three.tuned, out=tmp_path / "out", rank=2, alpha=0.5)
    return tmp_path / "out"


def test_a_restored_model_says_what_was_done_to_what_and_names_no_folder_of_this_machine(restored, tmp_path):
    text = (restored / CARD).read_text()
    changed = json.loads((restored / "restoration.json").read_text())["changed"]
    assert re.search(rf"Repaired by lox \(rank 2, alpha 0\.5.*\): {len(changed)} tensors changed", text)
    assert "- tuned: `tuned`" in text
    assert "The tuned model had no template contract" in text
    assert "Not measured" in text
    assert str(tmp_path) not in text


def test_a_card_that_its_user_edits_does_not_make_the_folder_a_damaged_one(restored):
    assert is_ours(restored / CARD)
    assert CARD not in json.loads((restored / "manifest.json").read_text())["files"]
    (restored / CARD).write_text("# Mine")
    assert damage(Path(restored)) is None
