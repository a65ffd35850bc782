"""Completions on the page: which, with which colours, and what is blurred."""

from dataclasses import dataclass, field

import pytest

from ballast.errors import ModelError
from ballast.guardrails.segments import token_char_ends
from ballast.pipeline.reporting.completions import as_json, select_completions, tokenizer_of
from ballast.pipeline.reporting.run_record import read_run


@dataclass
class Pieces:
    """A tokenizer whose tokens are given pieces of text."""

    pieces: list[str]
    added_tokens_decoder: dict = field(default_factory=dict)

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] for i in ids]


def selected(run, most=1000, **options):
    return select_completions(read_run(run), most, **options)


def of_source(selection, source):
    return [row for row in selection.rows if row.source == source]


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


def test_each_piece_of_text_has_the_risk_of_its_segment_and_the_pieces_are_the_text(run):
    row = of_source(selected(run), "training")[2]
    assert [risk for _, risk in row.spans] == [0.2, 0.3]  # .1 at the cut 0 is the prompt's, and owns no text
    assert sum(length for length, _ in row.spans) == len(row.text)
    assert row.guard == 0.3


def test_what_the_guard_could_not_score_is_unscored_and_blurred_whatever_its_kind(run):
    row = of_source(selected(run), "training")[1]
    assert [risk for _, risk in row.spans] == [0.2, None]
    assert (row.guard, row.kind, row.hidden, row.note) == (None, "ordinary", True, "guard: too long")


def test_text_that_answers_a_harmful_prompt_or_is_found_unsafe_is_blurred_and_other_text_is_not(run):
    hidden = {(row.kind, row.source): row.hidden for row in selected(run).rows if row.guard == 0.3 or row.judge == 0.1}
    assert hidden[("harmful", "training")]
    assert not hidden[("ordinary", "training")]
    assert not hidden[("scary", "after GRPO")]
    assert of_source(selected(run), "training")[0].hidden  # ordinary, with a risk of .9


def test_a_token_has_the_risk_of_the_segment_that_its_first_character_lies_in(run, monkeypatch):
    # "Hello wor|ld": the cut at 9 lies inside the second token, which begins before it.
    row = {
        "step": 3,
        "kind": "ordinary",
        "prompt": "p",
        "completion": "Hello world!",
        "token_ids": [0, 1, 2],
        "advantages": [0.5, 0.5, -1.0],
        "tokens_in_loss": 2,
        "cuts": [0, 9, 12],
        "risk": [0.0, 0.25, 0.75],
        "unscored_reason": None,
    }
    shown = _only_training(run, monkeypatch, row, Pieces(["Hello", " world", "!"]))
    assert shown.tokens == (5, 6, 1)
    assert shown.spans == ((11, 0.25), (1, 0.75))
    assert shown.advantages == ((2, 0.5), (1, -1.0))
    assert (shown.step, shown.note) == (4, "2 of 3 tokens in the loss")  # the batch of step 4, counted from 1


def test_a_tokenizer_of_another_model_is_refused_instead_of_colouring_other_words(run, monkeypatch):
    row = {
        "kind": "ordinary",
        "prompt": "p",
        "completion": "Hello",
        "token_ids": [0],
        "cuts": [0, 5],
        "risk": [0.0, 0.0],
        "unscored_reason": None,
    }
    with pytest.raises(ModelError, match="another text than the one on record"):
        _only_training(run, monkeypatch, row, Pieces(["Howdy"]))


def _only_training(run, monkeypatch, row, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ballast.pipeline.reporting import completions

    path = run / "train" / "made.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    monkeypatch.setattr(completions, "_training_tables", lambda of: [path])
    return of_source(selected(run, tokenizer=tokenizer), "training")[0]


def test_fewer_are_taken_from_all_of_the_training_and_from_every_model_to_the_same_prompts(run):
    # 3 models x 60, 144 of the training: 50 // (3 + 2) = 10 of a model, 50 - 30 of the training.
    selection = selected(run, 50)
    assert (len(selection.rows), selection.total) == (50, 324)
    asked = [[row.prompt for row in of_source(selection, label)] for label in ("start", "after align", "after GRPO")]
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[0]) == 10
    steps = [row.step for row in of_source(selection, "training")]
    assert (len(steps), steps[0], steps[-1]) == (20, 1, 12)


def test_none_are_read_where_none_are_wanted(run):
    selection = selected(run, 0)
    assert (selection.rows, selection.total) == ((), 324)


def test_long_completions_are_fewer_so_that_the_file_stays_small(run):
    selection = selected(run, most_bytes=20_000)
    assert 30 < len(selection.rows) < 324
    assert len(as_json(selection.rows).encode()) < 21_000
    assert {row.source for row in selection.rows} == {"start", "after align", "after GRPO", "training"}


@pytest.mark.model
def test_the_saved_tokenizer_lays_tokens_over_text_as_the_policys_own_does(run, tokenizer):
    text = "Naïve 🙂 text, 日本語 and <code>!"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    (run / "train" / "model").mkdir(exist_ok=True)
    tokenizer.save_pretrained(run / "train" / "model")
    saved = tokenizer_of(read_run(run))
    assert token_char_ends(saved, ids) == token_char_ends(tokenizer, ids)
    assert token_char_ends(saved, ids)[0] == text
