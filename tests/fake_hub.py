"""A hub on localhost that has what a test gives it, and can break in the ways that hubs break."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from urllib.parse import unquote

COMMIT = "c" * 40


class Hub(http.server.ThreadingHTTPServer):
    """`files` by name; `cut` ends a file's next answer after so many bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.seen, self.ranges = {}, None, [], True
        self.wrong = set()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server
        hub.seen.append((self.path, self.headers.get("Authorization"), self.headers.get("Range")))
        if self.path.startswith("/api/models/user/repo/"):
            body = json.dumps({"sha": COMMIT, "siblings": [entry(hub, n) for n in hub.files]})
            return self.answer(200, body.encode())
        if not self.path.startswith(f"/user/repo/resolve/{COMMIT}/"):
            return self.answer(404, b"{}")
        body = hub.files[unquote(self.path.split("/", 5)[5])]
        start, end, wanted = "0", "", self.headers.get("Range")
        if hub.ranges and wanted:
            start, end = wanted.removeprefix("bytes=").split("-")
        body = body[int(start) : int(end) + 1 if end else None]
        cut, hub.cut = hub.cut, None
        return self.answer(206 if hub.ranges and wanted else 200, body, cut)

    def answer(self, status, body, cut=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client may have read enough
            self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = True

    def log_message(self, *_):
        pass


def entry(hub, name):
    body = hub.files[name]
    if name in hub.wrong:
        body = body[::-1] + b""
    item = {"rfilename": name, "size": len(hub.files[name])}
    if name.endswith((".gguf", ".safetensors")):
        item["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}
    else:
        item["blobId"] = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    return item


@contextlib.contextmanager
def running(tmp_path, monkeypatch):
    """A hub that HF_ENDPOINT names, with a cache of its own."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.files = {
        "m-Q4_K_M.gguf": bytes(range(256)) * 40,
        "m-Q8_0-00001-of-00002.gguf": b"first" * 100,
        "m-Q8_0-00002-of-00002.gguf": b"second" * 100,
        "README.md": b"hello",
    }
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
