"""Guards with a classification head: one label, or several, for a text or for a prompt and its response.

    softmax    classes exclude one another: risk = sum of the unsafe classes' probabilities
    sigmoid    every class is a question of its own: risk = the largest of the chosen ones

HarmAug and DuoGuard are of this kind, as are toxicity models such as toxic-bert and HAP. They read a whole
text at once, so every prefix is a text of its own. Most were trained on finished texts and judge the words of
a prefix, not where it is heading.

Shape letters: R rows (texts or pairs), C classes of the model, U chosen classes.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ballast.errors import ConfigError, ModelError
from ballast.guardrails.self_check import SelfCheck, check_order
from ballast.guardrails.types import Exchange, Message, RiskTrace
from ballast.models import resolve_model

if TYPE_CHECKING:
    import torch

# A longer prefix than one that is this many tokens too long is too long as well: only its last word can be
# tokenised otherwise when more text follows, and no word has that many tokens.
_SURELY_TOO_LONG = 256


class ClassifierOptions(BaseModel):
    """Options of a guard with a classification head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["classifier"] = "classifier"
    model: str = Field(description="a local model folder or a hub id, safetensors only; never the policy")
    revision: str | None = Field(default=None, description="commit or tag of a hub id; None takes its default branch")
    inputs: Literal["text", "pair"] = Field(
        default="pair",
        description="what the model reads: `text`, the response alone; `pair`, the prompt first and the response second",
    )
    prompt: Literal["last_user", "conversation"] = Field(
        default="last_user",
        description="the first half of a pair: the last user turn, or all turns with their roles in front",
    )
    activation: Literal["softmax", "sigmoid"] = Field(
        default="softmax",
        description="softmax where classes exclude one another (risks of unsafe classes are added), sigmoid where each is its own question (the largest counts)",
    )
    unsafe_labels: tuple[int | str, ...] = Field(
        min_length=1, description="classes that count as unsafe, by index or by their name in the model's id2label"
    )
    self_check: SelfCheck = Field(
        default="strict",
        description="before the first use, judge one harmless and one harmful toy answer: `strict` refuses a guard that fails, `warn` logs it",
    )
    max_length: int | None = Field(
        default=None,
        ge=8,
        description="tokens that are judged; a longer text is unscored. None takes the model's own limit",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="float32", description="precision of the weights; probabilities are computed in float32"
    )
    device: str = Field(default="auto", description="where the guard runs; auto takes cuda where there is one")
    batch_size: int = Field(default=16, ge=1, description="texts a forward")

    @model_validator(mode="after")
    def _prompt_is_read(self) -> "ClassifierOptions":
        if self.inputs == "text" and self.prompt == "conversation":
            raise ValueError("prompt is set and inputs is 'text', which shows the response alone; set inputs to 'pair'")
        return self


class ClassifierGuard:
    """A sequence-classification model, asked about every prefix.

    The model is loaded, and checked on two toy exchanges, at first use; calls from several threads take turns.
    """

    def __init__(self, options: ClassifierOptions) -> None:
        self.options = options
        self.name = f"{options.type}:{options.model.rstrip('/').rsplit('/', 1)[-1]}"
        self._lock = threading.RLock()
        self._loaded: _Classifier | None = None

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """Judge each response at each of its cuts; see `Guardrail.assess`.

        Equal texts are judged once. A text longer than the model reads, text that is not valid Unicode, and logits
        that are not finite are unscored. With several unsafe labels the category is the likeliest of them, where
        the risk is 0.5 or more.

        Raises:
            ConfigError: at first use, when the model has no such label, or too few for the activation.
            GuardError: at first use, when the guard fails its self-check.
            ModelError: at first use, when the model cannot be loaded or has no trained classification head.
        """
        with self._lock:
            if self._loaded is None:
                loaded = _Classifier(self.options, self.name)
                check_order(
                    self.name,
                    lambda toys, ends: self._assess(loaded, toys, ends),
                    self.options.self_check,
                    "check unsafe_labels, activation and inputs against the model card",
                )
                self._loaded = loaded
            return self._assess(self._loaded, exchanges, cuts)

    def _assess(
        self, classifier: "_Classifier", exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]
    ) -> list[RiskTrace]:
        rows = [self._rows(classifier, exchange, asked) for exchange, asked in zip(exchanges, cuts, strict=True)]
        judged = classifier.judge(list(dict.fromkeys(cell for row in rows for cell in row if isinstance(cell, _Row))))
        return [
            _trace(
                asked,
                [judged[cell] if isinstance(cell, _Row) else _Judgement(None, reason=cell) for cell in row],
                classifier.names,
            )
            for asked, row in zip(cuts, rows, strict=True)
        ]

    def _rows(self, classifier: "_Classifier", exchange: Exchange, cuts: Sequence[int]) -> "list[_Row | str]":
        first = self._prompt(exchange.messages) if self.options.inputs == "pair" else None
        cells: list[_Row | str] = []
        length = 0
        for cut in cuts:
            if length > classifier.context + _SURELY_TOO_LONG:
                cells.append(classifier.too_long)
                continue
            cell = classifier.encode(first, exchange.response[:cut])
            if isinstance(cell, _Row) and (length := len(cell.ids)) > classifier.context:
                cell = classifier.too_long
            cells.append(cell)
        return cells

    def _prompt(self, messages: Sequence[Message]) -> str:
        if self.options.prompt == "conversation":
            return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


