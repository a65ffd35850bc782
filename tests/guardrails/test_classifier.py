"""Classification heads: every prefix scored, the chosen classes counted, nothing shortened and nothing invented."""

import json
import shutil

import pytest
from pydantic import ValidationError

from ballast.errors import ConfigError, GuardError, ModelError
from ballast.guardrails.contract import check_guardrail
from ballast.guardrails.families.classifier import ClassifierGuard, ClassifierOptions
from ballast.guardrails.types import Exchange

HELLO = ({"role": "user", "content": "Hello there"},)
CONTEXT = 192
NAMES = {0: "safe", 1: "violence", 2: "fraud"}


def bert_tokenizer():
    """A word-piece tokenizer of printable characters, framed by [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*special, *characters, *(f"##{c}" for c in characters), "hello", "there", "safe", "zebra"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save(folder, config_class, model_class, tokenizer, **settings):
    import torch

    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.4,  # large enough that risks differ between texts
        id2label=NAMES,
        label2id={name: i for i, name in NAMES.items()},
        **settings,
    )
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertForSequenceClassification

    return save(
        tmp_path_factory.mktemp("bert"),
        BertConfig,
        BertForSequenceClassification,
        bert_tokenizer(),
        max_position_embeddings=CONTEXT,
    )


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, tokenizer):
    """A Llama with a classification head and no token around its texts."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return save(
        tmp_path_factory.mktemp("decoder"),
        LlamaConfig,
        LlamaForSequenceClassification,
        tokenizer,
        max_position_embeddings=CONTEXT,
        pad_token_id=None,
    )


def make(folder, **options):
    defaults = {"model": folder, "device": "cpu", "self_check": "off", "batch_size": 4, "unsafe_labels": (1, 2)}
    return ClassifierGuard(ClassifierOptions(**{**defaults, **options}))


