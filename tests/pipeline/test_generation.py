"""Every generator keeps the same rules; those that a model gives are held against transformers itself."""

import pytest

from ballast.pipeline.config_inputs import SamplingConfig
from ballast.pipeline.generation import ScriptedGenerator, TransformersGenerator

pytestmark = pytest.mark.model

SAMPLED = SamplingConfig(max_new_tokens=6, temperature=1.0)
GREEDY = SamplingConfig(max_new_tokens=6, temperature=0.0)


@pytest.fixture
def prompts(tokenizer):
    # Of different lengths, so that a batch is padded; five rows are three batches of two.
    texts = ["Hello", "Hello", "A much longer request than the others", "Why?", "Two words"]
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(params=["transformers", "scripted"])
def generator(request, tokenizer, tiny_model):
    if request.param == "transformers":
        return TransformersGenerator(tiny_model.eval(), tokenizer, batch_size=2)
    return ScriptedGenerator(lambda ids, seed: f"{seed % 97} to {len(ids)}, which is longer than six tokens", tokenizer)


def test_one_completion_a_prompt_within_the_limit(generator, prompts):
    answers = generator.generate(prompts, SAMPLED, seed=0)
    assert len(answers) == len(prompts)
    assert all(1 <= len(answer.ids) <= 6 for answer in answers)


def test_no_prompts_give_no_completions(generator):
    assert generator.generate([], SAMPLED, seed=0) == []


def test_the_text_is_that_of_the_ids_without_special_tokens(generator, prompts, tokenizer):
    for answer in generator.generate(prompts, SAMPLED, seed=0):
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)


def test_the_seed_and_the_row_decide_what_is_sampled(generator, prompts):
    once, again = (generator.generate(prompts, SAMPLED, seed=7) for _ in range(2))
    other = generator.generate(prompts, SAMPLED, seed=8)
    assert once == again
    assert once != other
    # Rows 0 and 1 are the same prompt twice.
    assert once[0] != once[1]


def test_progress_adds_up_to_the_number_of_completions(generator, prompts):
    seen = []
    generator.generate(prompts, SAMPLED, 0, seen.append)
    assert sum(seen) == len(prompts)


def test_a_completion_is_truncated_where_it_was_cut_off_and_only_there(generator, prompts):
    if isinstance(generator, ScriptedGenerator):
        generator.answer = lambda ids, seed: "No."
        whole = generator.generate(prompts, SAMPLED, 0)
        assert not any(a.truncated for a in whole)
        assert {(a.ids[-1], a.text) for a in whole} == {(2, "No.")}  # 2 ends a turn
        generator.answer = lambda ids, seed: "word " * 20
        assert all(a.truncated and len(a.ids) == 6 for a in generator.generate(prompts, SAMPLED, 0))
        return
    answers = generator.generate(prompts, GREEDY, 0)
    assert all(a.truncated and len(a.ids) == 6 for a in answers)
    # Make the third token of the first answer the stop token: that row ends with it, whole.
    stop = answers[0].ids[2]
    generator.model.generation_config.eos_token_id = [2, stop]
    ended = generator.generate(prompts, GREEDY, 0)[0]
    first = answers[0].ids.index(stop)
    assert (ended.ids, ended.truncated) == (answers[0].ids[: first + 1], False)


def test_greedy_is_what_the_model_itself_writes_without_padding(tiny_model, tokenizer, prompts):
    import torch

    generator = TransformersGenerator(tiny_model.eval(), tokenizer, batch_size=3)
    answers = generator.generate(prompts, GREEDY, seed=0)
    for ids, answer in zip(prompts, answers, strict=True):
        own = tiny_model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert answer.ids == tuple(own[0, len(ids) :].tolist())


def test_a_penalty_in_the_model_folder_does_not_bend_the_policy(tiny_model, tokenizer, prompts):
    # The importance ratio of training takes samples to come from the model's own distribution.
    generator = TransformersGenerator(tiny_model.eval(), tokenizer)
    plain = generator.generate(prompts, GREEDY, 0)
    tiny_model.generation_config.repetition_penalty = 50.0
    assert generator.generate(prompts, GREEDY, 0) == plain


def test_sampling_leaves_the_random_state_of_training_alone(tiny_model, tokenizer, prompts):
    import torch

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    TransformersGenerator(tiny_model.eval(), tokenizer).generate(prompts, SAMPLED, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_weights_of_another_folder_are_taken(tiny_model, tokenizer, prompts, tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    LlamaForCausalLM(tiny_model.config).save_pretrained(tmp_path)
    generator = TransformersGenerator(tiny_model.eval(), tokenizer)
    before = generator.generate(prompts, GREEDY, 0)
    generator.load_folder(str(tmp_path))
    expected = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert generator.generate(prompts, GREEDY, 0) != before
    assert generator.generate(prompts, GREEDY, 0) == TransformersGenerator(expected, tokenizer).generate(
        prompts, GREEDY, 0
    )


def test_the_scripted_generator_remembers_the_folder(tokenizer):
    generator = ScriptedGenerator(lambda ids, seed: "No.", tokenizer)
    generator.load_folder("some/folder")
    assert generator.folder == "some/folder"
