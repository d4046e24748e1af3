"""Which places a data set may lie in: a folder of this machine, or a URL of one of five schemes.

Nothing here reaches a shell; what looks like an attempt at one is refused before anything opens it.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from data_pipeline.fault import UserError

REMOTE = ("http", "https", "s3", "gs")
ALLOWED = ("file", *REMOTE)
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
HOST = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:[1-9][0-9]{0,4})?")
MOST_PORT = 65535
# Quotes and shell signs, what a driver takes for a pattern, a query or a second URL, steps out of the folder.
REFUSED = re.compile(r"""['"`\\;|<>$^{}*?#\[\]]|::|/\.\.?(?=/|$)""")
ASCII = "".join(map(chr, range(0x21, 0x7F)))


def check_url(text: str) -> str:
    """`text` if it is a path, or a file, http(s), s3 or gs URL of a folder; UNSAFE for everything else."""
    scheme = scheme_of(text)
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp") if scheme else ("Cc",)
    if any(unicodedata.category(letter) in hidden for letter in (unquote(text) if scheme else text)):
        raise _unsafe(text, "holds characters that cannot be seen", "write it without them")
    if text.startswith("-"):
        raise _unsafe(text, "starts with '-', as an option does", f"a folder of this name is ./{text}")
    if not scheme:
        return text
    allowed = ", ".join(f"{one}://" for one in ALLOWED)
    if scheme not in ALLOWED:
        raise _unsafe(
            text,
            f"would be read through '{scheme}:', which is not allowed",
            f"allowed are a path (with a colon in it: ./NAME), {allowed}",
        )
    rest = text[len(scheme) + 1 :]
    if not rest.startswith("//"):
        raise _unsafe(text, f"has no '//' behind '{scheme}:'", f"allowed are a path, {allowed}")
    host, _, path = rest[2:].partition("/")
    if "@" in host:
        raise _unsafe(
            f"{scheme}://…@{host.rpartition('@')[2]}/{path}",
            "comes with a name or password",
            "keep secrets out of URLs, because logs and run directories show them",
        )
    if scheme == "file" and host not in ("", "localhost"):
        raise _unsafe(text, "names a file of another machine", "write file:///FOLDER or a plain path")
    found = HOST.fullmatch(host)
    if scheme != "file" and (not found or int((found[2] or ":0")[1:]) > MOST_PORT):
        raise _unsafe(text, "has no host or bucket that can be read", f"write {scheme}://HOST/FOLDER")
    if sign := REFUSED.search(f"/{path}"):
        raise _unsafe(
            text, f"holds {sign[0]!r}", "give the plain URL of the folder, without a query or signs"
        )
    return text


def scheme_of(text: str) -> str:
    """The scheme of a URL in lower case; an empty string for a plain path."""
    found = SCHEME.match(text)
    return found[1].lower() if found else ""


def is_remote(text: str) -> bool:
    """Whether a checked place is reached over a network."""
    return scheme_of(text) in REMOTE


def is_object(text: str) -> bool:
    """Whether a checked place is in an object store."""
    return scheme_of(text) in ("s3", "gs")


def local_path(text: str) -> Path:
    """The folder that a checked path or file:// URL names."""
    return Path(unquote(urlsplit(text).path)) if scheme_of(text) == "file" else Path(text)


def folder_url(text: str) -> str:
    """A checked remote URL in one spelling: equal places give equal texts."""
    scheme, _, rest = text.partition("://")
    url = f"{scheme.lower()}://{rest.rstrip('/')}"
    # As a browser does: what no address can hold is encoded, what is encoded already stays as it is.
    return quote(url, safe=ASCII) if url.startswith("http") else url


def file_url(folder: str, name: str) -> str:
    """The URL of a file in a folder. Object stores take names as they are, HTTP takes them encoded."""
    return f"{folder}/{quote(name, safe='') if folder.startswith('http') else name}"


def tars_url(folder: str, tars: str) -> str:
    """Where the tars of a remote dataset.json lie: beside it, in a folder below it, or at a URL of their own.

    UNSAFE where it names a place of this machine, or one above its own folder: its author is a stranger.
    """
    if is_remote(tars):
        return folder_url(check_url(tars))
    if tars.startswith("/") or scheme_of(tars):
        raise _unsafe(tars, f"is no place for the tars of '{folder}'", "a folder below it or a URL may be")
    parts = [part for part in tars.split("/") if part not in ("", ".")]
    return folder_url(check_url("/".join([folder, *parts])))


def _unsafe(text: str, why: str, mend: str) -> UserError:
    return UserError(f"a data set at {text!r}: it {why}", mend=mend, code="UNSAFE")