def probabilities(folder, *texts, activation):
    """One row by itself, as a user of transformers would judge it."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    encoded = AutoTokenizer.from_pretrained(folder)([texts if len(texts) > 1 else texts[0]], return_tensors="pt")
    with torch.no_grad():
        logits = model(**encoded).logits[0].double()
    return logits.softmax(-1) if activation == "softmax" else logits.sigmoid()


@pytest.mark.parametrize("inputs", ["text", "pair"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_risk_is_the_sum_of_unsafe_classes_or_the_largest_sigmoid_at_each_prefix(bert, inputs, activation):
    response, cuts = "one two three", (0, 3, 7, 13)
    (trace,) = make(bert, inputs=inputs, activation=activation).assess([Exchange(HELLO, response)], [cuts])
    for cut, risk, category in zip(cuts, trace.risk, trace.category, strict=True):
        texts = (response[:cut],) if inputs == "text" else ("Hello there", response[:cut])
        p = probabilities(bert, *texts, activation=activation)
        expected = p[1] + p[2] if activation == "softmax" else max(p[1], p[2])
        assert risk == pytest.approx(expected.item(), abs=1e-5)
        assert category == (None if risk < 0.5 else NAMES[1 + int(p[2] > p[1])])
    assert len(set(trace.risk)) == 4


def test_labels_are_chosen_by_index_or_by_name(bert):
    exchange = Exchange(HELLO, "one two")
    by_name, by_index, one = (
        make(bert, unsafe_labels=labels).assess([exchange], [(7,)])[0]
        for labels in (("fraud", "violence"), (1, 2), ("violence",))
    )
    assert by_name == by_index
    assert one.risk[0] < by_name.risk[0]
    assert one.category == ()  # one label is no choice between categories


def test_a_pair_is_the_last_user_turn_or_the_conversation(bert):
    talk = (
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "second"},
    )
    for prompt, first in (("last_user", "second"), ("conversation", "user: first\n\nassistant: ok\n\nuser: second")):
        (trace,) = make(bert, prompt=prompt).assess([Exchange(talk, "x")], [(1,)])
        p = probabilities(bert, first, "x", activation="softmax")
        assert trace.risk[0] == pytest.approx((p[1] + p[2]).item(), abs=1e-5)
    with pytest.raises(ValidationError, match="set inputs to 'pair'"):
        ClassifierOptions(model="a/b", unsafe_labels=(1,), inputs="text", prompt="conversation")


def test_equal_prefixes_are_scored_once_and_batches_hold_like_lengths(bert):
    guard = make(bert)
    guard.assess([], [])
    classifier, lengths = guard._loaded, []
    forward = classifier._forward
    classifier._forward = lambda rows: lengths.append([len(row.ids) for row in rows]) or forward(rows)
    exchanges = [Exchange(HELLO, f"Sure {i}") for i in range(8)]
    traces = guard.assess(exchanges, [(0, 4, 6)] * 8)
    assert sum(map(len, lengths)) == 1 + 1 + 8
    assert [length for batch in lengths for length in batch] == sorted(n for batch in lengths for n in batch)
    assert len({trace.risk[:2] for trace in traces}) == 1


@pytest.mark.parametrize("kind", ["bert", "decoder"])
def test_padding_in_a_batch_changes_nothing(kind, request):
    folder = request.getfixturevalue(kind)
    exchanges = [Exchange(HELLO, text) for text in ("a", "a longer answer " * 6, "", "b c")]
    cuts = [(len(e.response),) for e in exchanges]
    one, many = (make(folder, batch_size=size).assess(exchanges, cuts) for size in (1, 8))
    for a, b in zip(one, many, strict=True):
        assert a.risk == pytest.approx(b.risk, abs=1e-5)


@pytest.mark.parametrize("inputs", ["text", "pair"])
def test_a_special_token_in_the_text_stays_text(bert, inputs):
    guard = make(bert, inputs=inputs)
    spoof = "fine [SEP] safe [CLS] [PAD] [MASK]"
    guard.assess([], [])
    row = guard._loaded.encode("[SEP]" if inputs == "pair" else None, spoof)
    assert (row.ids.count(2), row.ids.count(3)) == (1, 2 if inputs == "pair" else 1)
    assert 0 not in row.ids
    assert 4 not in row.ids
    assert guard.assess([Exchange(HELLO, spoof)], [(len(spoof),)])[0].scored


def test_a_tokenizer_that_cannot_keep_a_special_token_as_text_leaves_the_row_unscored(bert):
    guard = make(bert)
    guard.assess([], [])
    tokenizer = guard._loaded._tokenizer
    # What a tokenizer does that knows no split_special_tokens.
    guard._loaded._tokenizer = lambda texts, split_special_tokens: tokenizer(texts)
    bad, good = guard.assess([Exchange(HELLO, "a [SEP] b"), Exchange(HELLO, "a b")], [(9,), (3,)])
    assert bad.risk == (None,)
    assert "special token" in bad.reason
    assert good.scored


@pytest.mark.parametrize("inputs", ["text", "pair"])
def test_a_text_beyond_the_context_is_unscored_and_shorter_ones_are_scored(bert, inputs):
    response = "x " * 5000
    guard = make(bert, inputs=inputs, batch_size=1)
    cuts = (2, 200, 2 * CONTEXT, 4000, 10000)
    (trace,) = guard.assess([Exchange(HELLO, response)], [cuts])
    assert [risk is None for risk in trace.risk] == [False, False, True, True, True]
    assert f"{CONTEXT} that the guard reads" in trace.reason
    (trace,) = make(bert, max_length=8, inputs="text").assess([Exchange(HELLO, "a b c d e f g")], [(11, 13)])
    assert [risk is None for risk in trace.risk] == [False, True]  # [CLS] a b c d e f [SEP] are 8, one more is not


def test_robertas_reserved_positions_are_not_used(tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    folder = save(
        tmp_path,
        RobertaConfig,
        RobertaForSequenceClassification,
        bert_tokenizer(),
        max_position_embeddings=34,
        pad_token_id=0,
        type_vocab_size=2,
    )
    # Padding has row 0 of 34, so 33 tokens fit: [CLS], 31 words, [SEP].
    words = [" ".join("a" * n) for n in (31, 32)]
    traces = make(folder, inputs="text").assess([Exchange((), w) for w in words], [(len(w),) for w in words])
    assert [trace.scored for trace in traces] == [True, False]


def test_logits_that_are_not_finite_are_unscored_and_cost_no_other_row(bert):
    import torch

    guard = make(bert)
    guard.assess([], [])
    classifier = guard._loaded
    (zebra,) = classifier._tokens("zebra", None).ids[1:-1]
    with torch.no_grad():
        classifier._model.get_input_embeddings().weight[zebra] = float("nan")
    horse, animal = guard.assess([Exchange(HELLO, "a horse"), Exchange(HELLO, "a zebra")], [(1, 7)] * 2)
    assert horse.scored
    assert animal.risk == (horse.risk[0], None)
    assert "not finite" in animal.reason


def test_the_self_check_finds_classes_that_are_the_wrong_way_round(bert):
    failures = []
    for labels in ((0,), (1, 2)):
        try:
            make(bert, self_check="strict", unsafe_labels=labels).assess([], [])
        except GuardError as error:
            failures.append(str(error))
    # A random model ranks the toy answers one way, with the other classes the other way: one of the two fails.
    (message,) = failures
    assert "check unsafe_labels" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unsafe_labels": ("toxic",)}, r"'toxic' is none of the model's classes: 0 \(safe\), 1 \(violence\)"),
        ({"unsafe_labels": (3,)}, "unsafe label 3 is none"),
        ({"unsafe_labels": (0, 1, 2)}, "a softmax over them is always 1"),
    ],
)
def test_labels_that_the_model_does_not_have_are_refused(bert, options, message):
    with pytest.raises(ConfigError, match=message):
        make(bert, **options).assess([], [])


def test_a_model_without_a_trained_head_is_refused(tmp_path, tiny_model, tokenizer):
    tiny_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"score.weight, which would be random"):
        make(str(tmp_path)).assess([], [])


def test_remote_code_is_not_run(bert, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(bert, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["model_type"] = "somebodys"
    settings["auto_map"] = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="could not be loaded as a classifier"):
        make(str(folder)).assess([], [])


@pytest.mark.parametrize("kind", ["bert", "decoder"])
@pytest.mark.parametrize("inputs", ["text", "pair"])
def test_the_contract_holds(kind, inputs, request):
    guard = make(request.getfixturevalue(kind), inputs=inputs)
    report = check_guardrail(guard, tolerance=1e-4)
    # Long texts are more than the context; a surrogate is no text. The response alone does not see the prompt.
    assert all("surrogate" in what or "characters" in what for what in report.unscored)
    assert ("a lone surrogate in the prompt" in report.unscored) == (inputs == "pair")
