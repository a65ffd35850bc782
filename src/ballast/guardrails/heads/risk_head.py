"""The trained part of the embedded guard: a head over hidden states, and a low-rank adapter of the blocks below it.

Shape letters: T response tokens + 1 (the end of the prompt comes first), F features, H hidden units, R rank.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ballast.errors import GuardError
from ballast.models import EMBEDDED_WEIGHTS_SHA256

if TYPE_CHECKING:
    import torch

ADAPTER = "adapter."


@dataclass(frozen=True)
class Reading:
    """How a trace of logits is read; see `RiskHead`.

    Attributes:
        memory: in [0, 1]; 0 reads each position by itself.
        settled: response tokens that the maximum leaves out.
        discount: share of the prompt's own logit that is taken off.
    """

    memory: float = 0.0
    settled: int = 0
    discount: float = 0.0

    def of(self, logit: "torch.Tensor") -> "torch.Tensor":
        """What is read (T,) of the logits (T,), the first of which is the prompt's."""
        read = logit.clone()
        later = logit[self.settled + 1 :]
        read[self.settled + 1 :] = (
            (1 - self.memory) * later + self.memory * later.cummax(0).values if len(later) else later
        )
        return read - self.discount * logit[0]


class RiskHead:
    """Two-layer perceptron over views of a conversation so far.

    For token t: its hidden states, their mean over the response so far, the hidden states at the end of the
    prompt and their mean over the prompt, in hidden units whose own mean over the response so far counts, too:

        u_t = gelu(W_now x_t + W_mean mean(x_0..x_t) + W_prompt x_0 + W_request p + b1)
        logit_t = w . u_t + v . mean(u_0..u_t) + b2

    where x are standardised hidden states (L * D), index 0 is the end of the prompt and p is the mean of x over
    the prompt. Products with a mean are taken before it, so a whole response costs O(T). What is read of it:

        read_t = (1 - memory) * logit_t + memory * max(logit_s, settled < s <= t) - discount * logit_0

    The maximum keeps an unsafe passage in mind when the text goes on harmlessly; the first `settled` response tokens,
    which are mostly a guess from the prompt, are read as they are.

    Args:
        tensors: `mean`, `scale` (F,), `now`, `average`, `prompt` (H, F), `bias` (H,), `out` (H,),
            `out_bias` (1,); and `request` (H, F) and `pooled` (H,) = v, either absent where it is zero; any float
            type.
        layers: blocks of the frozen model that x is made of.
        adapter: what is added to the frozen model's weights, `up @ down` a weight, as `BLOCK.MODULE.down` (R, in) and
            `BLOCK.MODULE.up` (out, R); blocks count from 1, and none may stand above the highest of `layers`.
        reading: memory, settled and discount.
        default_system: whether the head reads conversations with the chat template's own system message; see
            `Backbone`.
    """

    def __init__(
        self,
        tensors: "Mapping[str, torch.Tensor]",
        layers: Sequence[int],
        default_system: bool = False,
        adapter: "Mapping[str, torch.Tensor] | None" = None,
        reading: Reading | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.default_system = default_system
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        self.reading = reading or Reading()
        self.adapter = {name: tensor.float() for name, tensor in (adapter or {}).items()}

    @classmethod
    def load(cls, path: Path) -> "RiskHead":
        """Read a head from safetensors.

        Raises:
            GuardError: the file was made for other weights of the frozen model.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("backbone") != EMBEDDED_WEIGHTS_SHA256:
            raise GuardError(
                f"embedded guard: '{path}' was trained on the weights {str(metadata.get('backbone'))[:16]}..., and this version "
                f"carries {EMBEDDED_WEIGHTS_SHA256[:16]}...; train it again with benchmarks/train_guards.py"
            )
        layers = [int(layer) for layer in metadata["layers"].split(",")]
        adapter = {name.removeprefix(ADAPTER): tensors.pop(name) for name in list(tensors) if name.startswith(ADAPTER)}
        reading = Reading(**json.loads(metadata.get("reading", "{}")))
        return cls(tensors, layers, metadata.get("default_system", "yes") == "yes", adapter, reading)

    def save(self, path: Path) -> None:
        """Write head and adapter as float16 safetensors, with the layers and the hash of the weights they belong to."""
        import torch
        from safetensors.torch import save_file

        metadata = {
            "backbone": EMBEDDED_WEIGHTS_SHA256,
            "layers": ",".join(map(str, self.layers)),
            "default_system": "yes" if self.default_system else "no",
            "reading": json.dumps(asdict(self.reading)),
        }
        tensors = self.tensors | {f"{ADAPTER}{name}": tensor for name, tensor in self.adapter.items()}
        save_file({name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}, path, metadata)

    def risk(self, states: "torch.Tensor", prompt_length: int = 1) -> list[float]:
        """Risk (T,) at the end of the prompt and at every response token.

        Args:
            states: hidden states (prompt_length - 1 + T, F) of the rendered prompt and the response after it.
            prompt_length: tokens of the rendered prompt; T is 0 where `states` ends before it does.
        """
        import torch

        with torch.inference_mode():
            logit = self.logits(states, prompt_length)
            if not len(logit):
                return []
            return list(torch.sigmoid(self.reading.of(logit)).cpu().tolist())

    def logits(self, states: "torch.Tensor", prompt_length: int = 1) -> "torch.Tensor":
        """Logit (T,) of each position by itself; arguments as of `risk`."""
        import torch

        tensors = {name: tensor.to(states.device) for name, tensor in self.tensors.items()}
        x = (states[prompt_length - 1 :] - tensors["mean"]) / tensors["scale"]
        if not len(x):
            return x.new_zeros(0)
        count = torch.arange(1, len(x) + 1, device=x.device)[:, None]
        hidden = x @ tensors["now"].T + (x @ tensors["average"].T).cumsum(0) / count
        hidden = hidden + tensors["prompt"] @ x[0] + tensors["bias"]
        if "request" in tensors:
            hidden += tensors["request"] @ ((states[:prompt_length].mean(0) - tensors["mean"]) / tensors["scale"])
        units = torch.nn.functional.gelu(hidden)
        logit = units @ tensors["out"] + tensors["out_bias"]
        if "pooled" in tensors:
            logit = logit + (units @ tensors["pooled"]).cumsum(0) / count[:, 0]
        return logit
