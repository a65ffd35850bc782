"""Model cards: what they say, and whose file a README.md is."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from tests.pipeline.test_stages import PROMPTS, Scripted, pretend_trained

from ballast.pipeline.config_loading import load_config
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.evaluation.statistics import Estimate
from ballast.pipeline.model_card import CARD, Card, hub_id, is_ours, render, shown_model, write_card
from ballast.pipeline.run import run
from ballast.pipeline.run_card import run_card

PLAIN = Card("one", "A model.", "embedded:smollm2-135m", sections={"Data": "None."})


def front_matter(text):
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_a_card_is_read_by_the_hub_and_names_its_base_and_licence():
    card = ModelCard(render(PLAIN))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.text.index("## Base model") < card.text.index("## Data") < card.text.index("## Limits")


def test_a_local_base_tells_its_name_and_neither_the_way_to_it_nor_a_licence(tmp_path):
    (tmp_path / "my-model").mkdir()
    text = render(Card("one", "A model.", str(tmp_path / "my-model")))
    assert str(tmp_path) not in text
    assert "`my-model`, under the licence unknown to Ballast (read its own card)" in text
    assert "base_model" not in front_matter(text)
    assert "license" not in front_matter(text)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/model", "owner/model"),
        ("./model", None),
        ("/a/b", None),
        ("a/b/c", None),
        ("~/model", None),
        ("model", None),
    ],
)
def test_a_hub_id_has_an_owner_and_a_name(name, expected):
    assert hub_id(name) == expected
    assert shown_model(name) == (expected or name.rsplit("/", 1)[-1])


def test_a_card_of_ours_is_written_anew_and_never_left_half_way(tmp_path):
    assert write_card(tmp_path, PLAIN)
    assert is_ours(tmp_path / CARD)
    assert write_card(tmp_path, Card("two", "Another.", "owner/model"))
    assert "# two" in (tmp_path / CARD).read_text()
    assert [path.name for path in tmp_path.iterdir()] == [CARD]


@pytest.mark.parametrize(
    "edit", [lambda text: text.replace("A model.", "My model."), lambda text: f"{text}\nMy notes.\n"]
)
def test_a_card_that_was_edited_belongs_to_the_user(tmp_path, edit):
    write_card(tmp_path, PLAIN)
    edited = edit((tmp_path / CARD).read_text())
    (tmp_path / CARD).write_text(edited)
    assert not write_card(tmp_path, PLAIN)
    assert (tmp_path / CARD).read_text() == edited


@pytest.mark.parametrize("content", [b"# Mine\n", b"", b"\xff\xfe not UTF-8"])
def test_a_readme_that_ballast_did_not_write_is_left_alone(tmp_path, content):
    (tmp_path / CARD).write_bytes(content)
    assert not write_card(tmp_path, PLAIN)
    assert (tmp_path / CARD).read_bytes() == content


@pytest.fixture
def context(tmp_path, tokenizer):
    data = tmp_path / "secret-place" / "test.jsonl"
    data.parent.mkdir()
    data.write_text("\n".join(json.dumps(row) for row in PROMPTS))
    sources = [f"data.test=[{json.dumps(str(data))}]", "data.train=[owner/prompts:train, shipped]"]
    settings = [f"out={json.dumps(str(tmp_path))}", "name=one", "evaluate.samples=1", *sources]
    return Scripted(load_config("demo", [*settings, 'prompting.system_prompt="Be kind."']), tokenizer)


@pytest.mark.model
def test_a_runs_card_names_data_guards_and_contract_and_no_folder_of_this_machine(context, tmp_path):
    text = render(run_card(context, tmp_path, "train", {}))
    assert "| training | `owner/prompts:train` | see its card |" in text
    assert "| training | Ballast's own requests (`shipped`) | Apache-2.0 |" in text
    assert "| measuring | `test.jsonl` | not known to Ballast |" in text
    assert "| rewards | embedded | Apache-2.0 |" in text
    assert "| judges | ngram | Apache-2.0 |" in text
    assert context.prompt_format.contract().fingerprint() in text
    assert "` Be kind. `" in text
    assert "14 steps of 4 prompts with 8 completions" in text
    assert "Not measured yet" in text
    assert front_matter(text)["datasets"] == ["owner/prompts"]
    assert "secret-place" not in text
    assert str(tmp_path) not in text


@pytest.mark.model
def test_a_guards_condition_stands_in_the_card(context, tmp_path):
    config = load_config("demo", ["guard.type=llama_guard", "guard.model=meta-llama/Llama-Guard-3-8B"])
    text = render(
        run_card(type("C", (), {"config": config, "prompt_format": context.prompt_format})(), tmp_path, "train", {})
    )
    line = next(line for line in text.splitlines() if line.startswith("| rewards |"))
    assert "`meta-llama/Llama-Guard-3-8B` | Llama 3.1 Community" in line
    assert "Built with Llama" in line


@pytest.mark.model
def test_evaluate_writes_the_figures_into_the_cards_and_leaves_a_users_alone(context):
    pretend_trained(context, "align", "train")
    mine = context.folder.path / "align" / "model" / CARD
    mine.write_text("# Mine\n")
    run(context.config, ["baseline", "evaluate"], context=context)
    text = (context.folder.path / "train" / "model" / CARD).read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| start", "| aligned", "| final"))]
    # Two harmful prompts: both unsafe, one, none; Wilson's intervals.
    assert [cells[1].split(" ")[0] for cells in rows[:3]] == ["100%", "50%", "0%"]
    # Keywords see the same: both agree everywhere, on 2, 1 and 0 unsafe answers.
    assert "Judges:" in text
    assert [(cells[1].split(" ")[0], cells[3].strip(" |")) for cells in rows[3:]] == [
        ("0%", "2/0/0"),
        ("0%", "1/0/0"),
        ("0%", "0/0/0"),
    ]
    assert "On 2 harmful, 1 scary, 1 ordinary prompts, 1 answers each" in text
    assert mine.read_text() == "# Mine\n"
    assert "is not Ballast's, or was edited: left as it is" in context.shown.replace("\n", " ")


@pytest.mark.model
@pytest.mark.parametrize(
    ("monitor", "watches", "part"),
    [
        ([], None, "took no part in training"),
        (["monitor.enabled=true"], "ngram", "watched the training too"),
        (["monitor.enabled=true", "monitor.judge.type=rules"], "rules", "took no part in training"),
    ],
)
def test_a_judge_that_watched_the_training_is_not_said_to_have_had_no_part_in_it(
    context, tmp_path, monitor, watches, part
):
    context.config = load_config("demo", monitor)
    figures = {"final": EvaluationSummary(*[Estimate(0.0, 0.0, 0.0, 1)] * 6, None, None, 0.0, 0.0, {}, {})}
    text = render(run_card(context, tmp_path, "train", figures))
    assert f"the judge {part}" in text
    assert watches is None or f"| monitors | {watches} |" in text
    # The warm start is made before the monitor is there.
    assert "the judge took no part in training" in render(run_card(context, tmp_path, "align", figures))


@pytest.mark.model
def test_an_adapters_card_names_the_model_under_it_and_promises_no_figures(context, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    text = render(run_card(context, tmp_path, "train", {}))
    assert "belongs to the model that the warm start made, not to the base model itself" in text
    assert "Not measured yet" not in text  # `evaluate` measures, and writes the card of, the merged model alone
    assert "whose card holds the figures" in text


@pytest.mark.model
def test_the_contract_of_a_card_is_that_of_the_weights_record(context, tmp_path, tiny_model):
    from ballast.pipeline.model_record import read_contract
    from ballast.pipeline.run_card import write_run_card
    from ballast.pipeline.training.merge import save_merged

    save_merged(tiny_model, context.tokenizer, context.prompt_format, tmp_path / "model")
    write_run_card(context, tmp_path / "model", "align")
    assert read_contract(tmp_path / "model").fingerprint() in (tmp_path / "model" / CARD).read_text()
