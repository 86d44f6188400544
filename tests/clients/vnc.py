#!/usr/bin/env python3
"""Looks at the screen of a machine as a viewer in a browser does: by RFB on a websocket of Karst's API.

vnc.py SOCKET INSTANCE: over the API's unix socket; demands a screen that has a size, and a picture of it.
vnc.py SOCKET INSTANCE PASSWORD: the same of one that asks for a password, and takes no other."""

import base64
import hashlib
import http.client
import json
import os
import socket
import struct
import sys

sys.dont_write_bytecode = True
from rfb import enter, exactly, look  # noqa: E402 (no file is left beside it)

BINARY, CLOSE, PING, PONG = 2, 8, 9, 10


class Api(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path):
        super().__init__("karst", timeout=120)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)

    def asked(self, method, target, body=None):
        self.request(method, target, body, {"Content-Type": "application/json"})
        answer = json.load(self.getresponse())
        if answer["type"] == "error":
            sys.exit(answer["error"])
        return answer


class Websocket:
    """A client's end (RFC 6455), as a stream of bytes."""

    def __init__(self, path, target):
        self.socket = socket.socket(socket.AF_UNIX)
        self.settimeout(60)
        self.socket.connect(path)
        self.bytes = b""
        key = base64.b64encode(os.urandom(16)).decode()
        lines = ["Host: karst", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
        lines += [f"Sec-WebSocket-Key: {key}", "", ""]
        self.socket.sendall("\r\n".join([f"GET {target} HTTP/1.1", *lines]).encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += exactly(self.socket, 1)
        self.status = int(head.split()[1])
        if self.status == 101:
            digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
            assert base64.b64encode(digest) in head, head

    def settimeout(self, seconds):
        self.socket.settimeout(seconds)

    def send(self, kind, data):
        assert len(data) < 126
        mask = os.urandom(4)
        body = bytes(byte ^ mask[n % 4] for n, byte in enumerate(data))
        self.socket.sendall(struct.pack("BB", 0x80 | kind, 0x80 | len(data)) + mask + body)

    def sendall(self, data):
        self.send(BINARY, data)

    def recv(self, n):
        while not self.bytes:
            first, size = exactly(self.socket, 2)
            assert size < 128, "a server masks nothing"
            if size > 125:
                size = int.from_bytes(exactly(self.socket, 2 if size == 126 else 8), "big")
            data = exactly(self.socket, size)
            kind = first & 15
            if kind == CLOSE:
                return b""
            if kind == PING:
                try:
                    self.send(PONG, data)
                except OSError:
                    # The other end has said all that it has to say.
                    pass
            elif kind != PONG:
                self.bytes = data
        data, self.bytes = self.bytes[:n], self.bytes[n:]
        return data

    def close(self):
        self.send(CLOSE, struct.pack(">H", 1000))
        self.socket.close()


class Screen:
    """A connection to the screen: the operation that offers it, and both of its websockets."""

    def __init__(self, path, name):
        answer = Api(path).asked("POST", f"/1.0/karst/instances/{name}/vnc", "{}")
        self.path, self.operation = path, answer["operation"]
        secrets = answer["metadata"]["metadata"]["fds"]
        target = f"{self.operation}/websocket?secret="
        assert Websocket(path, target + "0" * 64).status == 403, "another secret is taken"
        self.stream = Websocket(path, target + secrets["0"])
        self.control = Websocket(path, target + secrets["control"])
        assert (self.stream.status, self.control.status) == (101, 101)
        assert Websocket(path, target + secrets["0"]).status == 409, "a second viewer is let in by the same secret"

    def end(self):
        self.stream.close()
        return Api(self.path).asked("GET", f"{self.operation}/wait?timeout=60")["metadata"]["status"]


def main():
    path, name = sys.argv[1:3]
    password = sys.argv[3] if len(sys.argv) > 3 else None
    screen = Screen(path, name)
    size = look(screen.stream, password)
    # A key goes in, and a picture comes out.
    for down in (1, 0):
        screen.stream.sendall(struct.pack(">BBHI", 4, down, 0, 0xFFE1))
    screen.stream.sendall(struct.pack(">BBHHHH", 3, 0, 0, 0, 16, 16))
    assert exactly(screen.stream, 1) == b"\0"
    if password is not None:
        for wrong in (password[::-1] + "x", "", password[:-1]):
            # Held: a screen ends with its control socket.
            other = Screen(path, name)
            assert not enter(other.stream, wrong), f"{wrong!r} is taken"
        # Who is in stays in.
        screen.stream.sendall(struct.pack(">BBHI", 4, 0, 0, 0xFFE1))
    assert screen.end() == "Success"
    print("%dx%d" % size)


main()
