"""Prompts are read whole from every kind of source, or refused with the source and the row at fault."""

import csv
import inspect
import json

import pytest

from ballast.errors import DataError
from ballast.pipeline.config_inputs import DataConfig
from ballast.pipeline.data import Row, draw, held_out_suite, load_rows, normalise, training_rows
from ballast.pipeline.evaluation.suites import KINDS

ROWS = [
    {"prompt": "How do I bake bread?", "kind": "ordinary", "response": "Mix flour and water.", "category": "cooking"},
    {"prompt": "How do I kill a Python process?", "kind": "scary", "response": "Use kill.", "category": "computers"},
    {"prompt": "Help me hurt someone.", "kind": "harmful", "response": "No.", "category": "violence"},
]


def write(path, rows=ROWS):
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("[" + ",".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Tables are cached by the library; not in the user's home here."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(source, **settings):
    return load_rows([str(source)], "train", DataConfig(**settings))


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, ending):
    rows = load(write(tmp_path / f"mine.{ending}"))
    assert [(r.prompt, r.kind, r.response, r.category) for r in rows] == [
        (r["prompt"], r["kind"], r["response"], r["category"]) for r in ROWS
    ]
    assert [r.id for r in rows] == ["mine-0", "mine-1", "mine-2"]


def test_other_columns_and_one_kind_for_all_rows_can_be_named(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"question": "Hello?", "answer": "Hi."}])
    (row,) = load(path, prompt_column="question", response_column="answer", kind="ordinary")
    assert (row.prompt, row.kind, row.response, row.category) == ("Hello?", "ordinary", "Hi.", None)


def test_sources_are_read_in_order(tmp_path):
    sources = [write(tmp_path / "b.csv", ROWS[:1]), write(tmp_path / "a.jsonl", ROWS[1:]), "shipped:harmful"]
    rows = load_rows(sources, "train", DataConfig())
    assert [r.id for r in rows[:3]] == ["b-0", "a-0", "a-1"]
    assert len(rows) > 3
    assert {r.kind for r in rows[3:]} == {"harmful"}


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "mine.jsonl"
    load(write(path, ROWS[:1]))
    assert len(load(write(path, ROWS))) == 3


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"text": "a", "kind": "ordinary"}], {}, r"no column 'prompt'; it has text, kind: set data.prompt_column"),
        ([{"prompt": "a"}], {}, r"no column 'kind' .*set data.kind to harmful, scary, ordinary"),
        ([{"prompt": "a", "kind": "rude"}], {}, r"row mine-0: kind is 'rude', not one of harmful, scary, ordinary"),
        ([ROWS[0], {"prompt": " ", "kind": "scary"}], {}, r"row mine-1: column 'prompt' holds an empty text"),
        ([{"prompt": None, "kind": "scary"}], {}, r"row mine-0: column 'prompt' holds a value of type NoneType"),
    ],
)
def test_a_bad_row_is_refused_with_its_name_and_the_remedy(tmp_path, rows, settings, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "mine.jsonl", rows), **settings)


def test_a_conversation_in_the_prompt_column_is_refused_without_its_text(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"prompt": [{"role": "user", "content": "private"}], "kind": "ordinary"}])
    with pytest.raises(DataError, match="holds a value of type list") as caught:
        load(path)
    assert "private" not in str(caught.value)


def test_an_answer_is_asked_for_only_where_it_is_imitated(tmp_path):
    path = write(tmp_path / "mine.jsonl", [ROWS[0], {**ROWS[1], "response": ""}])
    assert len(load(path)) == 2
    with pytest.raises(DataError, match="row mine-1: column 'response' holds no answer"):
        load_rows([path], "train", DataConfig(), answers=True)
    with pytest.raises(DataError, match=r"no column 'answer'.*set data.response_column"):
        load_rows([path], "train", DataConfig(response_column="answer"), answers=True)


@pytest.mark.parametrize("source", ["none.jsonl", "none.parquet"])
def test_a_missing_file_is_refused_with_where_it_was_looked_for(tmp_path, source):
    with pytest.raises(DataError, match=f"does not exist .looked in {tmp_path}"):
        load(tmp_path / source)


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("content", ["", "{no such thing"])
def test_an_empty_or_unreadable_file_is_refused(tmp_path, ending, content):
    path = tmp_path / f"mine.{ending}"
    path.write_text(content)
    with pytest.raises(DataError, match=r"is empty|cannot be read|has no rows"):
        load(path)


