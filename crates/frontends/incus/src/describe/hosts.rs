//! What answers of Karst's own paths carry, and those about the host's hardware.

use super::{
    Kind::{
        Any, Config, Either, Flag, Integer, List, Map, Maybe, Null, Nullable, Number, Object, Text, Texts,
        Time, Word,
    },
    Shape,
    answers::{KINDS, STATUS},
    shapes,
};

shapes! {
    /// Who has a role somewhere; without a project everywhere.
    ROLE "Role" {
        "identifier": Text, "provider": Text, "role": Text, "project": Nullable(&Text),
    }

    /// May somebody do something, and why.
    WHY "AccessWhy" {
        "principal": Text, "permission": Text, "object": Text, "allowed": Flag, "because": Texts,
    }

    /// A record of the audit log, chained by hashes.
    AUDIT_RECORD "AuditRecord" {
        "seq": Integer, "prev": Text, "entry": Object(&AUDIT_ENTRY), "hash": Text,
    }

    /// What was done or refused.
    AUDIT_ENTRY "AuditEntry" {
        "origin": List(&Integer), "time": Time, "who": Text, "from": Text, "what": Text, "object": Text,
        "project": Text, "outcome": Text, "detail": Text,
    }

    /// Is the audit log of a host whole?
    AUDIT_VERDICT "AuditVerdict" {
        "node": Text, "first": Integer, "checked": Integer, "fault": Nullable(&Text),
        "head": Object(&AUDIT_HEAD),
    }

    /// The end of the audit log.
    AUDIT_HEAD "AuditHead" {
        "seq": Integer, "hash": Text,
    }

    /// What becomes of a packet.
    EXPLANATION "NetworkExplanation" {
        "passes": Flag, "destination": Text, "port": Nullable(&Integer), "steps": List(&Object(&STEP)),
    }

    /// A decision at one place of its way, and what decided.
    STEP "NetworkExplanationStep" {
        "place": Text, "action": Text, "by": Text, "acl": Maybe(&Text), "direction": Maybe(&Text),
        "number": Maybe(&Integer), "what": Maybe(&Text),
    }

    /// What disagrees between the records and the hosts.
    HEALTH "Health" {
        "leaks": Texts, "sagas": Texts,
    }

    /// The nodes, as their agents last described them.
    HOST "Hosts" {
        "version": Text, "epoch": Integer, "daemon_id": Text, "nodes": List(&Object(&NODE)),
    }

    /// A node.
    NODE "Node" {
        "name": Text, "id": Text, "this": Flag, "facts": Nullable(&Object(&FACTS)),
    }

    /// What an agent says of its machine.
    FACTS "HostFacts" {
        "hostname": Text, "boot_id": Text, "architecture": Text, "kernel": Text, "os_name": Text,
        "os_version": Text, "accelerator": Object(&ACCELERATOR), "qemu": Nullable(&Text),
        "lxc": Nullable(&Text), "default_machine": Nullable(&Text), "spice": Flag, "virtiofs": Flag,
        "screens": Maybe(&Object(&SCREEN_GRANTS)), "cgroup_layout": Text, "cpus": Integer,
        "memory": Integer, "storage": List(&Object(&POOL_KIND)), "warnings": Texts,
    }

    /// Addresses at which screens may listen (`*`: all), and those of them where they may without a password.
    SCREEN_GRANTS "HostScreens" {
        "listen": Texts, "open": Texts,
    }

    /// How virtual machines are executed, and why.
    ACCELERATOR "HostAccelerator" {
        "kind": Word(&["kvm", "tcg"]), "reason": Text,
    }

    /// A kind of storage pools on a host, and what is missing for it.
    POOL_KIND "HostStorageDriver" {
        "kind": Text, "version": Text, "missing": Nullable(&Text),
    }

    /// This daemon, and whether its host answers now.
    DAEMON "Status" {
        "daemon": Text, "pid": Integer, "hosts": Integer, "instances": Integer,
        "host": Either(&[Object(&FACTS), Object(&HOST_ERROR)]),
    }

    /// Why the host does not answer.
    HOST_ERROR "HostError" {
        "error": Text,
    }

    /// What an instance is known by besides its name, how it ended last, and why it is halted or ended by itself.
    IDENTITY "InstanceIdentity" {
        "name": Text, "project": Text, "id": Text, "vmid": Integer, "vmid_chosen": Flag,
        "last_end": Nullable(&Word(&["shutdown", "forced", "crashed"])), "reason": Nullable(&Text),
    }

    /// A disk that a virtual machine writes to, with the layers over the file that it was made with, lowest first.
    LAYERED_DISK "LayeredDisk" {
        "device": Text, "pool": Text, "volume": Text, "owned": Flag, "layers": List(&Object(&LAYER)),
    }

    /// A layer of a disk.
    LAYER "DiskLayer" {
        "name": Text, "number": Integer, "created_at": Text,
    }

    /// A change that waits for the next start; null is a value that is not there.
    PENDING "PendingChange" {
        "key": Text, "live": Nullable(&Text), "configured": Nullable(&Text),
    }

    /// What an instance used.
    HISTORY "InstanceHistory" {
        "series": List(&Object(&SERIES)),
    }

    /// Averages of one resolution, oldest first.
    SERIES "HistorySeries" {
        "seconds": Integer, "kept": Integer, "points": List(&Object(&POINT)),
    }

    /// Averages of one period; what was not known is absent.
    POINT "HistoryPoint" {
        "time": Integer, "measured_ms": Integer, "cpu": Maybe(&Integer), "memory": Maybe(&Integer),
        "disk_read": Maybe(&Integer), "disk_written": Maybe(&Integer), "received": Maybe(&Integer),
        "sent": Maybe(&Integer),
    }

    /// What an instance has used so far.
    USED "InstanceUse" {
        "name": Text, "project": Text, "type": KINDS, "status": STATUS, "sampled_at": Nullable(&Integer),
        "cpu_ns": Nullable(&Integer), "memory": Nullable(&Integer), "memory_total": Nullable(&Integer),
        "disk_read": Nullable(&Integer), "disk_written": Nullable(&Integer), "received": Nullable(&Integer),
        "sent": Nullable(&Integer), "processes": Nullable(&Integer),
    }

    /// Where libvirt's clients reach this server.
    LIBVIRT "Libvirt" {
        "address": Text, "certificate_authority": Text,
    }

    /// The key and certificate of a client of libvirt.
    LIBVIRT_CLIENT "LibvirtClient" {
        "fingerprint": Text, "certificate_authority": Text, "certificate": Text, "key": Text,
    }

    /// Is there a display, are viewers asked for a password, and until when that lets them in.
    DISPLAY "Display" {
        "display": Flag, "password": Flag, "valid_to": Nullable(&Time),
        "listeners": List(&Object(&SCREEN_LISTENER)),
    }

    /// Where a screen of a running machine listens for viewers, or why it does not.
    SCREEN_LISTENER "DisplayListener" {
        "kind": Word(&["vnc", "websocket", "spice"]), "address": Nullable(&Text), "port": Nullable(&Integer),
        "why": Nullable(&Text),
    }

    /// Is a network there, and does it begin with its host; `running` is what it runs by where its definition says otherwise.
    NETWORK_LIFE "NetworkLife" {
        "name": Text, "project": Text, "active": Flag, "autostart": Flag, "persistent": Flag,
        "running": Nullable(&Config),
    }

    /// What Incus does not tell of a storage pool; `file_system` is null of those that are not active or in no directory.
    POOL_LIFE "StoragePoolLife" {
        "active": Flag, "autostart": Flag, "persistent": Flag, "built": Flag, "file_system": Nullable(&Object(&ABILITIES)),
    }

    /// What the file system of a pool can, as its host has tried.
    ABILITIES "FileSystemAbilities" {
        "owners": Flag, "mapped": Flag, "layers": Flag, "limits": Flag, "clones": Flag, "links": Flag,
        "holes": Flag, "direct": Flag, "attributes": Flag,
    }

    /// Who a project is at a registry.
    REGISTRY "RegistryLogin" {
        "host": Text, "user": Text, "certificate": Nullable(&Text),
    }

    /// A secret of a project, without its value.
    KEPT_SECRET "Secret" {
        "uuid": Text, "description": Text, "type": Text, "usage": Text, "private": Flag, "ephemeral": Flag,
    }

    /// An API token.
    TOKEN "ApiToken" {
        "name": Text, "description": Text, "grants": List(&Object(&GRANT)), "created_at": Time,
        "expires_at": Nullable(&Time),
    }

    /// A role of a token; without a project everywhere.
    GRANT "ApiTokenGrant" {
        "role": Text, "project": Nullable(&Text),
    }

    /// A token; the only time that it is known.
    NEW_TOKEN "NewApiToken" {
        "name": Text, "token": Text,
    }

    /// The host's hardware.
    RESOURCES "Resources" {
        "cpu": Object(&CPUS), "memory": Object(&HOST_MEMORY), "gpu": Object(&GPUS),
        "network": Object(&CARDS), "storage": Object(&DISKS), "usb": Object(&USB_DEVICES),
        "pci": Object(&PCI_DEVICES), "system": Object(&SYSTEM), "load": Object(&LOAD),
    }

    /// Processors.
    CPUS "ResourcesCpu" {
        "architecture": Text, "sockets": List(&Object(&SOCKET)), "total": Integer,
    }

    /// A processor.
    SOCKET "ResourcesCpuSocket" {
        "name": Text, "vendor": Text, "socket": Integer, "cache": List(&Object(&CACHE)),
        "cores": List(&Object(&CORE)), "frequency": Integer, "frequency_minimum": Integer,
        "frequency_turbo": Integer, "address_sizes": Null,
    }

    /// A cache.
    CACHE "ResourcesCpuCache" {
        "level": Integer, "type": Text, "size": Integer,
    }

    /// A core.
    CORE "ResourcesCpuCore" {
        "core": Integer, "die": Integer, "cluster": Integer, "frequency": Integer, "flags": Texts,
        "threads": List(&Object(&THREAD)),
    }

    /// A thread.
    THREAD "ResourcesCpuThread" {
        "id": Integer, "numa_node": Integer, "thread": Integer, "online": Flag, "isolated": Flag,
    }

    /// Memory.
    HOST_MEMORY "ResourcesMemory" {
        "nodes": List(&Object(&MEMORY_NODE)), "total": Integer, "used": Integer, "hugepages_total": Integer,
        "hugepages_used": Integer, "hugepages_size": Integer,
    }

    /// Memory of a NUMA node.
    MEMORY_NODE "ResourcesMemoryNode" {
        "numa_node": Integer, "total": Integer, "used": Integer, "hugepages_total": Integer,
        "hugepages_used": Integer,
    }

    /// Graphics cards.
    GPUS "ResourcesGpu" {
        "cards": List(&Object(&GPU)), "total": Integer,
    }

    /// Network cards.
    CARDS "ResourcesNetwork" {
        "cards": List(&Object(&CARD)), "total": Integer,
    }

    /// Disks.
    DISKS "ResourcesStorage" {
        "disks": List(&Object(&DISK)), "total": Integer,
    }

    /// USB devices.
    USB_DEVICES "ResourcesUsb" {
        "devices": List(&Object(&USB)), "total": Integer,
    }

    /// PCI devices.
    PCI_DEVICES "ResourcesPci" {
        "devices": List(&Object(&PCI)), "total": Integer,
    }

    /// A graphics card.
    GPU "ResourcesGpuCard" {
        "pci_address": Text, "driver": Text, "vendor_id": Text, "product_id": Text, "numa_node": Integer,
    }

    /// A network card.
    CARD "ResourcesNetworkCard" {
        "driver": Text, "pci_address": Text, "vendor_id": Text, "product_id": Text, "numa_node": Integer,
        "ports": List(&Object(&CARD_PORT)),
    }

    /// A port of a network card.
    CARD_PORT "ResourcesNetworkPort" {
        "id": Text, "address": Text, "port": Integer, "protocol": Text, "link_detected": Flag,
        "link_speed": Integer, "link_duplex": Text, "auto_negotiation": Flag,
    }

    /// A disk.
    DISK "ResourcesDisk" {
        "id": Text, "device": Text, "type": Text, "model": Text, "serial": Text, "read_only": Flag,
        "removable": Flag, "rpm": Integer, "size": Integer, "block_size": Integer,
        "partitions": List(&Object(&PARTITION)), "numa_node": Integer,
    }

    /// A partition.
    PARTITION "ResourcesPartition" {
        "id": Text, "device": Text, "partition": Integer, "size": Integer, "read_only": Flag,
    }

    /// A USB device.
    USB "ResourcesUsbDevice" {
        "bus_address": Integer, "device_address": Integer, "vendor": Text, "vendor_id": Text,
        "product": Text, "product_id": Text, "serial": Text, "speed": Number, "interfaces": List(&Any),
    }

    /// A PCI device.
    PCI "ResourcesPciDevice" {
        "pci_address": Text, "driver": Text, "driver_version": Text, "vendor_id": Text, "vendor": Text,
        "product_id": Text, "product": Text, "numa_node": Integer, "iommu_group": Integer, "vpd": Map(&Any),
    }

    /// The machine as its firmware describes it.
    SYSTEM "ResourcesSystem" {
        "uuid": Text, "vendor": Text, "product": Text, "family": Text, "version": Text, "sku": Text,
        "serial": Text, "type": Text, "firmware": Nullable(&Object(&FIRMWARE)),
        "motherboard": Nullable(&Object(&BOARD)), "chassis": Nullable(&Object(&CHASSIS)),
    }

    /// Firmware.
    FIRMWARE "ResourcesFirmware" {
        "vendor": Text, "version": Text, "date": Text,
    }

    /// Motherboard.
    BOARD "ResourcesMotherboard" {
        "vendor": Text, "product": Text, "version": Text, "serial": Text,
    }

    /// Chassis.
    CHASSIS "ResourcesChassis" {
        "vendor": Text, "type": Text, "version": Text, "serial": Text,
    }

    /// Load and processes.
    LOAD "ResourcesLoad" {
        "Average1Min": Number, "Average5Min": Number, "Average10Min": Number, "Processes": Integer,
    }
}
