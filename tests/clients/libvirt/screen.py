#!/usr/bin/env python3
"""Looks at the screen of a domain as viewers do, over a descriptor that libvirt gives and over one that it is brought.

screen.py URI DOMAIN: says RFB's greeting, takes the security type "none", and demands a screen that has a size.
screen.py URI DOMAIN PASSWORD: the same of one that asks for a password, and takes no other."""

import socket
import struct
import subprocess
import sys

import libvirt


def exactly(stream, n):
    data = b""
    while len(data) < n:
        more = stream.recv(n - len(data))
        assert more, "the screen ended"
        data += more
    return data


def sealed(password, challenge):
    """RFB's answer to a challenge: DES, the bits of each byte of the key the other way round."""
    key = password.encode()[:8].ljust(8, b"\0")
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in key)
    command = ["openssl", "enc", "-des-ecb", "-K", key.hex(), "-nopad", "-provider", "legacy", "-provider", "default"]
    return subprocess.run(command, input=challenge, stdout=subprocess.PIPE, check=True).stdout


def enter(stream, password):
    """Goes through the greeting; answers whether one is let in."""
    stream.settimeout(30)
    assert exactly(stream, 12) == b"RFB 003.008\n"
    stream.sendall(b"RFB 003.008\n")
    kinds = exactly(stream, exactly(stream, 1)[0])
    if password is None:
        assert kinds == b"\x01", kinds
        stream.sendall(b"\x01")
    else:
        assert kinds == b"\x02", kinds
        stream.sendall(b"\x02")
        stream.sendall(sealed(password, exactly(stream, 16)))
    return exactly(stream, 4) == b"\0\0\0\0"


def look(stream, password=None):
    assert enter(stream, password)
    stream.sendall(b"\x01")
    width, height = struct.unpack(">HH", exactly(stream, 4))
    assert width >= 320 and height >= 200, (width, height)
    exactly(stream, 16)
    exactly(stream, struct.unpack(">I", exactly(stream, 4))[0])
    return width, height


def brought(domain):
    near, far = socket.socketpair()
    domain.openGraphics(0, far.fileno(), 0)
    far.close()
    return near


def main():
    password = sys.argv[3] if len(sys.argv) > 3 else None
    connection = libvirt.open(sys.argv[1])
    domain = connection.lookupByName(sys.argv[2])
    given = socket.socket(fileno=domain.openGraphicsFD(0, libvirt.VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH))
    # Of what size it is may change in between, while the guest boots.
    first = look(given)
    look(brought(domain), password)
    if password is not None:
        assert not enter(brought(domain), password[::-1] + "x"), "another password is taken"
    # What ends the connection does not end a viewer.
    connection.close()
    given.sendall(struct.pack(">BBHHHH", 3, 0, 0, 0, 16, 16))
    assert exactly(given, 1) == b"\0"
    print("%dx%d" % first)


main()
