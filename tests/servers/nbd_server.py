"""A small NBD server of one file, which can be told to stall, to die and to lie.

It replies out of order: each request of a connection is served by a thread of its own.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from pathlib import Path

from control import Behaviour, serve

CONTENT = Path(sys.argv[2]).read_bytes()
behaviour = Behaviour()


def receive(client: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = client.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def talk(client: socket.socket) -> None:
    how = behaviour.how
    if how == "mute":
        behaviour.changed.acquire()
        behaviour.changed.wait_for(lambda: behaviour.how != "mute")
        behaviour.changed.release()
    greeting = b"SSH-2.0-not" if how == "other service" else b"NBDMAGIC"
    client.sendall((greeting + b"IHAVEOPT" + struct.pack(">H", 0 if how == "old" else 3))[:18])
    receive(client, 4)
    _, option, length = struct.unpack(">8sII", receive(client, 16))
    data = receive(client, length)
    name = data[4 : 4 + int.from_bytes(data[:4], "big")].decode()

    def reply(kind: int, body: bytes = b"") -> None:
        client.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(body)) + body)

    if how.startswith("refuse "):
        reply(1 << 31 | int(how.split()[1]), b"for a reason")
        return
    if name not in ("", "guest"):
        reply(1 << 31 | 6)
        return
    size = len(CONTENT) + (4096 if how == "resized" else 0)
    if how != "sizeless":
        reply(3, struct.pack(">HQH", 0, size, 0x103))
    if how.startswith("aligned "):
        step, most = map(int, how.split()[1:])
        reply(3, struct.pack(">HIII", 3, step, step, most))
    reply(1)
    requests(client)


def requests(client: socket.socket) -> None:
    lock = threading.Lock()
    while True:
        magic, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", receive(client, 28))
        assert magic == 0x25609513
        if kind == 2:
            return
        assert kind == 0
        threading.Thread(
            target=answer, args=(client, lock, cookie, offset, length), daemon=True
        ).start()


def answer(
    client: socket.socket, lock: threading.Lock, cookie: int, offset: int, length: int
) -> None:
    with behaviour.request() as how:
        data, error, magic = CONTENT[offset : offset + length], 0, 0x67446698
        data += bytes(length - len(data))
        match how.split():
            case ["wrong", "bytes"]:
                data = data[:-1] + bytes([data[-1] ^ 1])
            case ["wrong", "magic"]:
                magic = 0x668E33EF  # of a structured reply, which was not negotiated
            case ["wrong", "cookie"]:
                cookie += 1000
            case ["error", number]:
                error, data = int(number), b""
            case ["cut"]:
                data = data[: length // 2]
            case ["aligned", step, most]:
                assert offset % int(step) == 0
                assert length <= int(most)
                whole = length % int(step) == 0
                assert whole or offset + length == len(CONTENT)
        try:
            with lock:
                if how != "die":
                    client.sendall(struct.pack(">IIQ", magic, error, cookie) + data)
                if how in ("die", "cut"):
                    client.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client has gone


serve(behaviour, talk)
