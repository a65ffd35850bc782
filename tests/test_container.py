"""The Dockerfile and the compose files of `ballast serve`: what they open, who runs, and that what they name is there."""

import http.server
import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import yaml

from ballast.errors import ConfigError
from ballast.pipeline.serving.target import _settings

ROOT = Path(__file__).parents[1]


def instructions():
    """(name, argument) of each line of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def last_stage():
    steps = instructions()
    begin = max(i for i, (name, _) in enumerate(steps) if name == "FROM")
    return steps[begin:]


def argument(name):
    (found,) = [value for step, value in last_stage() if step == name]
    return found


@pytest.fixture
def gateway():
    return yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["gateway"]


def test_the_port_is_published_to_this_machine_alone(gateway):
    assert gateway["ports"] == ["127.0.0.1:${BALLAST_PORT:-8080}:8080"]
    assert "network_mode" not in gateway
    assert argument("EXPOSE") == "8080"


def test_nobody_runs_as_root_and_nothing_can_become_it(gateway):
    user = argument("USER")
    assert user == gateway["user"] == "10001:10001"
    names = [name for name, _ in last_stage()]
    assert "RUN" not in names[names.index("USER") :]
    assert gateway["cap_drop"] == ["ALL"]
    assert gateway["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in gateway
    assert "cap_add" not in gateway


def test_the_root_is_read_only_and_what_is_written_goes_where_it_may(gateway):
    assert gateway["read_only"] is True
    assert gateway["tmpfs"] == ["/tmp"]
    model, cache = gateway["volumes"]
    assert (model["target"], model["read_only"]) == ("/model", True)
    assert cache == "cache:/cache"
    settings = dict(part.split("=", 1) for part in shlex.split(argument("ENV")))
    written = {
        "HOME",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "HF_HOME",
        "VLLM_CACHE_ROOT",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
    }
    assert written <= settings.keys()
    assert all(settings[name].startswith("/cache") for name in written)


def test_it_does_not_start_without_keys_and_holds_none(gateway):
    assert gateway["environment"]["BALLAST_API_KEYS"].startswith("${BALLAST_API_KEYS:?")
    assert "BALLAST_API_KEYS" not in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_asks_health_and_both_files_have_the_same(gateway, status):
    words = json.loads(argument("HEALTHCHECK").partition("CMD ")[2])
    assert ["CMD", *words] == gateway["healthcheck"]["test"]
    options = dict(re.findall(r"--(\S+)=(\S+)", argument("HEALTHCHECK")))
    assert {key.replace("-", "_"): value for key, value in options.items()} == {
        key: str(value) for key, value in gateway["healthcheck"].items() if key != "test"
    }
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        program = words[-1].replace(":8080/", f":{server.server_port}/")
        code = subprocess.run([sys.executable, "-I", *words[1:-1], program], capture_output=True, timeout=60).returncode
        server.shutdown()
    assert asked == ["/health"]
    assert (code == 0) == (status == 200)


def test_the_command_is_one_that_ballast_serve_takes(gateway):
    assert json.loads(argument("ENTRYPOINT")) == ["ballast", "serve"]
    for place, *overrides in (json.loads(argument("CMD")), gateway["command"]):
        assert place == "/model"
        given = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", override) for override in overrides]
        settings = _settings(given)
        # Inside the container every address; the published port decides who reaches it.
        assert (settings.host, settings.port, settings.require_key) == ("0.0.0.0", 8080, True)
    assert settings.guard.type == "embedded"
    with pytest.raises(ConfigError):
        _settings(["serve.prot=8080"])


def test_what_is_copied_and_installed_is_there():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [value.split()[:-1] for step, value in instructions() if step == "COPY" and not value.startswith("--")]
    names = {name.removeprefix("./") for one in copied for name in one}
    assert names == allowed
    assert all((ROOT / name).exists() for name in names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= names
    extras = project["project"]["optional-dependencies"]
    assert {"cpu", "gpu", "embedded", "serve"} <= extras.keys()
    assert '".[${EXTRA},embedded,serve]"' in (ROOT / "Dockerfile").read_text()


def test_a_gpu_is_an_addition_to_the_same_service(gateway):
    added = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text())["services"]["gateway"]
    assert added["build"]["args"] == {"EXTRA": "gpu"}
    assert gateway["build"]["args"] == {"EXTRA": "cpu"}
    assert set(added) == {"image", "build", "deploy"}  # nothing of the above is taken back
