"""tiered serve as a process of its own: listed, warned about, and drained before it ends."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner
from serving import call, make_checkpoint

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from tiered.commands import find
from tiered.commands.serve import is_local

pytestmark = pytest.mark.slow  # compiles kernels


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = make_checkpoint(tmp_path / "tiny-moe")
    process = subprocess.Popen(
        [sys.executable, "-m", "tiered", "serve", str(path), "--port", "0", "--host", "0.0.0.0",
         "--threads", "1", "--context", "512", "--quantize", "none", "--prefill-chunk", "64"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    lines: list[str] = []
    ready = threading.Event()

    def read():
        for line in process.stderr:
            lines.append(line)
            if " at http://" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        ready.wait()
        assert process.poll() is None, lines
        yield process, lines, int(lines[-1].split(" (page)")[0].rsplit(":", 1)[1])
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def test_it_warns_is_listed_and_finishes_what_it_has_begun(server):
    process, lines, port = server
    assert any("give it an --api-key" in line for line in lines)
    listed = json.loads(CliRunner().invoke(find("ps"), ["--json"]).output)["servers"]
    assert [(facts["pid"], facts["name"]) for facts in listed] == [(process.pid, "tiny-moe")]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    response.readline()  # it has begun
    assert CliRunner().invoke(find("stop"), ["tiny-moe"]).exit_code == 0
    chunks = response.read().decode()
    assert chunks.rstrip().endswith("[DONE]") and '"finish_reason":"length"' in chunks
    connection.close()
    assert process.wait(60) == 0
    assert json.loads(CliRunner().invoke(find("ps"), ["--json"]).output) == {"servers": []}
    assert CliRunner().invoke(find("stop"), []).exit_code == 2


def test_an_interrupt_ends_it(server):
    process, _, port = server
    assert call(port, "GET", "/health")[0] == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.1.1.1", False),
    ],
)
def test_local_addresses(host, local):
    assert is_local(host) is local
