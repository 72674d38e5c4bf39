"""Finding a model's files: local directories as they are, Hub repositories through a client that is replaced here."""

import logging
import threading
import time
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from infer import hub
from infer.config import EngineConfig
from infer.models.source import read_model


@pytest.fixture(autouse=True)
def private_tmp(tmp_path, monkeypatch):
    """Lock files of this test alone, and no token or working directory of the person who runs it."""
    directory = tmp_path / "private"
    directory.mkdir()
    monkeypatch.setattr(hub, "private_directory", lambda: directory)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    workplace = tmp_path / "cwd"
    workplace.mkdir()
    monkeypatch.chdir(workplace)


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A Hub whose only repository is this directory; records the calls it gets."""

    class Hub:
        def __init__(self):
            self.directory = tmp_path / "snapshot"
            self.directory.mkdir()
            self.calls = []
            self.error = None

        def add(self, *names):
            for name in names:
                (self.directory / name).write_text("{}")

        def download(self, repo, **options):
            self.calls.append((repo, options))
            if self.error is not None:
                raise self.error
            return str(self.directory)

    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.download)
    return fake


def http_error(kind, status):
    return kind("first line\nsecond line", response=httpx2.Response(status, request=httpx2.Request("GET", "http://hub")))


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_local_directory_is_returned_as_is(tmp_path, snapshot):
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve_model(str(tmp_path)) == tmp_path
    assert snapshot.calls == []


def test_local_directory_needs_a_config(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json") as error:
        hub.resolve_model(str(tmp_path))
    assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "../model", "~/no-such-model", "a/b/c", "models/", "."])
def test_paths_never_reach_the_hub(name, snapshot):
    with pytest.raises(ValueError) as error:
        hub.resolve_model(name)
    assert repr(name) in one_line(error)
    assert snapshot.calls == []


def test_a_file_is_not_a_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        hub.resolve_model(str(path))


def test_gguf_is_refused_by_name(tmp_path, snapshot, monkeypatch):
    file = tmp_path / "tiny-Q4_K_M.gguf"
    file.write_text("")
    with pytest.raises(ValueError, match=r"tiny-Q4_K_M\.gguf' is a GGUF file: GGUF checkpoints are not supported"):
        hub.resolve_model(str(file))
    with pytest.raises(ValueError, match=r"no config\.json, but tiny-Q4_K_M\.gguf: GGUF checkpoints are not supported"):
        hub.resolve_model(str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, **_: ["README.md", "a.gguf"])
    with pytest.raises(ValueError, match=r"the Hub repository has no config\.json, but a\.gguf: GGUF .* safetensors"):
        hub.resolve_model("owner/name-GGUF", weights=False)


def test_weights_of_a_model_that_cannot_run_are_not_fetched(snapshot):
    (snapshot.directory / "config.json").write_text('{"architectures": ["FalconForCausalLM"]}')
    with pytest.raises(ValueError, match="FalconForCausalLM is not supported"):
        read_model(EngineConfig(model="owner/name"))
    (call,) = snapshot.calls
    assert not any("safetensors" in pattern for pattern in call[1]["allow_patterns"])


def test_an_empty_name_is_refused():
    with pytest.raises(ValueError, match="model is empty"):
        hub.resolve_model("")


def test_a_revision_of_a_directory_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="'v2'"):
        hub.resolve_model(str(tmp_path), revision="v2")


def test_download_asks_for_model_files_only(snapshot, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    snapshot.add("config.json", "model.safetensors")
    assert hub.resolve_model("owner/name", "v2", str(tmp_path / "cache")) == snapshot.directory
    (repo, options), = snapshot.calls
    assert (repo, options["revision"], options["cache_dir"]) == ("owner/name", "v2", str(tmp_path / "cache"))
    assert options["token"] == "secret"
    files = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "chat_template.jinja", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.json",
        "merges.txt", "special_tokens_map.json",
    ]  # fmt: skip
    others = [
        "pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.safetensors",
        "README.md", "modeling_custom.py", "training_args.bin", "model.gguf",
    ]  # fmt: skip
    kept = huggingface_hub.utils.filter_repo_objects(
        files + others, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
    )
    assert list(kept) == files


def test_weights_can_be_left_out(snapshot):
    snapshot.add("config.json")
    assert hub.resolve_model("owner/name", weights=False) == snapshot.directory
    assert not any("safetensors" in pattern for pattern in snapshot.calls[0][1]["allow_patterns"])


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (http_error(errors.RepositoryNotFoundError, 404), "no such repository"),
        (http_error(errors.GatedRepoError, 403), "set HF_TOKEN"),
        (http_error(errors.RevisionNotFoundError, 404), "no such revision"),
        (http_error(errors.HfHubHTTPError, 401), "refuses the token"),
        (http_error(errors.HfHubHTTPError, 500), "HfHubHTTPError: first line"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (errors.HFValidationError("bad name\nmore"), "nor is it a Hub id: bad name"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (httpx2.ProxyError("proxy says no"), "proxy says no"),
    ],
)
def test_failures_are_one_clear_line(snapshot, raised, told):
    snapshot.error = raised
    with pytest.raises(ValueError) as error:
        hub.resolve_model("owner/name", revision="v2")
    message = one_line(error)
    assert told in message and "'owner/name' (revision 'v2')" in message


def test_pickled_weights_are_named(snapshot, monkeypatch):
    snapshot.add("config.json")
    files = ["config.json", "pytorch_model-1.bin", "pytorch_model-2.bin"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, **_: files)
    with pytest.raises(ValueError, match=r"only pytorch_model-1\.bin and 1 more; give .* safetensors"):
        hub.resolve_model("owner/name")


def test_no_weights_and_no_list_of_files(snapshot, monkeypatch):
    def refuse(repo, **_):
        raise OSError("unreachable")

    snapshot.add("config.json")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    with pytest.raises(ValueError, match=r"no \*\.safetensors .*unreachable"):
        hub.resolve_model("owner/name")


def test_one_download_while_the_others_wait(snapshot, caplog):
    snapshot.add("config.json", "model.safetensors")
    started, done = threading.Event(), threading.Event()

    def slow(repo, **options):
        snapshot.calls.append((repo, options))
        if not options["local_files_only"]:
            started.set()
            assert done.wait(10)
        return str(snapshot.directory)

    huggingface_hub.snapshot_download = slow  # the fixture's monkeypatch puts the real one back
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(hub.resolve_model("owner/name"))) for _ in range(3)]
    with caplog.at_level(logging.INFO, logger="infer"):
        threads[0].start()
        assert started.wait(10)
        for thread in threads[1:]:
            thread.start()
        deadline = time.monotonic() + 10
        while caplog.text.count("waiting for") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        done.set()
        for thread in threads:
            thread.join(10)
    assert results == [snapshot.directory] * 3
    assert [options["local_files_only"] for _, options in snapshot.calls] == [False, True, True]
    assert "the download of model 'owner/name'" in caplog.text


def test_a_waiting_rank_downloads_where_the_first_failed(snapshot, monkeypatch):
    snapshot.add("config.json", "model.safetensors")

    def not_cached(repo, **options):
        snapshot.calls.append(options["local_files_only"])
        if options["local_files_only"]:
            raise errors.LocalEntryNotFoundError("nothing there")
        return str(snapshot.directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_cached)
    with hub._host_lock("model 'owner/name' to the Hub cache", "the test"):
        thread = threading.Thread(target=hub.resolve_model, args=("owner/name",))
        thread.start()
        time.sleep(0.2)
        assert snapshot.calls == []
    thread.join(10)
    assert snapshot.calls == [True, False]


def test_tokenizer_directory(tmp_path, snapshot):
    with pytest.raises(ValueError, match=r"neither a tokenizer\.json nor a tokenizer\.model"):
        hub.resolve_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert hub.resolve_tokenizer(str(tmp_path)) == tmp_path
    snapshot.add("tokenizer.model")
    assert hub.resolve_tokenizer("owner/name") == snapshot.directory
    assert "config.json" not in snapshot.calls[0][1]["allow_patterns"]


def test_served_name(tmp_path, monkeypatch):
    assert hub.served_name("meta-llama/Llama-3.1-8B") == "Llama-3.1-8B"
    assert hub.served_name("gpt2") == "gpt2"
    directory = tmp_path / "My-Model"
    directory.mkdir()
    assert hub.served_name(str(directory)) == hub.served_name(f"{directory}/") == "My-Model"
    monkeypatch.chdir(directory)
    assert hub.served_name(".") == "My-Model"
