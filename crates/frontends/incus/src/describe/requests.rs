//! What bodies of requests carry: the fields that handlers read, and those that they take without meaning.

use super::{
    Kind::{self, Config, Devices, Flag, Integer, List, Map, Must, Object, Text, Texts, Time, Word},
    Shape, shapes,
};

const KINDS: Kind = Word(&["container", "virtual-machine"]);
const CERTIFICATE_TYPE: Kind = Word(&["client", "metrics"]);
const PROTOCOL: Kind = Word(&["incus", "lxd", "simplestreams", "oci"]);

shapes! {
    /// Says nothing: the path says all.
    BLANK "Blank" {}

    /// A new name.
    RENAME "Rename" {
        "name": Must(&Text),
    }

    /// The server's configuration.
    SERVER_PUT "ServerPut" {
        "config": Config,
    }

    /// A certificate to be trusted, or a token by which one will be.
    CERTIFICATES_POST "CertificatesPost" {
        "name": Text, "description": Text, "type": CERTIFICATE_TYPE, "certificate": Text, "token": Flag,
        "trust_token": Text, "password": Text, "restricted": Flag, "projects": Texts,
    } carries [
        "fingerprint",
    ]

    /// What may be changed of a certificate.
    CERTIFICATE_PUT "CertificatePut" {
        "name": Text, "description": Text, "type": CERTIFICATE_TYPE, "certificate": Text,
        "restricted": Flag, "projects": Texts,
    } carries [
        "fingerprint",
    ]

    /// An alias of an image to be.
    IMAGE_ALIAS_INPUT "ImageAliasInput" {
        "name": Must(&Text), "description": Text,
    } carries [
        "type",
    ]

    /// What an image is made of, or where it comes from: `type` says which, unless it is awaited (`mode` is `push`).
    IMAGES_POST_SOURCE "ImagesPostSource" {
        "type": Word(&["", "image", "instance", "container", "virtual-machine", "snapshot"]), "name": Text,
        "project": Text, "mode": Word(&["", "pull", "push"]), "server": Text, "protocol": PROTOCOL,
        "certificate": Text, "fingerprint": Text, "alias": Text, "image_type": KINDS, "secret": Text,
        "url": Text,
    }

    /// An image that is made of an instance, fetched from a server, or awaited from one that brings it.
    IMAGES_POST "ImagesPost" {
        "source": Must(&Object(&IMAGES_POST_SOURCE)), "aliases": List(&Object(&IMAGE_ALIAS_INPUT)),
        "properties": Config, "public": Flag, "auto_update": Flag, "expires_at": Time, "profiles": Texts,
        "filename": Text, "compression_algorithm": Text, "format": Text,
    }

    /// The server that an image is pushed to, and the secret that was made for it there.
    IMAGE_EXPORT_POST "ImageExportPost" {
        "target": Must(&Text), "certificate": Text, "secret": Must(&Text), "project": Text,
        "profiles": Texts, "aliases": List(&Object(&IMAGE_ALIAS_INPUT)),
    }

    /// What may be changed of an image.
    IMAGE_PUT "ImagePut" {
        "public": Flag, "auto_update": Flag, "properties": Config, "profiles": Texts, "expires_at": Time,
    } carries [
        "aliases", "architecture", "cached", "filename", "fingerprint", "size", "type", "created_at",
        "last_used_at", "uploaded_at", "project", "update_source",
    ]

    /// An alias of an image.
    IMAGE_ALIASES_POST "ImageAliasesPost" {
        "name": Must(&Text), "target": Must(&Text), "description": Text,
    } carries [
        "type",
    ]

    /// What may be changed of an alias.
    IMAGE_ALIAS_PUT "ImageAliasPut" {
        "target": Text, "description": Text,
    } carries [
        "name", "type",
    ]

    /// An image to be built of a recipe.
    IMAGES_BUILD "ImagesBuild" {
        "recipe": Must(&Text), "type": KINDS, "aliases": Texts, "alias": Text, "public": Flag,
        "properties": Config,
    }

    /// What the root disk begins as.
    INSTANCE_SOURCE "InstanceSource" {
        "type": Must(&Word(&["image", "copy", "none"])), "fingerprint": Text, "alias": Text,
        "properties": Config, "project": Text, "server": Text, "protocol": PROTOCOL, "certificate": Text,
        "secret": Text, "image_type": KINDS, "mode": Text, "source": Text, "instance_only": Flag,
        "container_only": Flag, "refresh": Flag, "refresh_exclude_older": Flag,
    } carries [
        "allow_inconsistent", "base-image", "live", "operation", "secrets",
    ]

    /// What the root disk begins as again.
    REBUILD_SOURCE "RebuildSource" {
        "type": Must(&Word(&["image", "none"])), "fingerprint": Text, "alias": Text, "properties": Config,
        "project": Text, "server": Text, "protocol": PROTOCOL, "mode": Text,
    } carries [
        "allow_inconsistent", "base-image", "live", "operation", "secrets", "certificate", "secret",
        "source", "instance_only", "container_only", "refresh", "refresh_exclude_older",
    ]

    /// An instance begins again.
    INSTANCE_REBUILD_POST "InstanceRebuildPost" {
        "source": Must(&Object(&REBUILD_SOURCE)),
    }

    /// An instance to be.
    INSTANCES_POST "InstancesPost" {
        "name": Text, "type": KINDS, "vmid": Integer, "source": Must(&Object(&INSTANCE_SOURCE)),
        "description": Text, "ephemeral": Flag, "config": Config, "devices": Devices, "profiles": Texts,
        "start": Flag, "architecture": Text, "instance_type": Text, "stateful": Flag, "restore": Text,
    } carries [
        "disk_only",
    ]

    /// All that may be changed of an instance; or a snapshot to go back to.
    INSTANCE_PUT "InstancePut" {
        "description": Text, "ephemeral": Flag, "config": Config, "devices": Devices, "profiles": Texts,
        "restore": Text, "stateful": Flag,
    } carries [
        "created_at", "expanded_config", "expanded_devices", "name", "status", "status_code",
        "last_used_at", "location", "type", "project", "backups", "state", "snapshots", "architecture",
        "disk_only",
    ]

    /// What is to be changed of an instance.
    INSTANCE_PATCH "InstancePatch" {
        "description": Text, "ephemeral": Flag, "config": Config, "devices": Devices, "profiles": Texts,
    } carries [
        "created_at", "expanded_config", "expanded_devices", "name", "status", "status_code",
        "last_used_at", "location", "type", "project", "backups", "state", "snapshots", "architecture",
        "disk_only", "restore", "stateful",
    ]

    /// Another name, pool or project.
    INSTANCE_POST "InstancePost" {
        "name": Text, "pool": Text, "project": Text, "migration": Flag, "instance_only": Flag,
        "container_only": Flag, "target": Text, "config": Config, "Config": Config, "devices": Devices,
        "Devices": Devices, "profiles": Texts, "Profiles": Texts,
    } carries [
        "allow_inconsistent", "live",
    ]

    /// A change of power.
    INSTANCE_STATE_PUT "InstanceStatePut" {
        "action": Must(&Word(&["start", "stop", "restart", "freeze", "unfreeze"])), "force": Flag,
        "timeout": Integer, "stateful": Flag,
    }

    /// A change of power of all of a project.
    INSTANCES_PUT "InstancesPut" {
        "state": Must(&Object(&INSTANCE_STATE_PUT)),
    }

    /// A backup to be.
    BACKUPS_POST "BackupsPost" {
        "name": Text, "expires_at": Time, "instance_only": Flag, "container_only": Flag,
        "volume_only": Flag, "compression_algorithm": Text, "optimized_storage": Flag,
    } carries [
        "created_at",
    ]

    /// A snapshot to be.
    SNAPSHOTS_POST "SnapshotsPost" {
        "name": Text, "description": Text, "expires_at": Time, "stateful": Flag, "quiesce": Text,
    } carries [
        "disk_only",
    ]

    /// A new name.
    SNAPSHOT_POST "SnapshotPost" {
        "name": Must(&Text), "migration": Flag,
    } carries [
        "live", "target",
    ]

    /// What may be changed of a snapshot.
    SNAPSHOT_PUT "SnapshotPut" {
        "description": Text, "expires_at": Time,
    } carries [
        "architecture", "config", "created_at", "devices", "ephemeral", "expanded_config",
        "expanded_devices", "last_used_at", "name", "profiles", "size", "stateful", "content_type",
        "restore",
    ]

    /// A console to be shown on websockets; `port` is a device of the type port, which is shown instead.
    CONSOLE_POST "ConsolePost" {
        "type": Word(&["console", "vga"]), "width": Integer, "height": Integer, "force": Flag,
        "port": Text,
    }

    /// A program to be run.
    EXEC_POST "ExecPost" {
        "command": Must(&Texts), "environment": Config, "interactive": Flag, "width": Integer,
        "height": Integer, "user": Integer, "group": Integer, "cwd": Text, "wait-for-websocket": Flag,
        "record-output": Flag,
    }

    /// Disks that are to go on in new layers: one, or all.
    LAYERS_POST "LayersPost" {
        "device": Text, "name": Text, "snapshot": Text, "description": Text, "quiesce": Flag,
    }

    /// Layers that go into what lies below them: from `top` (the active one) down to `base` (the lowest file).
    LAYERS_COMMIT "LayersCommit" {
        "device": Text, "top": Text, "base": Text, "bandwidth": Integer,
    }

    /// What lies below the active layer and goes into it, down to `base` or all.
    LAYERS_PULL "LayersPull" {
        "device": Text, "base": Text, "bandwidth": Integer,
    }

    /// Keys to be pressed, such as `ctrl-alt-delete`.
    KEYS_POST "KeysPost" {
        "keys": Must(&Texts),
    }

    /// The password of a display.
    DISPLAY_PUT "DisplayPut" {
        "password": Must(&Text), "valid_to": Time,
    }

    /// When a file is made of a template, and how.
    TEMPLATE_RULE_INPUT "TemplateRuleInput" {
        "when": Texts, "create_only": Flag, "template": Text, "properties": Config, "uid": Text,
        "gid": Text, "mode": Text,
    }

    /// What is kept of an image's metadata with an instance.
    METADATA_PUT "MetadataPut" {
        "architecture": Text, "creation_date": Integer, "expiry_date": Integer, "properties": Config,
        "templates": Map(&Object(&TEMPLATE_RULE_INPUT)),
    }

    /// A role of somebody; without a project it is one everywhere.
    ACCESS_GRANT "AccessGrant" {
        "principal": Must(&Text), "role": Must(&Text), "project": Text,
    }

    /// A client of libvirt to be.
    LIBVIRT_CLIENTS_POST "LibvirtClientsPost" {
        "name": Must(&Text), "description": Text, "restricted": Flag, "projects": Texts,
    }

    /// Who a project is at a registry.
    REGISTRY_PUT "RegistryPut" {
        "user": Must(&Text), "password": Must(&Text), "certificate": Text,
    }

    /// Is a network to be there, and to begin with its host? What is not said stays.
    NETWORK_LIFE_PUT "NetworkLifePut" {
        "active": Flag, "autostart": Flag,
    }

    /// A secret to be.
    SECRETS_POST "SecretsPost" {
        "uuid": Text, "description": Text, "type": Text, "usage": Text, "private": Flag, "ephemeral": Flag,
        "value": Text,
    }

    /// The value of a secret.
    SECRET_PUT "SecretPut" {
        "value": Must(&Text),
    }

    /// An API token to be.
    TOKENS_POST "TokensPost" {
        "name": Must(&Text), "role": Must(&Text), "projects": Texts, "expires_at": Time,
        "description": Text,
    }

    /// A rule.
    ACL_RULE_INPUT "NetworkAclRuleInput" {
        "action": Text, "source": Text, "destination": Text, "protocol": Text, "source_port": Text,
        "destination_port": Text, "icmp_type": Text, "icmp_code": Text, "description": Text, "state": Text,
    }

    /// A network ACL to be.
    NETWORK_ACLS_POST "NetworkAclsPost" {
        "name": Must(&Text), "description": Text, "config": Config,
        "ingress": List(&Object(&ACL_RULE_INPUT)), "egress": List(&Object(&ACL_RULE_INPUT)),
    } carries [
        "used_by", "project", "listen_address", "location",
    ]

    /// What may be changed of a network ACL.
    NETWORK_ACL_PUT "NetworkAclPut" {
        "description": Text, "config": Config, "ingress": List(&Object(&ACL_RULE_INPUT)),
        "egress": List(&Object(&ACL_RULE_INPUT)),
    } carries [
        "name", "used_by", "project", "listen_address", "location",
    ]

    /// An address set to be.
    NETWORK_ADDRESS_SETS_POST "NetworkAddressSetsPost" {
        "name": Must(&Text), "description": Text, "config": Config, "addresses": Texts,
    } carries [
        "used_by", "project", "listen_address", "location",
    ]

    /// What may be changed of an address set.
    NETWORK_ADDRESS_SET_PUT "NetworkAddressSetPut" {
        "description": Text, "config": Config, "addresses": Texts,
    } carries [
        "name", "used_by", "project", "listen_address", "location",
    ]

    /// Ports of a forward.
    FORWARD_PORT_INPUT "NetworkForwardPortInput" {
        "description": Text, "protocol": Text, "listen_port": Text, "target_port": Text,
        "target_address": Text, "snat": Flag,
    }

    /// A forward to be.
    NETWORK_FORWARDS_POST "NetworkForwardsPost" {
        "listen_address": Must(&Text), "description": Text, "config": Config,
        "ports": List(&Object(&FORWARD_PORT_INPUT)),
    } carries [
        "name", "used_by", "project", "location",
    ]

    /// What may be changed of a forward.
    NETWORK_FORWARD_PUT "NetworkForwardPut" {
        "description": Text, "config": Config, "ports": List(&Object(&FORWARD_PORT_INPUT)),
    } carries [
        "listen_address", "name", "used_by", "project", "location",
    ]

    /// A network to be.
    NETWORKS_POST "NetworksPost" {
        "name": Must(&Text), "type": Text, "description": Text, "config": Config,
    }

    /// What may be changed of a network.
    NETWORK_PUT "NetworkPut" {
        "description": Text, "config": Config,
    } carries [
        "name", "type", "used_by", "managed", "status", "locations", "project",
    ]

    /// A profile to be.
    PROFILES_POST "ProfilesPost" {
        "name": Must(&Text), "description": Text, "config": Config, "devices": Devices,
    } carries [
        "used_by", "project",
    ]

    /// What may be changed of a profile.
    PROFILE_PUT "ProfilePut" {
        "description": Text, "config": Config, "devices": Devices,
    } carries [
        "name", "used_by", "project", "type", "status", "status_code", "operation", "error_code", "error",
        "metadata",
    ]

    /// A project to be.
    PROJECTS_POST "ProjectsPost" {
        "name": Must(&Text), "description": Text, "config": Config,
    }

    /// What may be changed of a project.
    PROJECT_PUT "ProjectPut" {
        "description": Text, "config": Config,
    } carries [
        "name", "used_by",
    ]

    /// A storage pool to be.
    STORAGE_POOLS_POST "StoragePoolsPost" {
        "name": Must(&Text), "driver": Must(&Text), "description": Text, "config": Config,
    }

    /// What may be changed of a storage pool.
    STORAGE_POOL_PUT "StoragePoolPut" {
        "description": Text, "config": Config,
    } carries [
        "name", "driver", "used_by", "status", "locations",
    ]

    /// Whether a storage pool is open on its hosts, and whether it begins with them.
    POOL_LIFE_PUT "StoragePoolLifePut" {
        "active": Flag, "autostart": Flag,
    } carries [
        "persistent", "built", "file_system",
    ]

    /// The volume or snapshot (VOLUME/SNAPSHOT) that is copied.
    VOLUME_SOURCE "StorageVolumeSource" {
        "type": Word(&["", "none", "copy"]), "name": Text, "pool": Text, "project": Text,
        "volume_only": Flag, "refresh": Flag, "refresh_exclude_older": Flag,
    } carries [
        "mode", "location", "certificate", "operation", "secrets",
    ]

    /// A custom volume to be.
    STORAGE_VOLUMES_POST "StorageVolumesPost" {
        "name": Must(&Text), "type": Word(&["custom"]), "content_type": Word(&["filesystem", "block"]),
        "description": Text, "config": Config, "source": Object(&VOLUME_SOURCE),
    } carries [
        "restore", "pool",
    ]

    /// What may be changed of a custom volume; or a snapshot to go back to.
    STORAGE_VOLUME_PUT "StorageVolumePut" {
        "description": Text, "config": Config, "restore": Text,
    } carries [
        "name", "type", "used_by", "location", "content_type", "project", "created_at", "pool",
    ]

    /// Another name, pool or project.
    STORAGE_VOLUME_POST "StorageVolumePost" {
        "name": Must(&Text), "pool": Text, "project": Text, "migration": Flag,
    } carries [
        "target", "source", "volume_only",
    ]

    /// Somebody has seen a warning.
    WARNING_PUT "WarningPut" {
        "status": Must(&Word(&["new", "acknowledged"])),
    } carries [
        "uuid", "location", "project", "type", "count", "first_seen_at", "last_seen_at", "last_message",
        "severity", "entity_url",
    ]

    /// A storage pool to be looked at.
    RECOVER_POOL "RecoverPool" {
        "name": Must(&Text), "driver": Text, "description": Text, "config": Config,
    }

    /// Storage pools to be looked at.
    RECOVER_POST "RecoverPost" {
        "pools": Must(&List(&Object(&RECOVER_POOL))),
    }
}
