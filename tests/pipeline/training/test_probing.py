"""Safety-aware probing against an independent float64 reference, and what it must leave alone."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ballast.errors import BallastError, ConfigError, DataError
from ballast.pipeline.config_probing import ProbingConfig
from ballast.pipeline.training.probe import probe_vectors, stepped
from ballast.pipeline.training.probing import SafetyProbing, probed_layers
from ballast.pipeline.training.safety_pairs import SafetyPair, contrastive_loss, encode_pairs

PAIRS = [
    SafetyPair((5, 6, 7), (10, 11, 2), (20, 21, 22, 23, 2)),
    SafetyPair((8, 9), (12, 13, 14, 2), (24, 2)),
    SafetyPair((3, 4, 5, 6), (15, 2), (25, 26, 2)),
]
STEP = 1e-2  # long enough that float32 could tell it, too


class ProbedTrainer(SafetyProbing, Trainer):
    """With a loss in float64: that of transformers is float32, in which the differences of a probe are coarse."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=self._loss, **kwargs)

    @staticmethod
    def _loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(outputs.logits[:, :-1], -1).gather(2, labels[:, 1:, None])
        return -log_p.sum() / num_items_in_batch


class ProbedSFT(SafetyProbing, SFTTrainer):
    pass


class Gradients(TrainerCallback):
    """What reaches the optimizer, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def tiny(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Any:
    """GPT-2, all of which computes in float64 where its weights are: Llama's norms are float32 whatever comes in."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=4, n_head=2, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


def adapted(model: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    peft = get_peft_model(
        model,
        LoraConfig(
            **(
                {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
                | changes
            )
        ),
    ).to(model.dtype)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.add_(0.05 * torch.randn_like(p))
    return peft


def rows(n: int = 12, length: int = 9) -> Dataset:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 40, (n, length), generator=generator).tolist()
    # The first token is no target, whoever counts them.
    return Dataset.from_list(
        [{"input_ids": row, "labels": [-100, *row[1:]], "attention_mask": [1] * length} for row in ids]
    )


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "seed": 3,
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "bf16": False, "gradient_checkpointing": False,
    } | changes  # fmt: skip


def options(**changes: Any) -> ProbingConfig:
    return ProbingConfig(**({"layers": (1, 2), "step": STEP, "batch_size": 3, "beta": 0.5} | changes))


def reference_loss(model: Any, batch: list[list[int]], vectors: dict[int, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the batch with vectors added after layers; hooks and loss written once more."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    hooks = [
        base.transformer.h[n].register_forward_hook(
            lambda m, a, out, v=v: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v
        )
        for n, v in vectors.items()
    ]
    ids = torch.tensor(batch)
    log_p = torch.log_softmax(model(input_ids=ids).logits[:, :-1], -1)
    for hook in hooks:
        hook.remove()
    return -log_p.gather(2, ids[:, 1:, None]).mean()


def reference_safety(model: Any, pairs: list[SafetyPair]) -> torch.Tensor:
    """Pair by pair, token by token, no padding."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        scores = []
        for answer in (pair.chosen, pair.rejected):
            text = [*pair.prompt, *answer]
            log_p = torch.log_softmax(model(input_ids=torch.tensor([text])).logits[0], -1)
            scores.append(sum(log_p[len(pair.prompt) + i - 1, token] for i, token in enumerate(answer)))
        total = total - torch.log(torch.sigmoid(scores[0] - scores[1]))
    return total / len(pairs)


def reference_vectors(
    model: Any, batches: list[list[list[int]]], at: dict[int, torch.Tensor], beta: float, step: float = STEP
) -> dict[int, torch.Tensor]:
    """beta * grad_V of the mean over batches of L(W + dW, V) - L(W, V), at V = `at`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    g = torch.autograd.grad(reference_safety(model, PAIRS), trained, allow_unused=True)
    g = [torch.zeros_like(p) if x is None else x for p, x in zip(trained, g, strict=True)]
    flat, weights = torch.cat([x.flatten() for x in g]), torch.cat([p.detach().flatten() for p in trained])
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, x in zip([p for p in moved.parameters() if p.requires_grad], g, strict=True):
            p += step * weights.norm() * x / flat.norm()
    slopes = []
    for some in (moved, model):
        leaves = {n: v.clone().requires_grad_() for n, v in at.items()}
        loss = sum(reference_loss(some, batch, leaves) for batch in batches) / len(batches)
        slopes.append(torch.autograd.grad(loss, list(leaves.values())))
    return {n: beta * (a - b) for n, a, b in zip(at, *slopes, strict=True)}


def zeros() -> dict[int, torch.Tensor]:
    return {1: torch.zeros(16, dtype=torch.float64), 2: torch.zeros(16, dtype=torch.float64)}


def batches_of(trainer: Any, n: int) -> list[list[list[int]]]:
    """The first n micro-batches in the order in which training sees them."""
    torch.manual_seed(trainer.args.seed)
    loader = iter(trainer.get_train_dataloader())
    return [next(loader)["input_ids"].tolist() for _ in range(n)]


def trained(trainer: Any) -> list[dict[str, torch.Tensor]]:
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return seen.steps


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    length = math.sqrt(sum(float(e.pow(2).sum()) for e in expected.values()))
    worst = max(float((found[n] - expected[n]).abs().max()) for n in expected)
    assert worst <= tolerance * length, (worst, length)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "whole model"])
