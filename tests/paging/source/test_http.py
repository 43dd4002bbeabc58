"""Against a real server over real sockets, which stalls, dies and lies when it is told to."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from contextlib import closing

import pytest

from guestfault.paging.source.base import (
    SourceError,
    SourceInterruptedError,
    SourceUnavailableError,
)
from guestfault.paging.source.http import HttpSource, without_secrets

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def server(serve, path):
    return serve("http", path)


@pytest.fixture
def source(server):
    with closing(HttpSource(server.url, timeout=2)) as source:
        yield source


def test_it_gives_the_files_bytes(source, content, read) -> None:
    assert source.size == len(content)
    assert read(source, 0, len(content)) == content
    for offset, length in [(0, 1), (4096, 4096), (len(content) - 5, 5), (17, 60000)]:
        assert read(source, offset, length) == content[offset : offset + length]
    with pytest.raises(SourceError, match=f"it has {len(content)} bytes"):
        read(source, len(content) - 5, 6)


def test_a_long_read_is_made_in_pieces(serve, tmp_path, read) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(range(251)) * 10000)
    server = serve("http", path)
    with closing(HttpSource(server.url)) as source:
        assert read(source, 1, source.size - 1) == path.read_bytes()[1:]
    assert server.stats()["requests"] == 1 + 3


def test_one_connection_serves_one_reader_for_ever(source, server, read) -> None:
    for page in range(20):
        read(source, page * 4096)
    stats = server.stats()
    assert (stats["connections"], stats["requests"]) == (1, 21)


def test_as_many_connections_as_readers_and_they_overlap(source, server, content, read) -> None:
    server.be("delay 0.05")
    got: dict[int, bytes] = {}

    def reader(first: int) -> None:
        for page in range(first, 32, 4):
            got[page] = read(source, page * 4096)

    threads = [threading.Thread(target=reader, args=(n,)) for n in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 32 * 0.05
    assert {page: content[page * 4096 :][:4096] for page in range(32)} == got
    assert server.stats()["most"] == 4
    assert server.stats()["connections"] == 4


@pytest.mark.parametrize("how", ["close", "until the end", "chunked", "trickle"])
def test_other_ways_to_send_a_body(serve, path, content, read, how) -> None:
    server = serve("http", path)
    server.be(how)
    with closing(HttpSource(server.url, timeout=20)) as source:
        length = 40 if how == "trickle" else 9000
        assert read(source, 4096, length) == content[4096 : 4096 + length]
        assert read(source, 1, 3) == content[1:4]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("wrong range", "asked for 'bytes 4096-8191/151675', it gave 'bytes 4097-8192/151675'"),
        ("wrong total", "asked for 'bytes 4096-8191/151675', it gave 'bytes 4096-8191/151676'"),
        ("no range", "asked for 'bytes 4096-8191/151675', it gave 'nothing'"),
        ("wrong length", "Content-Length is 4095 for 4096 bytes"),
        ("chunked long", "more than 4096 bytes came"),
        ("changed", 'the file has changed: it was ETag "first", Last-Modified Thu, 01 Jan'),
        ("touched", "the file has changed: .*, and is .*Fri, 02 Jan 2026"),
        ("encoded", "it is encoded: gzip"),
        ("whole", "the server does not serve ranges of this file"),
        ("status 404", "404 Because"),
        ("status 416", "416 Because"),
        ("status 302", "302 Because"),
        ("garbage", "no answer in HTTP"),
    ],
)
def test_a_lie_is_an_error_that_is_not_waited_for(source, server, content, read, how, says) -> None:
    server.be(how)
    with pytest.raises(SourceError, match=says) as caught:
        read(source, 4096)
    assert not isinstance(caught.value, SourceUnavailableError)
    assert (caught.value.offset, caught.value.length) == (4096, 4096)
    assert server.url in str(caught.value)
    server.be("good")  # nothing of the lie is left on any connection
    assert read(source, 4096) == content[4096:8192]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("die", "connection"),
        ("cut", "the connection ended after 2048 of 4096 bytes"),
        ("chunked cut", "the connection ended"),
        ("stall", "no answer within 0.3 s"),
        ("trickle", "no answer within 0.3 s"),
        ("status 503", "503 Because"),
        ("status 429", "429 Because"),
    ],
)
def test_what_may_pass_is_said_to_be_so(server, content, read, how, says) -> None:
    with closing(HttpSource(server.url, timeout=0.3)) as source:
        server.be(how)
        began = time.monotonic()
        with pytest.raises(SourceUnavailableError, match=says):
            read(source, 4096)
        assert time.monotonic() - began < 1
        server.be("good")
        assert read(source, 4096) == content[4096:8192]


def test_a_server_that_was_restarted_meanwhile_is_not_a_failure(
    source, server, content, read
) -> None:
    read(source, 0)
    server.kill()
    server.start()
    assert read(source, 4096) == content[4096:8192]


def test_a_server_that_is_gone_and_comes_back(source, server, content, read) -> None:
    server.kill()
    for _ in range(2):
        with pytest.raises(SourceUnavailableError, match="Connection refused"):
            read(source, 4096)
    server.start()
    assert read(source, 4096) == content[4096:8192]


@pytest.mark.parametrize("how", ["stall", "trickle"])
def test_a_wait_can_be_ended(serve, path, content, read, how) -> None:
    server = serve("http", path)
    with closing(HttpSource(server.url, timeout=60)) as source:
        server.be(how)
        errors: list[SourceError] = []

        def reader() -> None:
            with pytest.raises(SourceInterruptedError) as caught:
                read(source, 4096)
            errors.append(caught.value)

        threads = [threading.Thread(target=reader) for _ in range(3)]
        for thread in threads:
            thread.start()
        while server.stats()["requests"] < 4:
            time.sleep(0.01)
        began = time.monotonic()
        source.interrupt()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < 0.5
        assert len(errors) == 3
        with pytest.raises(SourceInterruptedError):
            read(source, 0)
        source.resume()
        server.be("good")
        assert read(source, 4096) == content[4096:8192]


def test_a_connection_that_is_never_accepted_can_be_ended(read) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        address = listening.getsockname()
        full = [socket.create_connection(address)]  # the backlog has room for it
        url = "http://{}:{}/x".format(*address)
        began = time.monotonic()
        with pytest.raises(SourceUnavailableError, match=r"no answer within 0\.2 s"):
            HttpSource(url, timeout=0.2)
        assert time.monotonic() - began < 1
        for connection in full:
            connection.close()


def test_a_redirection_is_followed_when_it_is_opened(serve, path, content, read) -> None:
    server = serve("http", path)
    server.be("redirect")
    with closing(HttpSource(server.url.replace("/guest", "/old"))) as source:
        assert source.url.endswith("/new")
        assert read(source, 4096) == content[4096:8192]
    server.be("round")
    with pytest.raises(SourceError, match="more than 5 redirections"):
        HttpSource(server.url)


def test_a_password_is_sent_and_not_shown(serve, path, content, read) -> None:
    server = serve("http", path)
    server.be("secret")
    with pytest.raises(SourceError, match="401 Unauthorized"):
        HttpSource(server.url)
    url = server.url.replace("//", "//me:p%26w@") + "?signature=xyz"
    with closing(HttpSource(url)) as source:
        assert read(source, 4096) == content[4096:8192]
        assert source.url == server.url
        server.be("status 404")
        with pytest.raises(SourceError) as caught:
            read(source, 0)
        assert "p%26w" not in str(caught.value)
        assert "xyz" not in str(caught.value)


@pytest.fixture
def certificate(tmp_path):
    """A key and a certificate for localhost, and for nobody else."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl(1), to make a certificate")
    pem = tmp_path / "pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", pem, "-out", tmp_path / "crt"]
    subprocess.run([*words, *names, *files], check=True, capture_output=True)
    pem.write_bytes(pem.read_bytes() + (tmp_path / "crt").read_bytes())
    return pem


