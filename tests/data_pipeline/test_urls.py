from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.fault import UserError
from data_pipeline.urls import check_url, file_url, folder_url, local_path, scheme_of, tars_url

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "text",
    [
        *("photos", "/data/O'Brien's photos; old", "../up", "./pipe:touch x", "~/x", "https", "/data/a::b"),
        *("file:///data/x", "file://localhost/data/x"),
        *("http://host/x", "HTTPS://host.org:8443/x/y/", "http://[::1]:8000/x", "http://host/a b/ä+%20~(1)"),
        *("s3://bucket", "s3://my.bucket/a b/c", "gs://bucket_2/x"),
    ],
)
def test_a_path_and_a_plain_url_of_the_five_schemes_are_let_through(text):
    assert check_url(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "pipe:touch canary",
            "PIPE:touch canary",
            "pipe://x",
            "ftp://host/x",
            "hf://x",
            "hf:x",
            "scp:host:x",
        ),
        *("ssh://host/x", "data:,x", "memory://x", "local://x", "gopen:x", "http+unix://x", "javascript:x"),
        *("simplecache::http://host/x", "zip://a::http://host/x", "http://host/x::zip://y", "s3://b/x::/y"),
        *("-o/tmp/x", "--upload-file", "-"),
        *(
            "http://host/x\ny",
            "photos\n",
            "pho\x00tos",
            "http://host/\x7f",
            "http://host/%0a",
            "file:///a%00b",
        ),
        *(
            "http://host/'; touch canary'",
            'http://host/"',
            "http://host/`id`",
            "http://host/$(id)",
            "s3://b/a|b",
        ),
        *(
            "http://host/{000..002}",
            "http://host/*",
            "http://host/x?token=1",
            "http://host/x#y",
            "s3://b/[ab]",
        ),
        *("http:host/x", "http:/host/x", "file:x", "file://other/x", "http:///x", "s3://", "http://host:x/"),
        *(
            "http://name:s3cr3t@host/x",
            "http://host:0/",
            "http://host:70000/",
            "http://ho st/x",
            "s3://b/../c",
        ),
        *("http://host/a/../b", "http://host/..", "http://host/./x", "http://evil\u202ehost/"),
    ],
)
def test_everything_else_is_unsafe_at_once_and_says_why_in_one_line(text):
    with pytest.raises(UserError) as caught:
        check_url(text)
    assert caught.value.code == "UNSAFE"
    assert len(caught.value.what.splitlines()) == 1
    assert "s3cr3t" not in caught.value.what + caught.value.mend


@given(st.text(max_size=30), st.sampled_from(["", "http://h/", "s3://b/", "pipe:", "file:///", "x::"]))
def test_no_text_brings_the_check_down_and_what_it_lets_through_has_an_allowed_scheme(text, start):
    with suppress(UserError):
        checked = check_url(start + text)
        assert scheme_of(checked) in {"", "file", "http", "https", "s3", "gs"}
        assert "\n" not in checked
        assert not checked.startswith("-")


def test_checking_a_url_loads_nothing_heavy():
    code = "import sys, data_pipeline.urls; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"numpy", "torch", "fsspec", "http.client"} & set(done.stdout.split()) == set()


def test_a_file_url_is_the_folder_it_names():
    assert local_path(check_url("file:///data/my%20photos")) == Path("/data/my photos")
    assert local_path("data/my%20photos") == Path("data/my%20photos")


def test_names_are_encoded_for_http_and_left_alone_for_object_stores():
    assert (
        file_url(folder_url("HTTP://Host/ä b%20/"), "x?#%.tar") == "http://Host/%C3%A4%20b%20/x%3F%23%25.tar"
    )
    assert file_url(folder_url("s3://bucket/ä b/"), "x?#%.tar") == "s3://bucket/ä b/x?#%.tar"


@pytest.mark.parametrize(
    ("tars", "expected"),
    [
        ("", "http://host/x"),
        (".", "http://host/x"),
        ("./tars//a", "http://host/x/tars/a"),
        ("a b", "http://host/x/a%20b"),
        ("s3://bucket/y/", "s3://bucket/y"),
    ],
)
def test_tars_of_a_remote_data_set_lie_beside_it_below_it_or_at_their_own_url(tars, expected):
    assert tars_url("http://host/x", tars) == expected


@pytest.mark.parametrize(
    "tars", ["/etc", "file:///etc", "../other", "a/../../other", "pipe:x", "C:x", "a\nb", "ftp://h/x", "a?b"]
)
def test_a_remote_data_set_may_not_name_a_place_of_this_machine_or_above_itself(tars):
    with pytest.raises(UserError) as caught:
        tars_url("http://host/x", tars)
    assert caught.value.code == "UNSAFE"