@pytest.mark.parametrize("scale", ["gradient", "rms"])
def test_the_gradient_of_a_fresh_probe_is_that_of_an_independent_reference(
    tmp_path: Path, accumulation: int, adapter: bool, scale: str
) -> None:
    model = adapted(tiny()) if adapter else tiny()
    start = copy.deepcopy(model)
    args = TrainingArguments(**settings(tmp_path, gradient_accumulation_steps=accumulation, max_steps=1))
    beta = 0.5 if scale == "rms" else 50.0
    trainer = ProbedTrainer(
        model, args, train_dataset=rows(), probing=options(scale=scale, beta=beta), safety_pairs=PAIRS
    )
    batches = batches_of(trainer, accumulation)
    (found,) = trained(trainer)
    total: dict[str, torch.Tensor] = {}
    for batch in batches:
        vectors = reference_vectors(start, [batch], zeros(), beta)
        if scale == "rms":
            entries = torch.cat(list(vectors.values()))
            vectors = {n: v * beta / entries.pow(2).mean().sqrt() for n, v in vectors.items()}
        assert max(v.abs().max() for v in vectors.values()) > 1e-3  # the probe is no nothing
        reference_loss(start, batch, vectors).backward()
    total = {n: p.grad / accumulation for n, p in start.named_parameters() if p.grad is not None}
    assert_close(found, total)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stale_probe_is_that_of_the_step_before_over_all_of_its_batches(tmp_path: Path, accumulation: int) -> None:
    model = adapted(tiny())
    args = TrainingArguments(
        **settings(tmp_path, gradient_accumulation_steps=accumulation, max_steps=3, learning_rate=0.0)
    )
    beta = 50.0
    trainer = ProbedTrainer(
        model,
        args,
        train_dataset=rows(),
        probing=options(probe="stale", scale="gradient", beta=beta),
        safety_pairs=PAIRS,
    )
    start = copy.deepcopy(model)
    batches = batches_of(trainer, 3 * accumulation)
    found = trained(trainer)
    vectors = zeros()
    for number, gradients in enumerate(found):  # weights stand still at learning rate 0
        of_step = batches[number * accumulation : (number + 1) * accumulation]
        start.zero_grad()
        (sum(reference_loss(start, batch, vectors) for batch in of_step) / accumulation).backward()
        expected = {n: p.grad for n, p in start.named_parameters() if p.grad is not None}
        assert_close(gradients, expected)
        vectors = reference_vectors(start, of_step, vectors, beta)
    assert max(v.abs().max() for v in vectors.values()) > 1e-3


def test_the_contrastive_loss_is_teacher_forced_and_shifted() -> None:
    model = adapted(tiny())
    expected = reference_safety(model, PAIRS)
    assert contrastive_loss(model, PAIRS).item() == pytest.approx(expected.item(), rel=1e-12)
    assert contrastive_loss(model, PAIRS, pad_token_id=7).item() == pytest.approx(expected.item(), rel=1e-12)


def test_only_the_weights_step_is_taken_the_harmful_one_is_undone_bit_for_bit() -> None:
    values = [torch.randn(5), torch.randn(2, 3)]
    before, direction = [v.clone() for v in values], [torch.randn(5), torch.randn(2, 3)]
    with stepped(values, direction, 0.1):
        change = torch.cat([(v - b).flatten() for v, b in zip(values, before, strict=True)])
        whole = torch.cat([b.flatten() for b in before])
        assert change.norm().item() == pytest.approx(0.1 * whole.norm().item(), rel=1e-5)
    assert all(torch.equal(v, b) for v, b in zip(values, before, strict=True))


def test_equal_gradients_leave_no_probe() -> None:
    gradient = {1: torch.ones(4)}
    assert not probe_vectors(gradient, gradient, 0.05, "rms")[1].any()


