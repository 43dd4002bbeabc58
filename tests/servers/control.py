"""What the two servers of the tests have in common: a process that is told how to behave.

Started with a port (0: any) and a file; prints the port that it listens on.  Then each line on
standard input is a command, answered with one line: ``be HOW`` from now on, or ``stats``.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Behaviour:
    """How the server behaves now, and what it has seen."""

    def __init__(self) -> None:
        self.how = "good"
        self.changed = threading.Condition()
        self.connections = self.requests = self.now = self.most = 0

    @contextmanager
    def request(self) -> Iterator[str]:
        """A request is being served: how.  ``stall`` ends when the server is told otherwise."""
        with self.changed:
            self.requests += 1
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            if self.how.startswith("delay "):
                time.sleep(float(self.how.removeprefix("delay ")))
            with self.changed:
                self.changed.wait_for(lambda: self.how != "stall")
            yield self.how
        finally:
            with self.changed:
                self.now -= 1

    def command(self, line: str) -> str:
        word, _, rest = line.strip().partition(" ")
        with self.changed:
            if word == "be":
                self.how = rest
                self.changed.notify_all()
                return "ok"
            names = ("connections", "requests", "most")
            return json.dumps({name: getattr(self, name) for name in names})


def serve(behaviour: Behaviour, talk: Callable[[socket.socket], None]) -> None:
    """Listen, with a thread for each connection, until standard input ends."""

    def connection(client: socket.socket) -> None:
        with client:
            try:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                talk(client)
            except (OSError, EOFError):
                pass

    def accept() -> None:
        while True:
            client, _ = listening.accept()
            behaviour.connections += 1
            threading.Thread(target=connection, args=(client,), daemon=True).start()

    listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    threading.Thread(target=accept, daemon=True).start()
    print(listening.getsockname()[1], flush=True)
    for line in sys.stdin:
        print(behaviour.command(line), flush=True)
