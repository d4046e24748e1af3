"""The bytes of a file behind an http(s) URL, from any byte on, by the standard library's client.

Not fsspec's: that one holds whole bodies in memory, follows a redirect anywhere, does not say whether a
server heeded a range, and keeps a thread that does not survive a fork.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import lru_cache
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPResponse, HTTPSConnection
from typing import IO, Any
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from data_pipeline.transfer import Failure, Patience

CHUNK = 1 << 20  # bytes asked for at once; what has arrived is taken
COUNT = re.compile("[0-9]{1,18}")
BUSY = (408, 425, 429, *range(500, 600))  # what a server answers that may do better in a moment


def web_body(url: str, start: int, size: int | None, patience: Patience) -> Iterator[bytes]:
    """The file from byte `start` on, in chunks; Failure where the server answers with anything else.

    `size` is what the file should have. A server without ranges sends all of it: what is there already is
    skipped.
    """
    headers = {"User-Agent": "lockstep", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    asked = request.Request(url, headers=headers)  # noqa: S310  # check_url let it through
    try:
        with closing(_opener().open(asked, timeout=patience.seconds)) as answer:
            skip, left = _extent(answer, start, size)
            yield from _chunks(answer, skip, left, patience)
    except HTTPError as error:
        error.close()
        raise _refusal(error) from None
    except URLError as error:
        final = isinstance(error.reason, ssl.SSLCertVerificationError)
        raise Failure(f"no connection: {error.reason}", final=final) from None
    except TimeoutError:
        raise Failure(f"nothing came for {patience.seconds:g} s", slow=True) from None
    except UnicodeError as error:
        raise Failure(f"no host can have this name: {error}", final=True) from None
    except (OSError, HTTPException) as error:
        raise Failure(f"the connection broke: {error or type(error).__name__}") from None


def _chunks(answer: HTTPResponse, skip: int, left: int | None, patience: Patience) -> Iterator[bytes]:
    """The body without its first `skip` bytes. Each piece has its time, so that a trickle is noticed."""
    came, began = 0, time.monotonic()
    while chunk := answer.read1(CHUNK):
        if left is not None:
            left -= len(chunk)
        came += len(chunk)
        if came >= patience.piece:
            came, began = 0, time.monotonic()
        elif time.monotonic() > began + patience.seconds:
            raise Failure(f"{came} bytes in {patience.seconds:g} s are too slow", slow=True)
        dropped = min(skip, len(chunk))
        skip -= dropped
        if dropped < len(chunk):
            yield chunk[dropped:] if dropped else chunk
    if left:
        raise Failure(f"the connection broke {left} bytes before the end of what was promised")


def _extent(answer: HTTPResponse, start: int, size: int | None) -> tuple[int, int | None]:
    """How much of the body comes before byte `start`, and all of it; Failure where it does not fit."""
    body = answer.length
    if answer.status != 206:  # the whole file
        first, total = 0, body
    else:
        unit, _, extent = answer.headers.get("Content-Range", "").partition(" ")
        span, _, whole = extent.partition("/")
        if unit != "bytes" or span.split("-")[0] != str(start):
            raise Failure(f"asked for byte {start} on, it sent {unit} {extent}", final=True)
        first, total = start, int(whole) if COUNT.fullmatch(whole) else None
    if size is not None and total is not None and (total > size or (first and total < size)):
        raise Failure(f"there it has {total} bytes", final=True)
    return start - first, body


def _refusal(error: HTTPError) -> Failure:
    if error.code == 416:  # asked for bytes behind its end
        _, _, whole = error.headers.get("Content-Range", "").partition("/")
        return Failure(f"there it has {whole or 'fewer'} bytes (HTTP status 416)", final=True)
    wait = error.headers.get("Retry-After", "")
    return Failure(
        f"HTTP status {error.code} {error.reason}".rstrip(),
        final=error.code not in BUSY,
        unsafe=300 <= error.code < 400,
        wait=float(wait) if COUNT.fullmatch(wait) else 0.0,
    )


class _Prompt(HTTPConnection):
    """Ends when the head of an answer is not there in time: a trickle is never silent for long."""

    def getresponse(self) -> HTTPResponse:
        """The answer; TimeoutError where its head takes longer than the connection's time-out."""
        late = threading.Event()
        connected = self.sock

        def cut() -> None:
            late.set()
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

        assert self.timeout is not None
        timer = threading.Timer(self.timeout, cut)
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()
        finally:
            timer.cancel()
            if late.is_set():
                raise TimeoutError


class _PromptTls(_Prompt, HTTPSConnection):
    pass


class _Http(request.HTTPHandler):
    def http_open(self, req: request.Request) -> HTTPResponse:
        return self.do_open(_Prompt, req)


class _Https(request.HTTPSHandler):
    def https_open(self, req: request.Request) -> HTTPResponse:
        return self.do_open(_PromptTls, req)


class _SameHost(request.HTTPRedirectHandler):
    """Follows a redirect within its scheme and host; one that leads elsewhere ends there, unopened."""

    def redirect_request(  # noqa: PLR0917  # urllib's signature
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> request.Request | None:
        here, there = urlsplit(req.full_url), urlsplit(newurl)
        if (here.scheme, here.netloc) != (there.scheme, there.netloc):
            fp.close()
            raise Failure(
                f"it sends to another place, {newurl!r} (HTTP status {code})", final=True, unsafe=True
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@lru_cache(maxsize=1)
def _opener() -> Any:
    """An opener of http(s), through the proxies of the environment: urllib's own also reads file and ftp."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(),
        _Http(),
        _Https(),
        request.HTTPErrorProcessor(),
        request.HTTPDefaultErrorHandler(),
        _SameHost(),
    ):
        opener.add_handler(handler)
    return opener
