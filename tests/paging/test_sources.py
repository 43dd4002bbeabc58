from __future__ import annotations

import os
import traceback
from pathlib import Path

import pytest

from guestfault.errors import KernelError
from guestfault.paging.source.base import SourceError
from guestfault.paging.source.file import FileSource
from guestfault.paging.source.function import FunctionSource
from guestfault.paging.source.zero import ZeroSource

PAGE = 4096
CONTENT = bytes(range(256)) * 32  # two pages


def read(source, offset: int, length: int = PAGE) -> bytes:
    buffer = bytearray(length)
    with memoryview(buffer) as view:
        source.read_into(offset, view)
    return bytes(buffer)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def source(path: Path):
    source = FileSource(os.open(path, os.O_RDONLY))
    yield source
    source.close()


def test_a_file_gives_its_bytes_at_any_offset(source: FileSource) -> None:
    assert source.size == len(CONTENT)
    assert read(source, 0, len(CONTENT)) == CONTENT
    assert read(source, 100, 300) == CONTENT[100:400]


def test_a_short_file_is_an_error_and_not_a_short_page(source: FileSource) -> None:
    with pytest.raises(SourceError, match="the file ends after 8192 bytes") as caught:
        read(source, PAGE + 1)
    assert (caught.value.offset, caught.value.length) == (PAGE + 1, PAGE)


def test_a_file_truncated_while_open_is_an_error_and_not_a_signal(
    source: FileSource, path: Path
) -> None:
    os.truncate(path, PAGE + 17)
    assert read(source, 0) == CONTENT[:PAGE]
    with pytest.raises(SourceError, match="page source: 4096 bytes at 0x1000: the file ends"):
        read(source, PAGE)


def test_a_bad_descriptor_is_refused_at_once() -> None:
    with pytest.raises(SourceError, match="Bad file descriptor"):
        FileSource(-1)


def test_a_pipe_is_refused_at_once() -> None:
    ends = os.pipe()
    try:
        with pytest.raises(SourceError, match="Illegal seek"):
            FileSource(ends[0])
    finally:
        for end in ends:
            os.close(end)


def test_a_file_that_cannot_be_read_says_why(path: Path) -> None:
    source = FileSource(os.open(path, os.O_WRONLY))
    with pytest.raises(SourceError, match="0x1000: Bad file descriptor"):
        read(source, PAGE)
    source.close()


def test_a_closed_file_is_an_error_and_not_another_file(source: FileSource) -> None:
    source.close()
    source.close()
    with pytest.raises(SourceError, match="Bad file descriptor"):
        read(source, 0)


def test_a_function_gives_what_it_returns() -> None:
    source = FunctionSource(2 * PAGE, lambda offset, length: CONTENT[offset : offset + length])
    assert source.size == 2 * PAGE
    assert read(source, PAGE) == CONTENT[PAGE:]


@pytest.mark.parametrize(
    "error",
    [ValueError("no such page"), OSError(5, "Input/output error"), KernelError("read", 5)],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_function_raises_is_a_failure_of_the_source(error: Exception) -> None:
    def fail(offset: int, length: int) -> bytes:
        raise error

    with pytest.raises(SourceError) as caught:
        read(FunctionSource(PAGE, fail), 0)
    assert type(error).__name__ in caught.value.why
    assert str(error) in caught.value.why
    assert caught.value.__cause__ is error


def test_a_source_error_of_a_function_stays_as_it_is() -> None:
    error = SourceError(0x5000, 17, "from below")

    def fail(offset: int, length: int) -> bytes:
        raise error

    with pytest.raises(SourceError) as caught:
        read(FunctionSource(PAGE, fail), 0)
    assert caught.value is error


@pytest.mark.parametrize("given", [b"", bytes(PAGE - 1), bytes(PAGE + 1)])
def test_a_function_that_gives_another_length_fails(given: bytes) -> None:
    with pytest.raises(SourceError, match=f"it gave {len(given)} bytes"):
        read(FunctionSource(PAGE, lambda offset, length: given), 0)


@pytest.mark.parametrize("given", [None, "x" * PAGE, [0] * PAGE])
def test_a_function_that_gives_no_bytes_fails(given: object) -> None:
    with pytest.raises(SourceError, match="TypeError"):
        read(FunctionSource(PAGE, lambda offset, length: given), 0)  # type: ignore[arg-type, return-value]


def test_zeros_are_given_on_request() -> None:
    buffer = bytearray(b"\xff" * PAGE)
    ZeroSource(PAGE).read_into(0, memoryview(buffer))
    assert buffer == bytes(PAGE)


def test_the_message_names_the_page_and_the_reason() -> None:
    error = SourceError(0x5000, PAGE, "connection reset")
    text = "".join(traceback.format_exception_only(error))
    assert text.endswith("page source: 4096 bytes at 0x5000: connection reset\n")
