"""The frozen language model under the embedded guard: chat text to ids, ids to hidden states.

The guard's head was trained on the features of exactly one set of weights, so any others are refused, and
the copy is the guard's own: training the policy never moves it.

Shape letters: B rows of a batch, T tokens, L layers read, D width of the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ballast.errors import ModelError
from ballast.guardrails.types import Message
from ballast.models import EMBEDDED_WEIGHTS_SHA256, file_sha256

if TYPE_CHECKING:
    import torch

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Encoded:
    """One exchange as the guard's own tokens.

    Attributes:
        ids: prompt and response ids, joined.
        prompt_length: how many of them belong to the rendered prompt; the response follows.
        ends: for each response token, the character offset where it ends in the response; never decreasing.
    """

    ids: tuple[int, ...]
    prompt_length: int
    ends: tuple[int, ...]


class Backbone:
    """A frozen language model, cut off above the highest layer that is read.

    Args:
        folder: a model folder whose weights have the hash `EMBEDDED_WEIGHTS_SHA256`.
        layers: which blocks' outputs to read, counted from 1, increasing.
        dtype: "bfloat16", "float32", or "auto" (bfloat16 where the machine computes in it).
        device: "cpu", "cuda", ..., or "auto" (cuda where there is one).
        default_system: whether a conversation without a system message gets the chat template's own one (20
            tokens); as the head was trained.
        adapter: low-rank updates that are added to the weights when they are loaded; see `RiskHead`.

    Raises:
        ModelError: the weights are not the ones that the head was trained on.
    """

    def __init__(
        self,
        folder: Path,
        layers: Sequence[int],
        dtype: str = "auto",
        device: str = "auto",
        default_system: bool = False,
        adapter: "Mapping[str, torch.Tensor] | None" = None,
    ) -> None:
        check_weights(folder)
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.layers = tuple(layers)
        self.default_system = default_system
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=_dtype(dtype, self.device))
        self.context: int = model.config.max_position_embeddings
        self.width: int = model.config.hidden_size
        model.layers = model.layers[: max(self.layers)]
        model.config.num_hidden_layers = max(self.layers)
        merge(model, adapter or {})
        self._model = model.to(self.device).eval().requires_grad_(False)
        self._read: list[Any] = []
        for layer in self.layers:
            self._model.layers[layer - 1].register_forward_hook(self._keep)

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._read.append(output)

    def encode(self, messages: Sequence[Message], response: str) -> Encoded:
        """Tokens of the conversation as the chat template renders it, with the response as the answer.

        Only the template's own text can become special tokens: contents are encoded with
        `split_special_tokens=True`, so that a delimiter written inside them stays text.

        Raises:
            ValueError: a role that is not in `ROLES`, or text that is not valid Unicode.
        """
        prompt = self._encode_prompt(messages)
        answer = self.tokenizer(
            _valid(response), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        ends, last = [], 0
        for _, end in answer["offset_mapping"]:
            last = max(last, end)
            ends.append(last)
        return Encoded(ids=(*prompt, *answer["input_ids"]), prompt_length=len(prompt), ends=tuple(ends))

    def _encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        roles = [message["role"] for message in messages]
        if unknown := [role for role in roles if role not in ROLES]:
            raise ValueError(f"role {unknown[0]!r} is not one of {', '.join(ROLES)}")
        # The template is rendered around slots, and each content goes in as ids: text never meets the template.
        slots = [f"\ue000{number}\ue001" for number in range(len(messages))]
        outline: list[Message] = [{"role": role, "content": slot} for role, slot in zip(roles, slots, strict=True)]
        rest = self._render(outline)
        ids: list[int] = []
        for message, slot in zip(messages, slots, strict=True):
            before, rest = rest.split(slot, 1)
            ids += self.tokenizer(before, add_special_tokens=False)["input_ids"]
            ids += self.tokenizer(_valid(message["content"]), add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
        return ids + self.tokenizer(rest, add_special_tokens=False)["input_ids"]

    def _render(self, outline: list[Message]) -> str:
        if self.default_system or (outline and outline[0]["role"] == "system"):
            return str(self.tokenizer.apply_chat_template(outline, tokenize=False, add_generation_prompt=True))
        # The template writes a system turn wherever none is given: it gets a known one, which is cut off again.
        known = "\ue000system\ue001"
        with_system: list[Message] = [{"role": "system", "content": known}, *outline]
        text = str(self.tokenizer.apply_chat_template(with_system, tokenize=False, add_generation_prompt=True))
        after = text.split(known, 1)[1]
        return after[after.index(self.tokenizer.bos_token) :]

    def hidden(self, rows: Sequence[Sequence[int]]) -> "list[torch.Tensor]":
        """Hidden states of every token of every row in one forward, each row (T, L * D) in float32."""
        import torch

        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        # Padding stands on the right, where causal attention never looks: no mask is needed.
        batch = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.device)
        states = self._forward(batch, None)
        return [states[number, : len(row)] for number, row in enumerate(rows)]

    def extend(self, ids: Sequence[int], cache: Any) -> "torch.Tensor":
        """Hidden states (T, L * D) of `ids` after what `cache` holds; the cache grows by them."""
        import torch

        return self._forward(torch.tensor([list(ids)], device=self.device), cache)[0]

    def new_cache(self) -> Any:
        """An empty key-value cache for `extend`."""
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _forward(self, batch: "torch.Tensor", cache: Any) -> "torch.Tensor":
        import torch

        self._read.clear()
        with torch.inference_mode():
            self._model(input_ids=batch, past_key_values=cache, use_cache=cache is not None)
        states = torch.cat(self._read, dim=-1).float()  # (B, T, L * D)
        self._read.clear()
        return states


def merge(model: Any, adapter: "Mapping[str, torch.Tensor]") -> None:
    """Add `up @ down` to the weights of the blocks that `adapter` names, in float32, rounded once.

    Args:
        model: a model whose blocks stand in `layers`.
        adapter: `BLOCK.MODULE.down` (R, in) and `BLOCK.MODULE.up` (out, R), blocks counted from 1.
    """
    for name in sorted(name for name in adapter if name.endswith(".down")):
        place = name.removesuffix(".down")
        block, module = place.split(".", 1)
        weight = model.layers[int(block) - 1].get_submodule(module).weight
        weight.data = (weight.data.float() + adapter[f"{place}.up"] @ adapter[name]).to(weight.dtype)


def check_weights(folder: Path) -> None:
    """Refuse any weights but the ones that the shipped head was trained on.

    Raises:
        ModelError: another hash, or no weights at all.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ModelError(
            f"embedded guard: '{folder}' holds no model.safetensors; delete the folder, and it is converted anew"
        )
    found = file_sha256(path)
    if found != EMBEDDED_WEIGHTS_SHA256:
        raise ModelError(
            f"embedded guard: the weights '{path}' have sha256 {found[:16]}..., not {EMBEDDED_WEIGHTS_SHA256[:16]}...; "
            "its head reads the features of those weights only. Delete the folder, and it is converted anew"
        )


def _dtype(name: str, device: "torch.device") -> "torch.dtype":
    import torch

    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu.get_capabilities()
    return torch.bfloat16 if fast.get("avx512_bf16") or fast.get("amx_bf16") else torch.float32


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate at character {error.start}, so it is not valid Unicode"
        ) from error
    return text
