#!/usr/bin/env python3
"""Events of python3-libvirt: what a script that does something hears of it, by whom it asked for and by nobody else.

events.py URI NETWORK: makes a machine and what belongs to it, and leaves nothing.
"""

import sys
import threading
import time

import libvirt

PATIENCE = 30.0
heard, lock = [], threading.Lock()


def hear(*event):
    with lock:
        heard.append(event)


def demand(what, matches):
    """Waits until something that was heard matches."""
    end = time.monotonic() + PATIENCE
    while True:
        with lock:
            if any(matches(*event) for event in heard if event[0] == what):
                return
            now = list(heard)
        if time.monotonic() > end:
            sys.exit(f"nothing is heard of {what}; there was {now}")
        time.sleep(0.02)


def main():
    libvirt.virEventRegisterDefaultImpl()

    def loop():
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=loop, daemon=True).start()
    connection, network = libvirt.open(sys.argv[1]), sys.argv[2]
    # Another connection hears the same.
    listener = libvirt.open(sys.argv[1])
    closed = []
    listener.registerCloseCallback(lambda _c, reason, _o: closed.append(reason), None)
    kinds = {
        "lifecycle": (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lambda c, d, event, detail, o: hear("lifecycle", d.name(), event, detail)),
        "reboot": (libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, lambda c, d, o: hear("reboot", d.name())),
        "added": (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, lambda c, d, alias, o: hear("added", d.name(), alias)),
        "removed": (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, lambda c, d, alias, o: hear("removed", d.name(), alias)),
        "metadata": (libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, lambda c, d, kind, uri, o: hear("metadata", d.name(), kind, uri)),
        "job": (libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, lambda c, d, disk, kind, status, o: hear("job", d.name(), disk, kind, status)),
    }
    registered = [listener.domainEventRegisterAny(None, number, callback, None) for number, callback in kinds.values()]
    listener.networkEventRegisterAny(
        None, libvirt.VIR_NETWORK_EVENT_ID_LIFECYCLE, lambda c, n, event, detail, o: hear("network", n.name(), event), None
    )
    listener.storagePoolEventRegisterAny(None, libvirt.VIR_STORAGE_POOL_EVENT_ID_REFRESH, lambda c, p, o: hear("refresh", p.name()), None)
    listener.secretEventRegisterAny(None, libvirt.VIR_SECRET_EVENT_ID_VALUE_CHANGED, lambda c, s, o: hear("value", s.UUIDString()), None)

    pool = connection.storagePoolLookupByName("default")
    disk = pool.createXML("<volume><name>events</name><capacity unit='MiB'>16</capacity></volume>")
    more = pool.createXML("<volume><name>events2</name><capacity unit='MiB'>16</capacity></volume>")
    domain = connection.defineXML(
        f"""<domain type='qemu'><name>events</name><memory unit='MiB'>128</memory><vcpu>1</vcpu><os><type machine='q35'>hvm</type></os><devices>
        <disk type='file' device='disk'><source file='{disk.path()}'/><target dev='vda' bus='virtio'/></disk>
        <interface type='network'><source network='{network}'/></interface></devices></domain>"""
    )
    # One that listens for this domain alone.
    alone = connection.domainEventRegisterAny(
        domain, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lambda c, d, event, detail, o: hear("alone", d.name(), event), None
    )
    demand("lifecycle", lambda _, name, event, detail: (name, event) == ("events", libvirt.VIR_DOMAIN_EVENT_DEFINED))
    domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_TITLE, "a title", None, None)
    demand("metadata", lambda _, name, kind, uri: (name, kind) == ("events", libvirt.VIR_DOMAIN_METADATA_TITLE))
    domain.create()
    demand("lifecycle", lambda _, name, event, detail: (name, event) == ("events", libvirt.VIR_DOMAIN_EVENT_STARTED))
    extra = f"<disk type='file' device='disk'><source file='{more.path()}'/><target dev='sdb' bus='scsi'/></disk>"
    domain.attachDeviceFlags(extra, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    demand("added", lambda _, name, alias: name == "events" and alias)
    domain.detachDeviceFlags(extra, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    demand("removed", lambda _, name, alias: name == "events" and alias)
    domain.reset()
    demand("reboot", lambda _, name: name == "events")
    domain.blockCopy("vda", "<disk type='file'><source file='/karst/default/events3'/><driver type='raw'/></disk>", {}, libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
    copies = (libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY, libvirt.VIR_DOMAIN_BLOCK_JOB_READY)
    demand("job", lambda _, name, disk, kind, status: (name, disk, kind, status) == ("events", "vda", *copies))
    domain.blockJobAbort("vda")
    for event, act in ((libvirt.VIR_DOMAIN_EVENT_SUSPENDED, domain.suspend), (libvirt.VIR_DOMAIN_EVENT_RESUMED, domain.resume), (libvirt.VIR_DOMAIN_EVENT_STOPPED, domain.destroy)):
        act()
        demand("lifecycle", lambda _, name, told, detail, event=event: (name, told) == ("events", event))
    domain.undefine()
    demand("lifecycle", lambda _, name, event, detail: (name, event) == ("events", libvirt.VIR_DOMAIN_EVENT_UNDEFINED))
    demand("alone", lambda _, name, event: event == libvirt.VIR_DOMAIN_EVENT_STOPPED)

    pool.refresh()
    demand("refresh", lambda _, name: name == "default")
    own = connection.networkDefineXML("<network><name>events0</name><ip address='10.99.7.1' netmask='255.255.255.0'/></network>")
    demand("network", lambda _, name, event: (name, event) == ("events0", libvirt.VIR_NETWORK_EVENT_DEFINED))
    own.undefine()
    demand("network", lambda _, name, event: (name, event) == ("events0", libvirt.VIR_NETWORK_EVENT_UNDEFINED))
    secret = connection.secretDefineXML("<secret ephemeral='no' private='no'><description>events</description></secret>")
    secret.setValue(b"something")
    demand("value", lambda _, uuid: uuid == secret.UUIDString())
    secret.undefine()

    # Who does not ask any more hears no more.
    for number in registered:
        listener.domainEventDeregisterAny(number)
    connection.domainEventDeregisterAny(alone)
    with lock:
        heard.clear()
    quiet = connection.defineXML("<domain type='qemu'><name>quiet</name><memory unit='MiB'>128</memory><os><type>hvm</type></os></domain>")
    quiet.undefine()
    pool.refresh()
    demand("refresh", lambda _, name: name == "default")
    with lock:
        assert not [e for e in heard if e[0] in kinds or e[0] == "alone"], heard
    for left in (disk, more, pool.storageVolLookupByName("events3")):
        left.delete()
    listener.unregisterCloseCallback()
    listener.close()
    assert not closed, closed
    print("all of them")


main()
