"""The command `ballast serve`: a tuned model behind its gateway, under the template that it was trained with.

In order: the contract is checked, the port taken, vLLM started on a private one, what it really tokenises compared with
the contract, and only then the gateway opened. vLLM ends with this process, however that ends.
"""

import importlib.util
import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ballast.errors import EngineError

if TYPE_CHECKING:
    from rich.console import Console

    from ballast.pipeline.serving.model_server import ModelServer
    from ballast.pipeline.serving.target import Target

_SAY_EVERY_S = 15.0  # where no terminal shows the seconds


def serve(
    target: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a model folder, a hub id, embedded:smollm2-135m."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as serve.port=8000 or serve.guard=embedded.")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run: the LoRA over its base instead of the merged weights.")
    ] = False,
    adopt_template: Annotated[
        bool, typer.Option("--adopt-template", help="A model without a contract: take its tokenizer as it is.")
    ] = False,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt of a model without a contract.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt and its answer; the model's own limit without it.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Answers that vLLM writes at once.")] = 64,
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.05, max=1.0, help="Share of the GPU for vLLM.")] = 0.9,
    cpu_kv_cache_gib: Annotated[int, typer.Option(min=1, help="KV cache on a CPU, in GiB.")] = 1,
    eager: Annotated[bool, typer.Option("--eager", help="Start without compiling: sooner up, slower after.")] = False,
    start_timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that vLLM may take to start.")] = 900.0,
    log: Annotated[str | None, typer.Option(metavar="FILE", help="vLLM's output; a temporary file without it.")] = None,
) -> None:
    """Serve a tuned model behind the gateway in which the guardrail works while the answer is written."""
    from ballast.pipeline.quiet import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from ballast.pipeline.serving.model_server import ServerOptions
    from ballast.pipeline.serving.target import open_target

    _check_extra()
    found = open_target(target, overrides or (), adapter=adapter, adopt=adopt_template, system_prompt=system_prompt)
    options = ServerOptions(
        model=str(found.model),
        name=found.name,
        adapter=None if found.adapter is None else str(found.adapter),
        lora_rank=found.lora_rank,
        dtype=found.dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        cpu_kv_cache_gib=cpu_kv_cache_gib,
        enforce_eager=eager,
    )
    signal.signal(signal.SIGTERM, _stop)
    console = Console(stderr=True)
    path = _log_file(log)
    kept = True  # where something failed
    try:
        _serve(found, options, path, start_timeout, console)
        kept = False
    finally:
        if log is None and (not kept or path.stat().st_size == 0):
            path.unlink()


def _check_extra() -> None:
    missing = [
        name for name in ("fastapi", "uvicorn", "prometheus_client", "vllm") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise EngineError(
            f"`ballast serve` needs {', '.join(missing)}, which is not installed; install the extras: "
            "`pip install 'ballast-rl[serve,gpu]'`, or serve,cpu on a machine without a GPU"
        )


class _StopError(Exception):
    """SIGTERM: an orderly end was asked for."""


def _stop(*_: Any) -> None:
    raise _StopError


def _log_file(log: str | None) -> Path:
    if log is not None:
        return Path(log).expanduser()
    with tempfile.NamedTemporaryFile(prefix="ballast-vllm-", suffix=".log", delete=False) as handle:
        return Path(handle.name)


def _serve(target: "Target", options: Any, log: Path, start_timeout: float, console: "Console") -> None:
    """Everything up, until a signal; then everything down."""
    from ballast.guardrails.registry import load_guardrail
    from ballast.pipeline.serving.app import create_app
    from ballast.pipeline.serving.contract import check_served
    from ballast.pipeline.serving.model_server import ModelServer
    from ballast.pipeline.serving.server import listen

    contract, settings = target.prompt_format.contract(), target.settings
    model_server = ModelServer(options, log)
    sock = listen(settings.host, settings.port, settings.limits.stall_timeout_s)
    try:
        app = create_app(
            settings,
            model_server.url,
            None if target.guard is None or settings.unguarded else load_guardrail(target.guard),
            system_prompt=contract.serving_system_prompt,
            default_system_prompt=target.prompt_format.default_system_prompt(),
            special_tokens=list(contract.special_tokens),
            models=[target.name],
            upstream_key=model_server.key,
        )
        with model_server:
            _wait(model_server, start_timeout, console)
            check_served(target.prompt_format.serving(), model_server.tokenize)
            console.print("vLLM tokenises as the contract says", style="dim")
            if app.state.gateway.judge is None:
                console.print("no guardrail: every answer is released unjudged (serve.unguarded)", style="yellow")
            host, port = sock.getsockname()[:2]
            say = f"serving '{target.name}' at http://{host}:{port}/v1"
            _open(app, sock, model_server, lambda: console.print(say, highlight=False, markup=False, soft_wrap=True))
    except (_StopError, KeyboardInterrupt):  # SIGINT is an orderly end as well
        console.print("stopped", style="dim")
    finally:
        sock.close()


def _wait(model_server: "ModelServer", timeout_s: float, console: "Console") -> None:
    said = 0.0
    with console.status("starting vLLM") as status:

        def show(seconds: float) -> None:
            nonlocal said
            if console.is_terminal:
                status.update(f"starting vLLM: {seconds:.0f} s (its output: {model_server.log})")
            elif seconds - said >= _SAY_EVERY_S:
                said = seconds
                console.print(f"starting vLLM: {seconds:.0f} s", highlight=False)

        model_server.wait(timeout_s, show)


def _open(app: Any, sock: Any, model_server: "ModelServer", ready: Any) -> None:
    """Serve until a signal, or until vLLM ends.

    Raises:
        EngineError: vLLM ended by itself.
    """
    from ballast.pipeline.serving.server import server

    gateway = server(app, ready)
    over, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if not model_server.running:
                ended.set()
                gateway.should_exit = True  # answers under way are told, and the gateway closes
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        gateway.run(sockets=[sock])
    finally:
        over.set()
        watcher.join()
    if ended.is_set():
        raise model_server.ended()
