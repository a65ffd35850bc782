"""A guard whose risk goes through a fitted calibration, whatever its family.

    guard:
      type: calibrated
      calibration: llama-guard.json
      guard: {type: prompted, model: ...}

A calibration says what *one* guard's numbers mean, so it carries that guard's name and a fingerprint of what
decides its answers, and is refused for any other.
"""

import hashlib
import importlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ballast.errors import ConfigError, GuardError
from ballast.guardrails.asking import ask
from ballast.guardrails.calibration import Calibration, Method
from ballast.guardrails.calibration_fit import CalibrationReport, check_labels, fit_calibration
from ballast.guardrails.engines.server_state import ServerHealth
from ballast.guardrails.registry import ENTRY_POINT_GROUP, OPTIONS, NestedGuardOptions, PluginOptions, load_guardrail
from ballast.guardrails.remote import servers_of
from ballast.guardrails.types import Exchange, Guardrail, GuardSession, Message, RiskTrace, StreamingGuardrail
from ballast.models import file_sha256

# How a guard is run and when it gives up, which changes no risk beyond rounding.
_HOW_IT_RUNS = frozenset(
    {
        "api_key_env",
        "backoff_s",
        "batch_size",
        "concurrent",
        "connections",
        "device",
        "dtype",
        "engine",
        "hedge_quantile",
        "max_length",
        "min_label_mass",
        "retries",
        "self_check",
        "timeout_s",
    }
)


