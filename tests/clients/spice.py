#!/usr/bin/env python3
"""Looks at the screen of a machine by SPICE, with the channels of a viewer, each over a connection of its own.

spice.py unix PATH [PASSWORD]: over the socket that `incus console --type vga` opens.
spice.py libvirt URI DOMAIN [PASSWORD]: over descriptors that libvirt is brought.
With a password: it is asked for, and no other is taken."""

import hashlib
import os
import socket
import struct
import sys

MAIN, DISPLAY, INPUTS, CURSOR = 1, 2, 3, 4
INIT = 103
# Which way to be let in is said; by a ticket; and short headers.
CAPABILITIES = 1 << 0 | 1 << 1 | 1 << 3
DENIED = 7
DISPLAY_INIT = 101


def exactly(stream, n):
    data = b""
    while len(data) < n:
        more = stream.recv(n - len(data))
        assert more, "the screen ended"
        data += more
    return data


def mask(seed, length):
    parts = (hashlib.sha1(seed + struct.pack(">I", n)).digest() for n in range(length // 20 + 1))
    return b"".join(parts)[:length]


def xor(a, b):
    return bytes(x ^ y for x, y in zip(a, b))


def sealed(key, text):
    """A ticket: RSA with OAEP of SHA-1, for a key of 1024 bits whose exponent is 65537."""
    assert key.endswith(b"\x02\x03\x01\x00\x01"), key.hex()
    modulus = int.from_bytes(key[-133:-5], "big")
    block = hashlib.sha1(b"").digest()
    block += bytes(107 - len(block) - 1 - len(text)) + b"\x01" + text
    seed = os.urandom(20)
    block = xor(block, mask(seed, len(block)))
    seed = xor(seed, mask(block, 20))
    whole = int.from_bytes(b"\x00" + seed + block, "big")
    return pow(whole, 65537, modulus).to_bytes(128, "big")


def channel(stream, kind, connection, password):
    """Opens a channel; answers what the server makes of it, 0 when it lets in."""
    stream.settimeout(60)
    link = struct.pack("<IBBIII", connection, kind, 0, 1, 0, 18) + struct.pack("<I", CAPABILITIES)
    stream.sendall(b"REDQ" + struct.pack("<III", 2, 2, len(link)) + link)
    magic, major, _, size = struct.unpack("<4sIII", exactly(stream, 16))
    assert (magic, major) == (b"REDQ", 2), (magic, major)
    reply = exactly(stream, size)
    error, key = struct.unpack("<I", reply[:4])[0], reply[4:166]
    assert error == 0, error
    stream.sendall(struct.pack("<I", 1) + sealed(key, (password or "").encode() + b"\x00"))
    return struct.unpack("<I", exactly(stream, 4))[0]


def session(stream):
    """The number that the main channel gives to the others."""
    while True:
        kind, size = struct.unpack("<HI", exactly(stream, 6))
        body = exactly(stream, size)
        if kind == INIT:
            return struct.unpack("<I", body[:4])[0]


def by_socket(path):
    def connect():
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(path)
        return stream

    return connect


def by_libvirt(uri, name):
    import libvirt

    domain = libvirt.open(uri).lookupByName(name)

    def connect():
        near, far = socket.socketpair()
        domain.openGraphics(0, far.fileno(), 0)
        far.close()
        return near

    return connect


def main():
    how, *rest = sys.argv[1:]
    connect = by_socket(rest.pop(0)) if how == "unix" else by_libvirt(rest.pop(0), rest.pop(0))
    password = rest.pop(0) if rest else None
    first = connect()
    assert channel(first, MAIN, 0, password) == 0
    number = session(first)
    others = [connect() for _ in (DISPLAY, INPUTS, CURSOR)]
    for stream, kind in zip(others, (DISPLAY, INPUTS, CURSOR)):
        assert channel(stream, kind, number, password) == 0, kind
        if kind == DISPLAY:
            # Its caches, as every viewer says first; SPICE's server of Debian 12 (0.15.1) does not survive the end of one that did not.
            stream.sendall(struct.pack("<HI", DISPLAY_INIT, 14) + struct.pack("<BqBi", 1, 1 << 20, 1, 1 << 16))
    if password is not None:
        refused = channel(connect(), MAIN, 0, password[::-1] + "x")
        assert refused == DENIED, refused
    print(len(others) + 1, "channels")


main()