@dataclass(frozen=True)
class _Row:
    """One encoded text or pair: ids, and segment numbers where the model takes them."""

    ids: tuple[int, ...]
    segments: tuple[int, ...]


@dataclass(frozen=True)
class _Judgement:
    """A risk with the number of the likeliest unsafe label, or why there is none."""

    risk: float | None
    label: int = 0
    reason: str | None = None


class _Classifier:
    """Tokenizer and model of one folder, with all that is particular about padding and special tokens."""

    def __init__(self, options: ClassifierOptions, guard: str) -> None:
        import torch

        self._activation, self._batch_size = options.activation, options.batch_size
        self._tokenizer, model = _loaded(options, guard)
        names = {int(index): str(name) for index, name in model.config.id2label.items()}
        self._unsafe = _unsafe_indices(options, names, guard)
        self.names = [names[index] for index in self._unsafe]
        limit = _context(model, self._tokenizer)
        self.context = min(limit, options.max_length or limit)
        self.too_long = f"the text has more tokens than the {self.context} that the guard reads"
        self._pad = self._tokenizer.pad_token_id
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._pad  # by which a decoder finds the last token of a row
        place = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
        self._model = model.to(place).eval().requires_grad_(False)
        plain = self._tokens("a", None if options.inputs == "text" else "a").ids
        # An unknown token may stand for text, unless the model has the same one for something else.
        other = [self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._pad]
        unknown = self._tokenizer.unk_token_id
        self._special = set(self._tokenizer.all_special_ids) - ({unknown} - set(other))
        self._own_special = sum(token in self._special for token in plain)

    def encode(self, first: str | None, response: str) -> "_Row | str":
        """One row, or why there is none. Where nothing at all is to be read, a space stands for it."""
        try:
            for text in (first or "", response):
                text.encode("utf-8")
        except UnicodeEncodeError:
            return "the text is not valid Unicode (a lone surrogate)"
        texts = (response, None) if first is None else (first, response)
        row = self._tokens(*texts)
        if not row.ids:  # an empty text, in a model that frames texts by no token
            row = self._tokens(" ", None)
        if sum(token in self._special for token in row.ids) != self._own_special:
            return "the guard's tokenizer reads a special token in the text and cannot show it as text"
        return row

    def _tokens(self, text: str, second: str | None) -> "_Row":
        # As a batch of one: an empty second text is left out otherwise, and its separator with it.
        encoded = self._tokenizer([text] if second is None else [(text, second)], split_special_tokens=True)
        segments = encoded.get("token_type_ids")
        return _Row(tuple(encoded["input_ids"][0]), tuple(segments[0]) if segments is not None else ())

    def judge(self, rows: "Sequence[_Row]") -> "dict[_Row, _Judgement]":
        """Every row judged, in batches of like length."""
        judged: dict[_Row, _Judgement] = {}
        order = sorted(rows, key=lambda row: len(row.ids))
        size = self._batch_size if self._pad is not None else 1  # nothing to pad with
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            judged.update(zip(batch, self._forward(batch), strict=True))
        return judged

    def _forward(self, rows: "Sequence[_Row]") -> "list[_Judgement]":
        import torch

        def padded(parts: Sequence[Sequence[int]], fill: int) -> "torch.Tensor":
            # On the right, so that positions count from the first token in encoders and decoders alike.
            tensor = torch.tensor([[*part, *[fill] * (longest - len(part))] for part in parts])
            return tensor.to(self._model.device)

        longest = len(rows[-1].ids)  # rows come sorted
        inputs = {
            "input_ids": padded([row.ids for row in rows], self._pad or 0),
            "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        }
        if rows[0].segments:
            inputs["token_type_ids"] = padded([row.segments for row in rows], 0)
        with torch.inference_mode():
            logits_RC = self._model(**inputs).logits.float()
            # Not finite anywhere is not finite here: a softmax over an infinite logit would still give numbers.
            p_RC = logits_RC.softmax(dim=-1) if self._activation == "softmax" else logits_RC.sigmoid()
            p_RC = p_RC.masked_fill(~logits_RC.isfinite().all(dim=-1, keepdim=True), math.nan)
            p_RU = p_RC[:, self._unsafe]
            risk_R = p_RU.sum(dim=-1).clamp(max=1.0) if self._activation == "softmax" else p_RU.amax(dim=-1)
            read = zip(risk_R.tolist(), p_RU.argmax(dim=-1).tolist(), strict=True)
        return [
            _Judgement(risk, label)
            if math.isfinite(risk)
            else _Judgement(None, reason="the guard's logits are not finite")
            for risk, label in read
        ]


def _trace(cuts: Sequence[int], judged: Sequence[_Judgement], names: Sequence[str]) -> RiskTrace:
    reasons = dict.fromkeys(judgement.reason for judgement in judged if judgement.reason)
    return RiskTrace(
        cuts=tuple(cuts),
        risk=tuple(judgement.risk for judgement in judged),
        reason="; ".join(reasons) or None,
        category=tuple(names[j.label] if j.risk is not None and j.risk >= 0.5 else None for j in judged)
        if len(names) > 1
        else (),
    )


def _loaded(options: ClassifierOptions, guard: str) -> tuple[Any, Any]:
    """The tokenizer and the model, whose head must come from the folder."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = resolve_model(options.model, options.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source,
            dtype=getattr(torch, options.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"guardrail '{guard}': model '{options.model}' could not be loaded as a classifier ({error}); check its name, folder or access"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"guardrail '{guard}': the weights of '{options.model}' lack {', '.join(missing[:3])}, which would be random numbers; "
            "name a model that was trained with a classification head, or ask this one by type 'prompted'"
        )
    return tokenizer, model


def _unsafe_indices(options: ClassifierOptions, names: dict[int, str], guard: str) -> list[int]:
    known = ", ".join(f"{index} ({name})" for index, name in sorted(names.items()))
    indices: list[int] = []
    for label in options.unsafe_labels:
        found = [index for index, name in names.items() if label in (index, name)]
        if not found:
            raise ConfigError(f"guardrail '{guard}': unsafe label {label!r} is none of the model's classes: {known}")
        indices += found
    if options.activation == "softmax" and len(set(indices)) == len(names):
        raise ConfigError(
            f"guardrail '{guard}': all classes of the model are unsafe labels ({known}), so that a softmax over them is always 1; "
            "leave the safe one out, or set activation to sigmoid where each class is a question of its own"
        )
    return sorted(set(indices))


def _context(model: Any, tokenizer: Any) -> int:
    """Tokens that the model can read: the least of what its tokenizer and its positions say."""
    limits = [tokenizer.model_max_length]
    if positions := getattr(model.config, "max_position_embeddings", None):
        # RoBERTa's table begins with rows for padding, which no token may use.
        reserved = [
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        ]
        limits.append(positions - max(reserved, default=0))
    return int(min(limits))
