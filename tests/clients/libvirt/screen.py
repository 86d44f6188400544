#!/usr/bin/env python3
"""Looks at the screen of a domain as viewers do, over a descriptor that libvirt gives and over one that it is brought.

screen.py URI DOMAIN: says RFB's greeting, takes the security type "none", and demands a screen that has a size.
screen.py URI DOMAIN PASSWORD: the same of one that asks for a password, and takes no other."""

import os
import socket
import struct
import sys

import libvirt

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from rfb import enter, exactly, look  # noqa: E402 (it lies beside this directory)


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