def sft(folder: Path, model: Any, tokenizer: Any, **changes: Any) -> Any:
    probing = changes.pop("probing", options())
    args = SFTConfig(**settings(folder, max_length=32, **changes))
    return ProbedSFT(model, args, train_dataset=rows(), processing_class=tokenizer, probing=probing, safety_pairs=PAIRS)


@pytest.mark.model
def test_the_passes_of_the_probe_use_no_random_numbers_and_count_no_tokens(tmp_path: Path, tokenizer: Any) -> None:
    """With a probe of nearly 0 a step is that of TRL without it, dropout included."""
    plain_model = adapted(tiny(torch.float32), lora_dropout=0.3)
    args = SFTConfig(**settings(tmp_path, max_length=32))
    plain = SFTTrainer(copy.deepcopy(plain_model), args, train_dataset=rows(), processing_class=tokenizer)
    ours = sft(tmp_path, plain_model, tokenizer, probing=options(beta=1e-30, scale="gradient"))
    torch.manual_seed(5)
    plain.train()
    torch.manual_seed(5)
    ours.train()
    weights = ours.model.state_dict()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for theirs, mine in zip(plain.state.log_history[:2], ours.state.log_history[:2], strict=True):
        assert {k: mine[k] for k in theirs if k != "step_time"} == {k: v for k, v in theirs.items() if k != "step_time"}
        assert {"probing/safety_loss", "probing/cosine", "probing/seconds", "probing/rms", "probing/difference"} <= set(
            mine
        )
        assert "probing/cosine/layer_3" in mine


@pytest.mark.model
@pytest.mark.parametrize("probe", ["fresh", "stale"])
def test_checkpointing_changes_nothing(tmp_path: Path, tokenizer: Any, probe: str) -> None:
    models = []
    for checkpointing in (False, True):
        trainer = sft(
            tmp_path, adapted(tiny()), tokenizer, gradient_checkpointing=checkpointing, max_steps=2,
            gradient_checkpointing_kwargs={"use_reentrant": False}, probing=options(probe=probe),
        )  # fmt: skip
        trainer.train()
        models.append(trainer.model.state_dict())
    for name, value in models[0].items():
        assert torch.allclose(value, models[1][name], atol=1e-9), name


@pytest.mark.model
def test_the_saved_model_has_the_plain_architecture_and_no_trace_of_the_probe(tmp_path: Path, tokenizer: Any) -> None:
    trainer = sft(tmp_path, tiny(torch.float32), tokenizer)
    trainer.train()
    ids = torch.arange(3, 12)[None]
    trainer.model.eval()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert loaded.state_dict().keys() == tiny().state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


@pytest.mark.model
def test_evaluation_is_not_probed(tmp_path: Path, tokenizer: Any) -> None:
    trainer = sft(tmp_path, adapted(tiny(torch.float32)), tokenizer, max_steps=1)
    plain = SFTTrainer(
        copy.deepcopy(trainer.model),
        SFTConfig(**settings(tmp_path, max_length=32)),
        train_dataset=rows(),
        processing_class=tokenizer,
    )
    assert trainer.evaluate(rows(2))["eval_loss"] == plain.evaluate(rows(2))["eval_loss"]


def test_a_direction_that_is_not_finite_is_skipped_counted_and_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ballast.pipeline.training import probing

    monkeypatch.setattr(
        probing,
        "contrastive_loss",
        lambda model, *_: next(p for p in model.parameters() if p.requires_grad).sum() * math.nan,
    )
    plain_model = adapted(tiny())
    args = TrainingArguments(**settings(tmp_path, max_steps=2))
    plain = Trainer(copy.deepcopy(plain_model), args, train_dataset=rows())
    trainer = ProbedTrainer(plain_model, args, train_dataset=rows(), probing=options(max_skipped=2), safety_pairs=PAIRS)
    plain.train()
    trainer.train()
    assert [entry["probing/skipped"] for entry in trainer.state.log_history[:2]] == [1.0, 1.0]
    # The loss rounds float64 logits to float32, which may fall either way where another memory layout changes their last
    # bit; an update is about the learning rate, 1e-2.
    weights = trainer.model.state_dict()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)
    args = TrainingArguments(**settings(tmp_path, max_steps=3))
    trainer = ProbedTrainer(
        adapted(tiny()), args, train_dataset=rows(), probing=options(max_skipped=2), safety_pairs=PAIRS
    )
    with pytest.raises(BallastError, match="3 steps in a row"):
        trainer.train()


