from __future__ import annotations

import pytest

from guestfault.paging.source.base import SourceError, close
from guestfault.paging.source.location import is_url, name_of, open_bytes, open_pages


@pytest.mark.parametrize("kind", ["file", "http", "nbd"])
@pytest.mark.parametrize("open_", [open_bytes, open_pages])
def test_bytes_wherever_they_are(serve, path, content, read, kind, open_) -> None:
    where = str(path) if kind == "file" else serve(kind, path).url
    source = open_(where)
    try:
        assert source.size == len(content)
        assert read(source, 17, 50000) == content[17:50017]
    finally:
        close(source)


def test_small_reads_of_a_remote_source_are_made_large(serve, path, content, read) -> None:
    server = serve("http", path)
    source = open_pages(server.url)
    try:
        for page in range(37):
            assert read(source, page * 4096) == content[page * 4096 :][:4096]
    finally:
        close(source)
    assert server.stats()["requests"] == 2 + 3  # its first byte, its beginning, and 3 blocks


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("/nowhere", "/nowhere: No such file or directory"),
        ("/dev", "Is a directory"),
        ("ftp://host/x", "no pages can be had by ftp; use http, https, nbd or nbd"),
        ("HTTP://127.0.0.1:1/x?secret", "http://127.0.0.1:1/x: Connection refused"),
    ],
)
def test_what_cannot_be_opened_is_named_and_not_waited_for(where: str, says: str) -> None:
    with pytest.raises(SourceError, match=says) as caught:
        open_pages(where)
    assert "secret" not in str(caught.value)


def test_words() -> None:
    assert is_url("nbd+unix:///x?socket=y")
    assert not is_url("a/b://c")
    assert not is_url("/a:b")
    assert name_of("nbd+unix:///x?socket=y") == "nbd+unix:///x?socket=y"
    assert name_of("https://u:p@h/x?q") == "https://h/x"
