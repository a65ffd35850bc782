"""Tokenizer, Qwen3 backbone and response heads of Qwen3Guard-Stream: text to ids, ids to what the heads say.

The published models bring their classes as remote code, which is not run here: the heads are rebuilt from the
weights' names and shapes, and the meaning of their outputs is read from config.json.

Shape letters: B rows of a batch, T tokens, L risk levels, C categories.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.errors import ModelError
from ballast.guardrails.families.frame import Frame, UnrenderableError
from ballast.guardrails.types import Message
from ballast.models import resolve_model

_ROLES = ("system", "user", "assistant")
_LEVELS = {"0": "Safe", "1": "Unsafe", "2": "Controversial"}


@dataclass(frozen=True)
class TokenRisk:
    """What the heads say at one token: a risk in [0, 1] or NaN, and the number of the likeliest category."""

    risk: float
    category: int


class StreamReader:
    """Runs one model folder.

    Args:
        model: a hub id or a local folder.
        revision: commit or tag of a hub id.
        counted: risk levels whose probability is the risk.
        max_length: tokens that are judged, at most the model's own context.
        dtype: precision of the backbone; the heads compute in float32.
        device: `auto` takes cuda where there is one.
        guard: the guard's name, for messages.

    Attributes:
        categories: (C,) the model's names of its categories; empty where its config has none.
        context: tokens of prompt and response that can be read.

    Raises:
        ModelError: the folder holds no Qwen3Guard-Stream.
    """

    def __init__(
        self,
        model: str,
        revision: str | None,
        *,
        counted: Sequence[str],
        max_length: int,
        dtype: str,
        device: str,
        guard: str,
    ) -> None:
        import torch

        self._guard = guard
        folder = Path(resolve_model(model, revision))
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "guard_inner_size" not in settings:
            raise ModelError(
                f"guardrail '{guard}': '{model}' is no Qwen3Guard-Stream, since its config.json has no guard_inner_size; "
                "name one of Qwen/Qwen3Guard-Stream-*, or take type qwen3guard for Qwen3Guard-Gen"
            )
        levels = list(settings.get("response_risk_level_map", _LEVELS).values())
        if sorted(levels) != sorted(_LEVELS.values()):
            raise ModelError(
                f"guardrail '{guard}': the risk levels of '{model}' are {levels} and must be {list(_LEVELS.values())} in some order; "
                "this is another kind of model"
            )
        self._counted = [levels.index(level) for level in counted]
        self.categories: list[str] = list(settings.get("response_category_map", {}).values())
        self._tokenizer, loaded = _loaded(folder, settings, dtype, guard)
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"guardrail '{guard}': the tokenizer of '{model}' has no chat template; restore it from the published model"
            )
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._model = loaded.to(place).eval().requires_grad_(False)
        self.context: int = min(max_length, loaded.config.max_position_embeddings)
        self._frames: dict[tuple[str, ...], Frame] = {}
        names = [re.escape(str(token)) for token in self._tokenizer.added_tokens_decoder.values()]
        # Where any added token's name begins in a text; `split_special_tokens` spares names that are not special.
        self._name = re.compile(f"(?={'|'.join(names)})") if names else None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation up to where the answer begins, in the model's own chat template.

        Raises:
            UnrenderableError: a role or a text that cannot be shown.
        """
        roles = tuple(message["role"] for message in messages)
        if strange := [role for role in roles if role not in _ROLES]:
            raise UnrenderableError(f"role {strange[0]!r} is not one of {', '.join(_ROLES)}")
        if roles not in self._frames:
            self._frames[roles] = Frame(self._tokenizer, self._outline(roles), self._guard)
        return self._frames[roles].fill([message["content"] for message in messages])

    def _outline(self, roles: tuple[str, ...]) -> list[str]:
        from jinja2 import TemplateError

        places = [f"\ue000{number}\ue001" for number in range(len(roles))]
        turns = [{"role": role, "content": place} for role, place in zip(roles, places, strict=True)]
        try:
            rest = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except TemplateError as error:
            raise UnrenderableError(f"the chat template refuses these messages ({error})") from error
        pieces = []
        for number, place in enumerate(places):
            before, found, rest = rest.partition(place)
            if not found:
                raise UnrenderableError(f"the chat template does not show message {number} (role '{roles[number]}')")
            pieces.append(before)
        return [*pieces, rest]

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a response and the character offset where each ends, never decreasing. No token's name in it counts.

        Raises:
            UnrenderableError: the text is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnrenderableError("the text is not valid Unicode (a lone surrogate)") from error
        # The name of a token is encoded in two parts, so that it never becomes that token.
        inside = {match.start() + 1 for match in self._name.finditer(text)} if self._name else set()
        borders = sorted({0, len(text), *inside})
        ids: list[int] = []
        ends: list[int] = []
        for start, end in itertools.pairwise(borders):
            part = self._tokenizer(
                text[start:end], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            ids += part["input_ids"]
            for _, offset in part["offset_mapping"]:
                ends.append(max(start + offset, ends[-1] if ends else 0))
        return ids, ends

    def run(self, rows: Sequence[Sequence[int]]) -> list[list[TokenRisk]]:
        """(B, T_b) what the heads say at every token, in one forward."""
        import torch

        longest = max(len(row) for row in rows)
        # Padding stands on the right, where causal attention never looks: no mask is needed.
        batch = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        return [read[: len(row)] for read, row in zip(self._forward(batch, None), rows, strict=True)]

    def extend(self, ids: Sequence[int], cache: Any) -> list[TokenRisk]:
        """(T,) the same for ids that follow what `cache` holds; the cache grows by them."""
        import torch

        return self._forward(torch.tensor([list(ids)]), cache)[0]

    def new_cache(self) -> Any:
        """An empty key-value cache for `extend`."""
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _forward(self, batch: Any, cache: Any) -> list[list[TokenRisk]]:
        import torch

        with torch.inference_mode():
            level_BTL, category_BTC = self._model(batch.to(self._model.device), cache)
            risk_BT = level_BTL.softmax(dim=-1)[..., self._counted].sum(dim=-1).clamp(max=1.0)
            kind_BT = category_BTC.argmax(dim=-1)
            return [
                [TokenRisk(risk, kind) for risk, kind in zip(risks, kinds, strict=True)]
                for risks, kinds in zip(risk_BT.tolist(), kind_BT.tolist(), strict=True)
            ]


def _loaded(folder: Path, settings: dict[str, Any], dtype: str, guard: str) -> tuple[Any, Any]:
    """The tokenizer and the model, all of whose weights came from the folder."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config

    config = Qwen3Config.from_dict({k: v for k, v in settings.items() if k not in ("auto_map", "architectures")})
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, info = _model_class().from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"guardrail '{guard}': model '{folder}' could not be loaded ({error}); check its name, folder or access"
        ) from error
    for kind in ("missing_keys", "unexpected_keys"):
        if found := sorted(info[kind]):
            raise ModelError(
                f"guardrail '{guard}': the weights of '{folder}' have {kind.replace('_', ' ')} ({', '.join(found[:3])}), so they are "
                "not those of a Qwen3Guard-Stream; name a published one"
            )
    return tokenizer, model


def _model_class() -> Any:
    import torch
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3PreTrainedModel, Qwen3RMSNorm

    class ResponseHeads(Qwen3PreTrainedModel):
        """A Qwen3 model with the two heads that judge responses; module names are those of the weights."""

        _keys_to_ignore_on_load_unexpected = (r"^query_", r"^lm_head\.")

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            inner = config.guard_inner_size
            self.model = Qwen3Model(config)
            self.risk_level_category_pre = torch.nn.Linear(config.hidden_size, inner, bias=False)
            self.risk_level_category_layernorm = Qwen3RMSNorm(inner, eps=config.rms_norm_eps)
            self.risk_level_head = torch.nn.Linear(inner, config.num_risk_level, bias=False)
            self.category_head = torch.nn.Linear(inner, config.num_category, bias=False)
            self.post_init()

        def forward(self, input_ids: Any, cache: Any) -> tuple[Any, Any]:
            """(B, T, levels) and (B, T, categories) logits in float32."""
            states = self.model(
                input_ids=input_ids, past_key_values=cache, use_cache=cache is not None
            ).last_hidden_state
            linear = torch.nn.functional.linear
            inner = linear(states.float(), self.risk_level_category_pre.weight.float())
            x = self.risk_level_category_layernorm(inner)
            return linear(x, self.risk_level_head.weight.float()), linear(x, self.category_head.weight.float())

    return ResponseHeads
