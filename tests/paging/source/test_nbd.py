"""Against qemu-nbd and nbdkit, and against a server of ours that does what those never would."""

from __future__ import annotations

import random
import shutil
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
from guestfault.paging.source.nbd import NbdSource

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def server(serve, path):
    return serve("nbd", path)


@pytest.fixture
def source(server):
    with closing(NbdSource(server.url, timeout=2)) as source:
        yield source


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def stock_url(request, path, tmp_path):
    """The URL of a file that a server of the distribution's serves, over a Unix domain socket."""
    program = shutil.which(request.param)
    if program is None:
        pytest.skip(f"no {request.param} here")
    at = tmp_path / "socket"
    words = {
        "nbdkit": [program, "-f", "-r", "-U", str(at), "-e", "guest", "file", str(path)],
        "qemu-nbd": [program, "-r", "-t", "-f", "raw", "-k", str(at), "-x", "guest", str(path)],
    }[request.param]
    with subprocess.Popen(words) as process:
        try:
            deadline = time.monotonic() + 10
            while not at.exists():
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.01)
            yield f"nbd+unix:///guest?socket={at}"
        finally:
            process.terminate()


def test_a_stock_server_gives_the_files_bytes_to_many_at_once(stock_url, content, read) -> None:
    with closing(NbdSource(stock_url)) as source:
        assert len(content) <= source.size < len(content) + 512  # qemu-nbd has whole sectors
        assert read(source, 0, len(content)) == content
        failures = []

        def reader(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(100):
                offset = chance.randrange(len(content))
                length = chance.randrange(1, min(9000, len(content) - offset) + 1)
                if read(source, offset, length) != content[offset : offset + length]:
                    failures.append((offset, length))

        threads = [threading.Thread(target=reader, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


@pytest.mark.parametrize("stock_url", ["qemu-nbd"], indirect=True)
def test_a_stock_server_has_no_export_of_another_name(stock_url) -> None:
    with pytest.raises(SourceError, match="it has no such export"):
        NbdSource(stock_url.replace("/guest", "/other"))


def test_several_requests_are_in_flight_on_one_connection(source, server, content, read) -> None:
    server.be("delay 0.05")
    got: dict[int, bytes] = {}

    def reader(first: int) -> None:
        for page in range(first, 32, 4):
            got[page] = read(source, page * 4096)

    threads = [threading.Thread(target=reader, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {page: content[page * 4096 :][:4096] for page in range(32)} == got
    stats = server.stats()
    assert (stats["connections"], stats["requests"]) == (1, 32)
    # The next request may be in before the server has counted that it answered the last.
    assert 2 <= stats["most"] <= 8


@pytest.mark.parametrize("how", ["aligned 1 4096", "aligned 4096 4096", "aligned 4096 8192"])
def test_a_server_may_be_choosy_about_where_reads_begin(serve, path, content, read, how) -> None:
    server = serve("nbd", path)
    server.be(how)
    with closing(NbdSource(server.url)) as source:
        for offset, length in [(0, 1), (4095, 2), (4096, 4096), (17, 60000)]:
            assert read(source, offset, length) == content[offset : offset + length]
        assert read(source, 100, len(content) - 100) == content[100:]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("error 5", "the server cannot read there: Input/output error"),
        ("wrong magic", "a reply begins with 0x668e33ef"),
        ("wrong cookie", "it answers what was not asked"),
    ],
)
def test_a_lie_is_an_error_that_is_not_waited_for(source, server, content, read, how, says) -> None:
    server.be(how)
    with pytest.raises(SourceError, match=says) as caught:
        read(source, 4096)
    assert not isinstance(caught.value, SourceUnavailableError)
    assert (caught.value.offset, caught.value.length) == (4096, 4096)
    server.be("good")
    assert read(source, 4096) == content[4096:8192]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("other service", "it is not an NBD server"),
        ("old", "it does not speak the fixed newstyle protocol"),
        ("sizeless", "it did not tell the size"),
        ("aligned 3 9", "its block sizes make no sense"),
        ("refuse 1", "it does not know NBD_OPT_GO; it is too old \\(for a reason\\)"),
        ("refuse 5", "it demands TLS"),
        ("refuse 99", "error 99"),
    ],
)
def test_a_server_that_will_not_do_is_refused_at_once(server, how, says) -> None:
    server.be(how)
    with pytest.raises(SourceError, match=says) as caught:
        NbdSource(server.url)
    assert not isinstance(caught.value, SourceUnavailableError)


def test_an_export_that_is_not_there(server) -> None:
    with pytest.raises(SourceError, match="it has no such export"):
        NbdSource(server.url.replace("/guest", "/nothing"))


def test_an_export_that_has_another_size_when_it_is_back(source, server, read) -> None:
    server.kill()
    server.start()
    server.be("resized")
    with pytest.raises(SourceError, match="the export has changed: it had 151675 bytes") as caught:
        read(source, 0)
    assert not isinstance(caught.value, SourceUnavailableError)


@pytest.mark.parametrize("how", ["die", "cut", "stall", "error 108"])
def test_what_may_pass_is_said_to_be_so(server, content, read, how) -> None:
    with closing(NbdSource(server.url, timeout=0.3)) as source:
        server.be(how)
        began = time.monotonic()
        with pytest.raises(SourceUnavailableError):
            read(source, 4096)
        assert time.monotonic() - began < 1
        server.be("good")
        assert read(source, 4096) == content[4096:8192]


def test_a_server_that_greets_nobody_is_given_up(server) -> None:
    server.be("mute")
    began = time.monotonic()
    with pytest.raises(SourceUnavailableError, match=r"no answer within 0\.2 s"):
        NbdSource(server.url, timeout=0.2)
    assert time.monotonic() - began < 1
    server.be("good")


def test_a_server_that_was_restarted_meanwhile_is_not_a_failure(
    source, server, content, read
) -> None:
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


def test_waits_can_be_ended_all_at_once(serve, path, content, read) -> None:
    server = serve("nbd", path)
    with closing(NbdSource(server.url, timeout=60)) as source:
        server.be("stall")
        ended = []

        def reader() -> None:
            with pytest.raises(SourceInterruptedError):
                read(source, 4096)
            ended.append(True)

        threads = [threading.Thread(target=reader) for _ in range(3)]
        for thread in threads:
            thread.start()
        while server.stats()["requests"] < 3:
            time.sleep(0.01)
        began = time.monotonic()
        source.interrupt()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < 0.5
        assert len(ended) == 3
        source.resume()
        server.be("good")
        assert read(source, 4096) == content[4096:8192]


def test_readers_survive_a_server_that_dies_again_and_again(serve, path, content, read) -> None:
    """A reply reaches the reader that asked, or nobody: never another, never half."""
    server = serve("nbd", path)
    with closing(NbdSource(server.url, timeout=2)) as source:
        stop = time.monotonic() + 2
        wrong: list[int] = []
        right: list[int] = []

        def reader(seed: int) -> None:
            chance = random.Random(seed)
            while time.monotonic() < stop:
                page = chance.randrange(37)
                try:
                    got = read(source, page * 4096)
                except SourceUnavailableError:
                    continue
                (right if got == content[page * 4096 :][:4096] else wrong).append(page)

        threads = [threading.Thread(target=reader, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        while time.monotonic() < stop:
            for how in ("die", "good", "cut", "good"):
                server.be(how)
                time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert not wrong
        assert right


@pytest.mark.parametrize(
    "url", ["nbd://", "nbd:///x", "nbd+unix:///x", "nbds://host/x", "nbd://host:99999/"]
)
def test_a_url_that_is_none_is_refused(url) -> None:
    with pytest.raises(SourceError):
        NbdSource(url)