def test_https(serve, path, content, read, certificate, monkeypatch) -> None:
    server = serve("https", path, certificate)
    url = server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(SourceError, match="self-signed certificate") as caught:
        HttpSource(url)
    assert not isinstance(caught.value, SourceUnavailableError)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(SourceError, match="IP address mismatch"):
        HttpSource(server.url)
    with closing(HttpSource(url, timeout=2)) as source:
        assert read(source, 0, len(content)) == content
        server.be("close")
        assert read(source, 17, 9000) == content[17:9017]
        assert read(source, 17, 9000) == content[17:9017]
        server.be("stall")
        timer = threading.Timer(0.2, source.interrupt)
        timer.start()
        with pytest.raises(SourceInterruptedError):
            read(source, 0)
        timer.join()


def test_an_empty_file_is_refused(serve, tmp_path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    server = serve("http", tmp_path / "empty")
    server.be("status 416")
    with pytest.raises(SourceError, match="the file is empty"):
        HttpSource(server.url)


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "http:///x", "http://host:99999/x", "http://host:port/x"]
)
def test_a_url_that_is_none_is_refused(url) -> None:
    with pytest.raises(SourceError):
        HttpSource(url)


def test_a_host_that_is_not_one() -> None:
    with pytest.raises(SourceUnavailableError):
        HttpSource(f"http://{'a' * 70}.invalid/x")


def test_secrets() -> None:
    shown = without_secrets("https://a:b@h:1/p?q=1#f")
    assert shown == "https://h:1/p"
