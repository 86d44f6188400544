//! What answers carry: the views of [`crate::wire`] and of the handlers, field for field.

use super::{
    Kind::{
        self, Any, Config, Devices, Either, Flag, Integer, List, Map, Maybe, Null, Nullable, Object, Text,
        Texts, Time, Word,
    },
    Shape, shapes,
};

pub(super) const KINDS: Kind = Word(&["container", "virtual-machine"]);
pub(super) const STATUS: Kind = Word(&["Stopped", "Starting", "Running", "Frozen", "Stopping", "Error"]);
const CONTENT: Kind = Word(&["filesystem", "block", "iso"]);
const SCALAR: Kind = Either(&[Text, Integer, Flag]);

shapes! {
    /// Nothing to say.
    NOTHING "Nothing" {}

    /// The server; `environment` and who asks are for those whom it trusts.
    SERVER "Server" {
        "config": Config, "api_extensions": Texts, "api_status": Text, "api_version": Text,
        "auth": Word(&["trusted", "untrusted"]), "public": Flag, "auth_methods": Texts,
        "auth_user_name": Maybe(&Text), "auth_user_method": Maybe(&Text),
        "environment": Maybe(&Object(&ENVIRONMENT)),
    }

    /// What the server runs on.
    ENVIRONMENT "ServerEnvironment" {
        "addresses": Texts, "architectures": Texts, "certificate": Text, "certificate_fingerprint": Text,
        "driver": Text, "driver_version": Text, "firewall": Text, "kernel": Text,
        "kernel_architecture": Text, "kernel_features": Map(&Any), "kernel_version": Text,
        "lxc_features": Map(&Any), "os_name": Text, "os_version": Text, "project": Text, "server": Text,
        "server_clustered": Flag, "server_event_mode": Text, "server_name": Text, "server_pid": Integer,
        "server_version": Text, "karst_version": Text, "storage": Text, "storage_version": Text,
        "storage_supported_drivers": List(&Object(&STORAGE_DRIVER)),
    }

    /// A driver of storage pools.
    STORAGE_DRIVER "ServerStorageDriver" {
        "Name": Text, "Version": Text, "Remote": Flag,
    }

    /// The cluster that this server is in: none.
    CLUSTER "Cluster" {
        "server_name": Text, "enabled": Flag, "member_config": Null,
    }

    /// The tables of keys, by what they configure and by group.
    KEY_TABLE "ConfigurationKeys" {
        "configs": Map(&Map(&Object(&KEY_GROUP))),
    }

    /// Keys, each as an object of one field: its name.
    KEY_GROUP "ConfigurationKeyGroup" {
        "keys": List(&Map(&Object(&KEY))),
    }

    /// A key.
    KEY "ConfigurationKey" {
        "type": Text, "shortdesc": Text, "defaultdesc": Maybe(&Any), "liveupdate": Maybe(&Text),
        "condition": Maybe(&Text),
    }

    /// A trusted certificate.
    CERTIFICATE "Certificate" {
        "name": Text, "type": Text, "restricted": Flag, "projects": Texts, "certificate": Text,
        "fingerprint": Text, "description": Text,
    }

    /// An image.
    IMAGE "Image" {
        "auto_update": Flag, "properties": Config, "public": Flag,
        "update_source": Maybe(&Object(&IMAGE_SOURCE)), "expires_at": Time, "profiles": Texts,
        "aliases": List(&Object(&IMAGE_ALIAS_NAME)), "architecture": Text, "cached": Flag, "filename": Text,
        "fingerprint": Text, "size": Integer, "type": KINDS, "created_at": Time, "last_used_at": Time,
        "uploaded_at": Time, "project": Text,
    }

    /// The server that an image follows.
    IMAGE_SOURCE "ImageSource" {
        "alias": Text, "certificate": Text, "protocol": Text, "server": Text, "image_type": Text,
    }

    /// An alias within its image.
    IMAGE_ALIAS_NAME "ImageAliasName" {
        "name": Text, "description": Text,
    }

    /// An alias of an image.
    IMAGE_ALIAS "ImageAlias" {
        "description": Text, "target": Text, "name": Text, "type": KINDS,
    }

    /// An instance; with recursion also its state and snapshots.
    INSTANCE "Instance" {
        "architecture": Text, "config": Config, "devices": Devices, "ephemeral": Flag, "profiles": Texts,
        "stateful": Flag, "description": Text, "created_at": Time, "expanded_config": Config,
        "expanded_devices": Devices, "name": Text, "status": STATUS, "status_code": Integer,
        "last_used_at": Time, "location": Text, "type": KINDS, "project": Text, "backups": Maybe(&Null),
        "state": Maybe(&Object(&INSTANCE_STATE)),
        "snapshots": Maybe(&Nullable(&List(&Object(&INSTANCE_SNAPSHOT)))),
    }

    /// State of an instance; `karst_reason` says why it is halted, or how it ended by itself.
    INSTANCE_STATE "InstanceState" {
        "status": STATUS, "status_code": Integer, "disk": Map(&Integer), "memory": Object(&MEMORY),
        "network": Nullable(&Map(&Object(&INTERFACE))), "pid": Integer, "processes": Integer,
        "cpu": Object(&CPU), "started_at": Time, "os_info": Nullable(&Object(&OS_INFO)),
        "karst_reason": Maybe(&Text),
    }

    /// Memory, in bytes.
    MEMORY "InstanceMemory" {
        "usage": Integer, "usage_peak": Integer, "total": Integer, "swap_usage": Integer,
        "swap_usage_peak": Integer,
    }

    /// CPU time in nanoseconds.
    CPU "InstanceCpu" {
        "usage": Integer, "allocated_time": Integer,
    }

    /// The system inside.
    OS_INFO "InstanceOs" {
        "os": Text, "os_version": Text, "kernel_version": Text, "hostname": Text, "fqdn": Text,
        "agent": Word(&["karst", "qemu"]),
    }

    /// An interface as the guest sees it.
    INTERFACE "InstanceInterface" {
        "addresses": List(&Object(&ADDRESS)), "counters": Object(&COUNTERS), "hwaddr": Text,
        "host_name": Text, "mtu": Integer, "state": Word(&["up", "down"]), "type": Text,
    }

    /// An address of an interface.
    ADDRESS "Address" {
        "family": Word(&["inet", "inet6"]), "address": Text, "netmask": Text, "scope": Text,
    }

    /// Counters of an interface.
    COUNTERS "InstanceCounters" {
        "bytes_received": Integer, "bytes_sent": Integer, "packets_received": Integer,
        "packets_sent": Integer, "errors_received": Integer, "errors_sent": Integer,
        "packets_dropped_outbound": Integer, "packets_dropped_inbound": Integer,
    }

    /// A snapshot of an instance.
    INSTANCE_SNAPSHOT "InstanceSnapshot" {
        "architecture": Text, "config": Config, "created_at": Time, "devices": Devices, "ephemeral": Flag,
        "expanded_config": Config, "expanded_devices": Devices, "expires_at": Time, "last_used_at": Time,
        "name": Text, "profiles": Texts, "stateful": Flag, "size": Integer,
    }

    /// A snapshot of a custom volume.
    VOLUME_SNAPSHOT "StorageVolumeSnapshot" {
        "config": Config, "description": Text, "expires_at": Time, "name": Text, "content_type": CONTENT,
        "created_at": Time,
    }

    /// A backup of an instance.
    INSTANCE_BACKUP "InstanceBackup" {
        "name": Text, "created_at": Time, "expires_at": Time, "instance_only": Flag, "container_only": Flag,
        "optimized_storage": Flag,
    }

    /// A backup of a custom volume.
    VOLUME_BACKUP "StorageVolumeBackup" {
        "name": Text, "created_at": Time, "expires_at": Time, "volume_only": Flag,
        "optimized_storage": Flag,
    }

    /// What is kept of an image's metadata with an instance.
    METADATA "InstanceMetadata" {
        "architecture": Text, "creation_date": Integer, "expiry_date": Integer, "properties": Config,
        "templates": Map(&Object(&TEMPLATE_RULE)),
    }

    /// When a file is made of a template, and how.
    TEMPLATE_RULE "TemplateRule" {
        "when": Nullable(&Texts), "create_only": Flag, "template": Text,
        "properties": Nullable(&Map(&SCALAR)), "uid": Maybe(&SCALAR), "gid": Maybe(&SCALAR),
        "mode": Maybe(&SCALAR),
    }

    /// Who has a role in a project.
    ACCESS "AccessEntry" {
        "identifier": Text, "role": Text, "provider": Text,
    }

    /// An operation.
    OPERATION "Operation" {
        "id": Text, "class": Word(&["task", "websocket", "token"]), "description": Text, "created_at": Time,
        "updated_at": Time,
        "status": Word(&["Pending", "Running", "Cancelling", "Success", "Failure", "Cancelled"]),
        "status_code": Integer, "resources": Map(&Texts), "metadata": Nullable(&Map(&Any)),
        "may_cancel": Flag, "err": Text, "location": Text,
    }

    /// A network ACL.
    ACL "NetworkAcl" {
        "name": Text, "description": Text, "egress": List(&Object(&ACL_RULE)),
        "ingress": List(&Object(&ACL_RULE)), "config": Config, "used_by": Texts, "project": Text,
    }

    /// A rule of an ACL; what is not said is left out.
    ACL_RULE "NetworkAclRule" {
        "action": Text, "state": Text, "source": Maybe(&Text), "destination": Maybe(&Text),
        "protocol": Maybe(&Text), "source_port": Maybe(&Text), "destination_port": Maybe(&Text),
        "icmp_type": Maybe(&Text), "icmp_code": Maybe(&Text), "description": Maybe(&Text),
    }

    /// An address set.
    ADDRESS_SET "NetworkAddressSet" {
        "name": Text, "description": Text, "addresses": Texts, "config": Config, "used_by": Texts,
        "project": Text,
    }

    /// A forward.
    FORWARD "NetworkForward" {
        "listen_address": Text, "description": Text, "config": Config,
        "ports": List(&Object(&FORWARD_PORT)), "location": Text,
    }

    /// Ports of a forward.
    FORWARD_PORT "NetworkForwardPort" {
        "description": Text, "protocol": Text, "listen_port": Text, "target_port": Text,
        "target_address": Text, "snat": Flag,
    }

    /// An address of a managed network, with its prefix, and its user.
    ALLOCATION "NetworkAllocation" {
        "addresses": Text, "used_by": Text, "type": Word(&["network", "network-forward", "instance"]),
        "hwaddr": Text, "nat": Flag, "network": Text,
    }

    /// A managed network.
    NETWORK "Network" {
        "config": Config, "description": Text, "name": Text, "type": Text, "used_by": Texts,
        "managed": Flag, "status": Text, "locations": Texts, "project": Text,
    }

    /// State of a network.
    NETWORK_STATE "NetworkState" {
        "addresses": List(&Object(&ADDRESS)), "counters": Object(&NETWORK_COUNTERS), "hwaddr": Text,
        "mtu": Integer, "state": Word(&["up", "down"]), "type": Text, "bond": Null,
        "bridge": Nullable(&Object(&BRIDGE)), "vlan": Null, "ovn": Null,
    }

    /// Counters of a network.
    NETWORK_COUNTERS "NetworkCounters" {
        "bytes_received": Integer, "bytes_sent": Integer, "packets_received": Integer,
        "packets_sent": Integer,
    }

    /// What a bridge is.
    BRIDGE "NetworkBridge" {
        "id": Text, "stp": Flag, "forward_delay": Integer, "vlan_default": Integer, "vlan_filtering": Flag,
        "upper_devices": Texts,
    }

    /// A lease.
    LEASE "NetworkLease" {
        "hostname": Text, "hwaddr": Text, "address": Text, "type": Word(&["gateway", "static", "dynamic"]),
        "location": Text, "project": Text,
    }

    /// A profile.
    PROFILE "Profile" {
        "config": Config, "description": Text, "devices": Devices, "name": Text, "used_by": Texts,
        "project": Text,
    }

    /// A project.
    PROJECT_VIEW "Project" {
        "config": Config, "description": Text, "name": Text, "used_by": Texts,
    }

    /// Limits of a project and what it uses of them.
    PROJECT_STATE "ProjectState" {
        "resources": Map(&Object(&LIMIT_USAGE)),
    }

    /// A limit (-1: none) and use.
    LIMIT_USAGE "ProjectLimit" {
        "Limit": Integer, "Usage": Integer,
    }

    /// A storage pool.
    POOL "StoragePool" {
        "config": Config, "description": Text, "name": Text, "driver": Text, "used_by": Texts,
        "status": Text, "locations": Texts,
    }

    /// Space and inodes of a pool.
    POOL_RESOURCES "StoragePoolResources" {
        "space": Object(&USED_TOTAL), "inodes": Object(&USED_TOTAL),
    }

    /// Used and total.
    USED_TOTAL "UsedTotal" {
        "used": Integer, "total": Integer,
    }

    /// A storage volume.
    VOLUME "StorageVolume" {
        "config": Config, "description": Text, "name": Text,
        "type": Word(&["container", "virtual-machine", "image", "custom"]), "used_by": Texts,
        "location": Text, "content_type": CONTENT, "project": Text, "created_at": Time,
    }

    /// State of a volume.
    VOLUME_STATE "StorageVolumeState" {
        "usage": Object(&USED_TOTAL),
    }

    /// A warning.
    WARNING "Warning" {
        "status": Word(&["new", "acknowledged", "resolved"]), "uuid": Text, "location": Text,
        "project": Text, "type": Text, "count": Integer, "first_seen_at": Time, "last_seen_at": Time,
        "last_message": Text, "severity": Word(&["low", "moderate", "high"]), "entity_url": Text,
    }

    /// What could be recovered.
    RECOVERED "RecoverSurvey" {
        "UnknownVolumes": List(&Object(&UNKNOWN_VOLUME)), "DependencyErrors": Texts,
        "UnclearVolumes": Texts,
    }

    /// A volume that could be recovered.
    UNKNOWN_VOLUME "RecoverVolume" {
        "name": Text, "type": Text, "snapshotCount": Integer, "project": Text, "pool": Text,
    }
}
