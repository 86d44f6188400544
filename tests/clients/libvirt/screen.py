#!/usr/bin/env python3
"""Looks at the screen of a domain as viewers do, over a descriptor that libvirt gives and over one that it is brought.

screen.py URI DOMAIN: says RFB's greeting, takes the security type "none", and demands a screen that has a size."""

import socket
import struct
import sys

import libvirt


def exactly(stream, n):
    data = b""
    while len(data) < n:
        more = stream.recv(n - len(data))
        assert more, "the screen ended"
        data += more
    return data


def look(stream):
    stream.settimeout(30)
    assert exactly(stream, 12) == b"RFB 003.008\n"
    stream.sendall(b"RFB 003.008\n")
    kinds = exactly(stream, exactly(stream, 1)[0])
    assert 1 in kinds, kinds
    stream.sendall(b"\x01")
    assert exactly(stream, 4) == b"\0\0\0\0"
    stream.sendall(b"\x01")
    width, height = struct.unpack(">HH", exactly(stream, 4))
    assert width >= 320 and height >= 200, (width, height)
    exactly(stream, 16)
    exactly(stream, struct.unpack(">I", exactly(stream, 4))[0])
    return width, height


def main():
    connection = libvirt.open(sys.argv[1])
    domain = connection.lookupByName(sys.argv[2])
    given = socket.socket(fileno=domain.openGraphicsFD(0, libvirt.VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH))
    near, far = socket.socketpair()
    domain.openGraphics(0, far.fileno(), 0)
    far.close()
    first, second = look(given), look(near)
    assert first == second, (first, second)
    # What ends the connection does not end a viewer.
    connection.close()
    given.sendall(struct.pack(">BBHHHH", 3, 0, 0, 0, 16, 16))
    assert exactly(given, 1) == b"\0"
    print("%dx%d" % first)


main()