class CalibratedOptions(BaseModel):
    """Options of a guard with a calibration on top."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["calibrated"] = "calibrated"
    guard: NestedGuardOptions = Field(description="options of the guard that judges, of any type")
    calibration: str = Field(min_length=1, description="JSON file of the calibration that was fitted for that guard")


def guard_fingerprint(options: BaseModel) -> str:
    """What decides a guard's answers, as a hash: its options but those of speed, its files, its weights.

    A model that is a local folder counts by the content of its files and not by its place; one on the hub by
    its id and revision, so pin the revision; a plug-in by its name, options and package version.
    """
    return hashlib.sha256(json.dumps(_deciding(options), sort_keys=True).encode()).hexdigest()[:32]


def _deciding(value: Any) -> Any:
    """Plain data of `value`; the same for two guards that answer alike."""
    if isinstance(value, (list, tuple)):
        return [_deciding(part) for part in value]
    if not isinstance(value, BaseModel):
        return value
    if getattr(value, "type", None) not in OPTIONS:
        return value.model_dump(mode="json")
    found = {name: _deciding(getattr(value, name)) for name in type(value).model_fields if name not in _HOW_IT_RUNS}
    if isinstance(value, PluginOptions):
        points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        found["version"] = next((p.dist.version for p in points if p.name == value.name and p.dist), None)
    for name in ("model", "calibration"):
        if isinstance(found.get(name), str) and (path := Path(found[name]).expanduser()).exists():
            found[name] = _content(path)
    # A guard that ships its weights names their file WEIGHTS in its module.
    weights = getattr(importlib.import_module(type(value).__module__), "WEIGHTS", None)
    if isinstance(weights, Path):
        found["weights"] = file_sha256(weights)
    return found


def _content(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return {file.name if path.is_dir() else "": file_sha256(file) for file in files}


class CalibratedGuard:
    """A guard's risk, calibrated cut by cut; what it left unscored stays unscored.

    Args:
        guard: the guard that judges.
        calibration: what was fitted for it.
        fingerprint: `guard_fingerprint` of the guard's options.

    Raises:
        ConfigError: the calibration was fitted for another guard.
    """

    def __init__(self, guard: Guardrail, calibration: Calibration, fingerprint: str) -> None:
        if calibration.guard != guard.name:
            raise ConfigError(
                f"the calibration was fitted for guard '{calibration.guard}' and this is '{guard.name}'; risks of two guards mean "
                "different things: fit one for this guard, or name that one"
            )
        if calibration.fingerprint != fingerprint:
            raise ConfigError(
                f"the calibration was fitted for guard '{guard.name}' with the fingerprint {calibration.fingerprint[:12]}... and this one "
                f"has {fingerprint[:12]}...: its model, template, labels or weights differ; fit it again, or restore those options"
            )
        self.guard, self.calibration = guard, calibration
        self.name = f"calibrated:{guard.name}"

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """Judge as the guard within does, then calibrate; categories and label mass are passed on."""
        return [
            replace(trace, risk=tuple(self.calibration(risk) for risk in trace.risk))
            for trace in self.guard.assess(exchanges, cuts)
        ]

    def servers(self) -> tuple[ServerHealth, ...]:
        """(S,) the servers of the guard within; none where it asks none."""
        return servers_of(self.guard)


class CalibratedStreamingGuard(CalibratedGuard):
    """A calibrated guard over one that can follow a response as it grows."""

    guard: StreamingGuardrail

    def open(self, messages: Sequence[Message]) -> GuardSession:
        """Begin a session of the guard within; its risks are calibrated."""
        return _CalibratedSession(self.guard.open(messages), self.calibration)


class _CalibratedSession:
    def __init__(self, session: GuardSession, calibration: Calibration) -> None:
        self._session, self._calibration = session, calibration

    def push(self, text: str) -> float | None:
        return self._calibration(self._session.push(text))


def calibrated_guard(options: CalibratedOptions) -> CalibratedGuard:
    """Any guard with a fitted calibration on top of its risk.

    Raises:
        ConfigError: the calibration was fitted for another guard.
        DataError: the file is missing, or holds no calibration.
    """
    calibration = Calibration.load(Path(options.calibration).expanduser())
    guard = load_guardrail(options.guard)
    kind = CalibratedStreamingGuard if isinstance(guard, StreamingGuardrail) else CalibratedGuard
    return kind(guard, calibration, guard_fingerprint(options.guard))


def calibrate_guard(
    options: BaseModel,
    exchanges: Sequence[Exchange],
    unsafe: Sequence[bool],
    *,
    method: Method = "temperature",
    benign_quantile: float | None = 0.9,
    benign: Sequence[bool] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    on_scored: Callable[[int], None] | None = None,
) -> tuple[Calibration, CalibrationReport]:
    """Judge labelled responses with a guard and fit a calibration that is bound to it.

    The risk is that of the whole response. A guard that is to judge prefixes is calibrated on exchanges whose
    responses are prefixes, each with its own label.

    Args:
        options: options of the guard, not calibrated yet.
        exchanges: (N,) what was labelled; rows with equal messages count as one prompt.
        unsafe: (N,) the labels.
        method: see `fit_calibration`, as for the other arguments.
        benign_quantile: the floor, as a quantile of the risk of benign rows.
        benign: (N,) rows that the floor is chosen on.
        seed: of split and bootstrap.
        batch_size: exchanges a call of the guard.
        on_scored: called with the number of rows scored so far.

    Raises:
        ConfigError: the guard carries a calibration already.
        DataError: rows that nothing can be fitted on; what can be seen of it is refused before the guard is asked.
        GuardError: the guard could not score one row, or broke its contract.
    """
    if isinstance(options, CalibratedOptions):
        raise ConfigError("the guard carries a calibration already; calibrate the guard within it, options.guard")
    prompts = [json.dumps(exchange.messages) for exchange in exchanges]
    check_labels(unsafe, prompts, seed=seed)
    guard = load_guardrail(options)
    traces: list[RiskTrace] = []
    for start in range(0, len(exchanges), batch_size):
        part = exchanges[start : start + batch_size]
        traces += ask(guard, part, [(len(exchange.response),) for exchange in part])
        if on_scored:
            on_scored(len(traces))
    if not any(trace.scored for trace in traces):
        raise GuardError(
            f"guardrail '{guard.name}' could not score one of {len(traces)} rows (the first: {traces[0].reason}); see what it "
            "answers with `ballast guard check`, and call this again"
        )
    return fit_calibration(
        [trace.risk[0] for trace in traces],
        unsafe,
        prompts=prompts,
        guard=guard.name,
        fingerprint=guard_fingerprint(options),
        method=method,
        benign_quantile=benign_quantile,
        benign=benign,
        seed=seed,
    )