def test_what_cannot_be_probed_is_refused_with_the_reason(tmp_path: Path) -> None:
    args = TrainingArguments(**settings(tmp_path))
    with pytest.raises(DataError, match="no safety pairs"):
        ProbedTrainer(tiny(), args, train_dataset=rows(), safety_pairs=[])
    with pytest.raises(ConfigError, match="float32"):
        ProbedTrainer(tiny(torch.bfloat16), args, train_dataset=rows(), safety_pairs=PAIRS)
    with pytest.raises(ConfigError, match="layers 0 to 3"):
        ProbedTrainer(tiny(), args, train_dataset=rows(), probing=options(layers=(2, 4)), safety_pairs=PAIRS)
    reentrant = TrainingArguments(
        **settings(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    )
    with pytest.raises(ConfigError, match="use_reentrant"):
        ProbedTrainer(tiny(), reentrant, train_dataset=rows(), safety_pairs=PAIRS)


@pytest.mark.parametrize(("half", "step"), [(False, 2e-5), (True, 3e-2)])
def test_the_step_is_the_papers_and_longer_where_bfloat16_could_not_tell_it(
    tmp_path: Path, half: bool, step: float
) -> None:
    model = adapted(tiny(torch.bfloat16 if half else torch.float32))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    args = TrainingArguments(**settings(tmp_path))
    probing = ProbingConfig(layers=(1, 2))
    trainer = ProbedTrainer(model, args, train_dataset=rows(), probing=probing, safety_pairs=PAIRS)
    assert trainer._step_share == step


def test_a_forward_without_gradients_is_not_probed(tmp_path: Path) -> None:
    """A reference that is the same model with its adapter off runs so, inside the very step."""
    model = tiny()
    args = TrainingArguments(**settings(tmp_path))
    trainer = ProbedTrainer(model, args, train_dataset=rows(), probing=options(), safety_pairs=PAIRS)
    ids = torch.arange(3, 12)[None]
    plain = model(input_ids=ids).logits
    trainer._probe.vectors = {1: torch.arange(16, dtype=torch.float64)}  # a constant one, the norm takes out again
    assert not torch.allclose(model(input_ids=ids).logits, plain)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.model
@pytest.mark.parametrize("probe", ["fresh", "stale"])
def test_grpo_is_probed_and_counts_its_steps_once(tmp_path: Path, tiny_model: Any, tokenizer: Any, probe: str) -> None:
    from trl import GRPOConfig, GRPOTrainer

    class ProbedGRPO(SafetyProbing, GRPOTrainer):
        pass

    def arbitrary(completion_ids: Any, **_: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    args = GRPOConfig(
        **settings(
            tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4,
            max_completion_length=6, max_steps=2,
        )
    )  # fmt: skip
    trainer = ProbedGRPO(
        tiny_model, arbitrary, args, train_dataset=Dataset.from_list([{"prompt": "How are you?"}] * 4),
        processing_class=tokenizer, probing=options(layers=(0, 1), probe=probe), safety_pairs=PAIRS,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    assert trainer._step == 4
    assert all(math.isfinite(step["probing/cosine"]) for step in steps)
    if probe == "fresh":  # the stale one begins at 0
        assert steps[0]["probing/rms"] == pytest.approx(0.5, rel=1e-4)


def test_where_no_layers_are_named_it_is_the_share_of_the_paper() -> None:
    assert list(probed_layers(ProbingConfig(), 32)) == list(range(11, 21))
    assert list(probed_layers(ProbingConfig(), 30)) == list(range(10, 20))
    assert list(probed_layers(ProbingConfig(), 2)) == [1]


@pytest.mark.model
def test_pairs_are_encoded_by_the_prompt_format_and_faulty_ones_refused(tokenizer: Any) -> None:
    from ballast.pipeline.prompting import PromptFormat

    prompts = PromptFormat(tokenizer)
    row = {"prompt": "A request", "chosen": "No, I won't.", "rejected": [{"role": "assistant", "content": "Sure"}]}
    (pair,) = encode_pairs([row], prompts)
    assert list(pair.prompt) == prompts.encode(prompts.messages("A request"))
    assert tokenizer.decode(pair.chosen) == "No, I won't.<|im_end|>"
    assert tokenizer.decode(pair.rejected) == "Sure<|im_end|>"
    with pytest.raises(DataError, match="at least one row"):
        encode_pairs([], prompts)
    with pytest.raises(DataError, match="has no rejected"):
        encode_pairs([row | {"rejected": ""}], prompts)
    with pytest.raises(DataError, match="the same"):
        encode_pairs([row | {"rejected": "No, I won't."}], prompts)
    with pytest.raises(DataError, match="no room"):
        encode_pairs([row], prompts, max_length=len(pair.prompt))
