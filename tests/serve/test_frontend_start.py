"""The frontend beside a parent that is still starting: what it waits for, and how it is called off."""

import gc
import socket
import subprocess
import sys
import threading

import pytest

from infer.launch import lasting_imports
from infer.serve.link import FrontendConfig
from infer.serve.spawn import FrontendHandle, spawn_frontend


def spawn(tokenizer_path, **fields) -> FrontendHandle:
    path = str(tokenizer_path)
    return spawn_frontend(FrontendConfig(model_path=path, tokenizer_path=path, **fields))


def test_it_waits_for_a_port_that_becomes_free(tokenizer_path):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    timer = threading.Timer(0.5, taken.close)
    timer.start()
    try:
        handle = spawn(tokenizer_path, port=port, port_wait_s=30.0)
        assert not timer.is_alive(), "it took a port that another process had"
    finally:
        timer.cancel()
        taken.close()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5.0):
            pass  # it listens before it is ready
        handle.wait_ready()
        assert handle.port == port
    finally:
        handle.stop()


def test_it_does_not_wait_longer_than_told(tokenizer_path, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 is taken"):
            spawn(tokenizer_path, port=port, port_wait_s=0.3)
    assert not list(tmp_path.iterdir())


def test_one_that_nobody_waited_for_ends_without_a_word(tokenizer_path, capfd):
    handle = spawn(tokenizer_path, port=0)
    assert handle.stop() == -9
    assert not handle.socket_path.parent.exists()
    assert handle.stop() == -9
    assert capfd.readouterr().err == ""


def test_what_lasting_imports_make_is_left_to_no_collection():
    gc.unfreeze()
    try:
        with lasting_imports():
            assert not gc.isenabled()
            made = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() > len(made)
        gc.disable()
        with lasting_imports():
            pass
        assert not gc.isenabled(), "it was off before"
    finally:
        gc.enable()
        gc.unfreeze()


def test_the_frontend_is_started_without_torch():
    code = (
        "import sys, infer.serve.server, infer.serve.link, infer.hub, infer.models.source, infer.parallel.topology\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
