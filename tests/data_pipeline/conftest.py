"""A real HTTP server on loopback that serves a folder, and misbehaves where it is told to."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest


@dataclass
class Manners:
    """How a path is answered. `times` counts the answers that misbehave; after them all is well."""

    times: int = 1 << 30
    status: int = 200  # another one is the whole answer
    location: str = ""  # of a redirect
    retry_after: str = ""
    ranges: bool = True
    drop_after: int | None = None  # bytes of the body, then the connection is cut
    claim: int | None = None  # Content-Length that is said, whatever comes; the body ends there
    bytes_a_second: float | None = None
    slow_header: bool = False


@dataclass
class Request:
    path: str
    first: int  # byte that was asked for; -1 where the answer was a refusal
    sent: int  # bytes of the body


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path = unquote(self.path.partition("?")[0])
        with self.server.lock:
            manners = self.server.manners.get(path, Manners())
            if manners.times <= 0:
                manners = Manners()
            manners.times -= 1
        file = self.server.root / path.lstrip("/")
        if manners.slow_header:
            self.trickle(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n", 10)
        if manners.status != 200 or not file.is_file():
            self.refuse(path, manners)
            return
        content = file.read_bytes()
        first, last = self.span(len(content)) if manners.ranges else (None, None)
        if first is not None and first >= len(content):
            self.refuse(path, Manners(status=416), f"bytes */{len(content)}")
            return
        part = content if first is None else content[first:last]
        self.send_response(200 if first is None else 206)
        if first is not None:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("ETag", '"one"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(part) if manners.claim is None else manners.claim))
        self.end_headers()
        if not body:
            return
        if manners.claim is not None:
            part = part[: manners.claim]
        self.give(path, first or 0, part, manners)

    def span(self, size):
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return None, None
        return int(found[1]), int(found[2]) + 1 if found[2] else size

    def give(self, path, first, part, manners):
        """Send the body as far as manners go. It is in the log before the client can have all of it."""
        if manners.drop_after is not None:
            part = part[: manners.drop_after]
        slow = manners.bytes_a_second
        self.server.note(path, first, sent=0 if slow else len(part))
        if slow:
            self.trickle(part, slow)
        else:
            with suppress(ConnectionError):
                self.wfile.write(part)
        if manners.drop_after is not None or manners.claim is not None:
            self.close_connection = True

    def trickle(self, part, pace):
        """A byte at a time, or what a twentieth of a second allows."""
        step = max(1, int(pace / 20))
        with suppress(ConnectionError):
            for start in range(0, len(part), step):
                if self.server.ending.is_set():
                    return
                self.wfile.write(part[start : start + step])
                time.sleep(step / pace)

    def refuse(self, path, manners, span=""):
        status = manners.status if manners.status != 200 else 404
        self.server.note(path, -1, sent=0)
        with suppress(ConnectionError):
            self.send_response(status)
            for name, value in {
                "Location": manners.location,
                "Retry-After": manners.retry_after,
                "Content-Range": span,
            }.items():
                if value:
                    self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()


class Server(ThreadingHTTPServer):
    """Serves `root`; `manners` by path say how, `log` is what was asked for."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.manners: dict[str, Manners] = {}
        self.log: list[Request] = []
        self.lock = threading.Lock()
        self.ending = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def behave(self, path, **manners):
        """Answer a path like this from now on."""
        self.manners[path] = Manners(**manners)

    def note(self, path, first, *, sent):
        with self.lock:
            self.log.append(Request(path, first, sent))

    def asked(self, path):
        """The first byte of each request for a path, -1 for one that was refused."""
        return [request.first for request in self.log if request.path == path]

    def handle_error(self, *_):
        pass  # a client that goes away is what some tests are about


@pytest.fixture
def serve():
    """`serve(folder)` gives a running server of it."""
    servers = []

    def start(root):
        server = Server(root)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.ending.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy_on_loopback(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
