"""A small HTTP server of one file, with ranges, which can be told to stall, to die and to lie.

With a third argument, a file with a key and its certificate, it speaks TLS.
"""

from __future__ import annotations

import re
import socket
import ssl
import sys
import time
from pathlib import Path

from control import Behaviour, serve

CONTENT = Path(sys.argv[2]).read_bytes()
behaviour = Behaviour()


def encrypt(client: socket.socket) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[3])
    with context.wrap_socket(client, server_side=True) as wrapped:
        talk(wrapped)


def talk(client: socket.socket) -> None:
    requests = client.makefile("rb")
    while True:
        line = requests.readline()
        headers = {}
        while (header := requests.readline()) not in (b"\r\n", b""):
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        if not line:
            raise EOFError
        with behaviour.request() as how:
            _, path, _ = line.decode().split()
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", headers["range"])
            assert match is not None
            answer(client, how, path, headers, int(match[1]), int(match[2]))
        if how in ("close", "until the end"):
            return


def answer(
    client: socket.socket, how: str, path: str, headers: dict[str, str], first: int, last: int
) -> None:
    body = CONTENT[first : last + 1]
    status = "206 Partial Content"
    head = {
        "Content-Range": f"bytes {first}-{last}/{len(CONTENT)}",
        "Content-Length": str(len(body)),
        "ETag": '"first"',
        "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
    }
    match how.split():
        case ["die"]:
            raise EOFError
        case ["cut"]:
            body = body[: len(body) // 2]
        case ["wrong", "bytes"]:
            body = body[:-1] + bytes([body[-1] ^ 1])
        case ["wrong", "range"]:
            head["Content-Range"] = f"bytes {first + 1}-{last + 1}/{len(CONTENT)}"
        case ["wrong", "total"]:
            head["Content-Range"] = f"bytes {first}-{last}/{len(CONTENT) + 1}"
        case ["no", "range"]:
            del head["Content-Range"]
        case ["wrong", "length"]:
            head["Content-Length"] = str(len(body) - 1)
        case ["changed"]:
            head["ETag"] = '"second"'
        case ["touched"]:
            head["Last-Modified"] = "Fri, 02 Jan 2026 00:00:00 GMT"
        case ["encoded"]:
            head["Content-Encoding"] = "gzip"
        case ["whole"]:
            status, body = "200 OK", CONTENT
            head["Content-Length"] = str(len(body))
        case ["status", code]:
            status, body = f"{code} Because", b"sorry"
            head = {"Content-Length": "5"}
        case ["until", "the", "end"]:
            del head["Content-Length"]
        case ["close"]:
            head["Connection"] = "close"
        case ["garbage"]:
            client.sendall(b"\x00\x01\x02 what is this\r\n\r\n")
            raise EOFError
        case ["redirect"] if path == "/old":
            status, body, head = "302 Found", b"", {"Location": "/new", "Content-Length": "0"}
        case ["redirect"]:
            assert path == "/new", path
        case ["round"]:
            status, body, head = "302 Found", b"", {"Location": path, "Content-Length": "0"}
        case ["secret"] if headers.get("authorization") != "Basic bWU6cCZ3":  # me:p&w
            status, body, head = "401 Unauthorized", b"", {"Content-Length": "0"}
    if "chunked" in how:
        del head["Content-Length"]
        head["Transfer-Encoding"] = "chunked"
        if how == "chunked cut":
            body = b"%x\r\n%s" % (len(body), body[:-1])
        else:
            more = b"1\r\nx\r\n" if how == "chunked long" else b""
            body = b"%x\r\n%s\r\n%s0\r\n\r\n" % (len(body), body, more)
    text = f"HTTP/1.1 {status}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in head.items()) + "\r\n"
    if how == "trickle":
        for byte in text.encode() + body:
            client.sendall(bytes([byte]))
            time.sleep(0.005)
        return
    client.sendall(text.encode() + body)
    if how in ("cut", "chunked cut"):
        raise EOFError


serve(behaviour, encrypt if len(sys.argv) > 3 else talk)