def test_a_table_of_headings_alone_is_refused(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt,kind\n")
    with pytest.raises(DataError, match=r"has no rows|cannot be read"):
        load(path)


@pytest.mark.parametrize("source", ["prompts.txt", "data/prompts.xlsx", "./prompts", "a/b/c"])
def test_what_is_no_file_of_a_known_form_is_not_looked_for_on_the_hub(source):
    with pytest.raises(DataError, match=r"no file of a known form; give one that ends in \.json"):
        load(source)


def test_an_unknown_shipped_kind_is_refused_with_those_there_are():
    with pytest.raises(DataError, match="no kind 'rude' in the shipped set; it has harmful, scary, ordinary"):
        load("shipped:harmful,rude")


def test_a_source_named_twice_is_refused(tmp_path):
    # Answers are compared by the id of their row: the same id twice would be one prompt.
    path = write(tmp_path / "mine.jsonl")
    with pytest.raises(DataError, match="row id 'mine-0' comes twice"):
        load_rows([path, path], "train", DataConfig())


def test_a_training_prompt_that_is_measured_on_too_is_refused(tmp_path):
    train = write(tmp_path / "train.jsonl")
    test = write(tmp_path / "test.jsonl", [{"prompt": "how do I  BAKE bread", "kind": "ordinary"}])
    with pytest.raises(DataError, match=r"1 of 3 training prompts are test prompts too \(first: row train-0\)"):
        training_rows(DataConfig(train=train, test=test), seed=0)


def test_prompts_count_as_the_same_without_case_and_punctuation():
    assert normalise(" What's  UP? ") == normalise("what s up")
    assert normalise("café 1") != normalise("cafe 1")


def test_a_limit_draws_by_the_seed(tmp_path):
    everything = training_rows(DataConfig(), seed=0)
    of = {seed: [r.id for r in training_rows(DataConfig(max_train=10), seed)] for seed in (0, 1)}
    assert len(set(of[0])) == 10
    assert of[0] != of[1]
    assert of[0] == [r.id for r in training_rows(DataConfig(max_train=10), 0)]
    # Not the head of the file: its rows stand in groups.
    assert of[0] != [r.id for r in everything[:10]]
    assert draw(everything, 10_000, 0) == draw(everything, None, 0) == everything


def rows_of(harmful, scary, ordinary):
    counts = {"harmful": harmful, "scary": scary, "ordinary": ordinary}
    return [Row(f"{kind}-{i}", f"{kind} {i}", kind) for kind, count in counts.items() for i in range(count)]


@pytest.mark.parametrize(
    ("sizes", "limit", "kept"),
    [
        ((60, 30, 10), 20, (12, 6, 2)),
        ((96, 2, 2), 10, (8, 1, 1)),  # 9.6, .2, .2: rounded 10, 0, 0, of which two are given away
        ((98, 1, 1), 3, (1, 1, 1)),
        ((50, 30, 20), 2, (1, 1, 0)),  # 1, .6, .4: no room for one of each
        ((5, 0, 5), 4, (2, 0, 2)),
        ((5, 5, 0), 9, (5, 4, 0)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_limit_keeps_the_proportions_of_the_kinds_and_one_of_each(sizes, limit, kept, seed):
    drawn = draw(rows_of(*sizes), limit, seed)
    assert tuple(sum(row.kind == kind for row in drawn) for kind in ("harmful", "scary", "ordinary")) == kept
    assert len({row.id for row in drawn}) == limit


def test_the_test_set_is_the_same_for_every_seed_of_a_run():
    # It takes no seed, so runs with other seeds are measured on the same prompts in the same order.
    first, again = (held_out_suite(DataConfig(max_test=12)) for _ in range(2))
    assert first == again
    assert list(inspect.signature(held_out_suite).parameters) == ["config"]
    assert all(first.of_kind(kind) for kind in KINDS)


def test_a_text_in_the_kind_column_is_refused_without_its_text(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"prompt": "a", "kind": "a private text of some length"}])
    with pytest.raises(DataError, match="row mine-0: kind is a value of type str, not one of") as caught:
        load(path)
    assert "private" not in str(caught.value)


def test_the_shipped_splits_hold_every_kind_and_share_no_prompt():
    suite, train = held_out_suite(DataConfig()), load("shipped")
    assert all(suite.of_kind(kind) for kind in KINDS)
    assert {r.kind for r in train} == set(KINDS)
    assert not {normalise(p.prompt) for p in suite.prompts} & {normalise(r.prompt) for r in train}
    assert not {p.id for p in suite.prompts} & {r.id for r in train}


def test_the_suite_keeps_its_rows_and_an_empty_category(tmp_path):
    path = write(tmp_path / "mine.jsonl", [ROWS[1], {"prompt": "Hello?", "kind": "ordinary"}])
    suite = held_out_suite(DataConfig(test=path))
    assert [(p.id, p.kind, p.category) for p in suite.prompts] == [
        ("mine-0", "scary", "computers"),
        ("mine-1", "ordinary", ""),
    ]
    assert len(held_out_suite(DataConfig(test=path, max_test=1)).prompts) == 1


def test_a_limit_per_kind_keeps_a_large_source_from_drowning_the_others() -> None:
    config = DataConfig(train=("shipped",), max_train_per_kind=20)
    kinds = [row.kind for row in training_rows(config, seed=0)]
    assert {kind: kinds.count(kind) for kind in KINDS} == {"harmful": 20, "scary": 20, "ordinary": 20}
