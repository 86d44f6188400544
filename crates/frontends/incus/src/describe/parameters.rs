//! Parameters of queries, and headers.
#![allow(missing_docs)] // each says in itself what it is

use super::{
    Kind::{self, Flag, Integer, Must, Text, Word},
    Parameter,
};

const fn query(name: &'static str, kind: Kind, text: &'static str) -> Parameter {
    Parameter { place: "query", name, kind, text }
}

const fn header(name: &'static str, kind: Kind, text: &'static str) -> Parameter {
    Parameter { place: "header", name, kind, text }
}

const KINDS: Kind = Word(&["container", "virtual-machine"]);

pub const PROJECT: Parameter = query("project", Text, "Project; `default` when absent");
pub const OF_PROJECT: Parameter =
    query("project", Text, "What belongs to this project only; all when absent");
pub const ALL_PROJECTS: Parameter =
    query("all-projects", Flag, "Those of all projects that the caller may see");
pub const RECURSION: Parameter = query("recursion", Integer, "0: paths; 1 and 2: whole objects");
pub const STATE_RECURSION: Parameter = query(
    "recursion",
    Text,
    "0: paths; 1: objects; 2: objects with state and snapshots, of which `2;fields=state.disk,state.network` chooses the costly parts",
);
pub const STATE_TOO: Parameter =
    query("recursion", Integer, "0: the object; 1 and 2: with its state and snapshots");
pub const FILTER: Parameter =
    query("filter", Text, "Only what matches, such as `name eq c1 and status eq Running`");
pub const LIMIT: Parameter = query(
    "limit",
    Integer,
    "At most so many (1 to 1000), by name; `link` of the answer's header is the next page",
);
pub const AFTER: Parameter = query(
    "after",
    Text,
    "Those behind this name (PROJECT/NAME with all-projects), which need not be there any more",
);
pub const INSTANCE_TYPE: Parameter = query("instance-type", KINDS, "Those of this type only");
pub const NEW_TYPE: Parameter = query("instance-type", KINDS, "Type where the body names none");
pub const TARGET: Parameter = query("target", Text, "Node on which it is made");
pub const ALIAS_TYPE: Parameter = query("type", KINDS, "The alias of an image of this type");
pub const SECRET: Parameter = query("secret", Text, "Secret that shows a hidden image (`POST …/secret`)");
pub const SOCKET_SECRET: Parameter =
    query("secret", Must(&Text), "Secret of the websocket, from `fds` of the operation's metadata");
pub const WAIT_SECRET: Parameter = query(
    "secret",
    Text,
    "Secret of the operation of an image that was brought here, by which who is not known may wait for it",
);
pub const PATH: Parameter = query("path", Must(&Text), "Path in the instance");
pub const VOLUME_PATH: Parameter = query("path", Must(&Text), "Path in the volume");
pub const TEMPLATE: Parameter = query("path", Must(&Text), "Name of the template");
pub const TEMPLATE_TOO: Parameter =
    query("path", Text, "Name of the template to be shown; a list when absent");
pub const DUMP_FORMAT: Parameter = query(
    "format",
    Word(&["elf", "kdump-zlib", "kdump-lzo", "kdump-snappy", "win-dmp"]),
    "Form of the dump; `elf` when absent",
);
pub const TIMEOUT: Parameter = query("timeout", Integer, "Seconds to wait; -1: as long as it takes");
pub const EVENTS: Parameter = query(
    "type",
    Text,
    "Types of events, with commas between: `lifecycle`, `operation`, `logging`, `network-acl`, `ovn`",
);
pub const CONSOLE_TYPE: Parameter = query(
    "type",
    Word(&["log", "vga"]),
    "`log`: what the console said; `vga`: what the screen shows, as PNG",
);
pub const PRINCIPAL: Parameter = query("principal", Text, "Fingerprint or name; who asks when absent");
pub const PERMISSION: Parameter = query("permission", Must(&Text), "Permission, such as `instance_use`");
pub const OBJECT: Parameter = query("object", Must(&Text), "`server`, or a project");
pub const FROM_NUMBER: Parameter = query("from", Integer, "Number of the first record");
pub const RECORDS: Parameter = query("limit", Integer, "At most so many records");
pub const FROM: Parameter = query("from", Must(&Text), "Instance, or address, from which the packet comes");
pub const TO: Parameter = query("to", Must(&Text), "Instance, or address, to which it goes");
pub const PORT: Parameter = query("port", Must(&Text), "Port, as in `80`, `udp/53` or `icmp`");
pub const SECONDS: Parameter = query("seconds", Integer, "The series with averages of so many seconds only");

pub const IF_MATCH: Parameter =
    header("If-Match", Text, "ETag of the object as it was read; 412 when it has changed since");
pub const UID: Parameter = header("X-Incus-uid", Integer, "Owner of the file");
pub const GID: Parameter = header("X-Incus-gid", Integer, "Group of the file");
pub const MODE: Parameter = header("X-Incus-mode", Text, "Permission bits in octal, such as 0644");
pub const FILE_TYPE: Parameter = header(
    "X-Incus-type",
    Word(&["file", "directory", "symlink"]),
    "What is made; of a link the body is the target",
);
pub const WRITE: Parameter =
    header("X-Incus-write", Word(&["overwrite", "append"]), "What becomes of a file that is there");
pub const UPLOAD_NAME: Parameter = header("X-Incus-name", Text, "Of a file: name of what is made of it");
pub const UPLOAD_POOL: Parameter = header("X-Incus-pool", Text, "Of a backup: pool of the instance");
pub const UPLOAD_CONFIG: Parameter =
    header("X-Incus-config", Text, "Not taken: refused where it says something");
pub const UPLOAD_DEVICES: Parameter =
    header("X-Incus-devices", Text, "Not taken: refused where it says something");
pub const UPLOAD_TYPE: Parameter = header("X-Incus-type", Word(&["backup", "iso"]), "Of a file: what it is");
pub const IMAGE_FINGERPRINT: Parameter =
    header("X-Incus-fingerprint", Text, "Of a file: the fingerprint that it must have");
pub const IMAGE_FILENAME: Parameter = header("X-Incus-filename", Text, "Of a file: its name");
pub const IMAGE_PUBLIC: Parameter =
    header("X-Incus-public", Word(&["1", "true"]), "Of a file: everybody may have the image");
pub const IMAGE_PROPERTIES: Parameter =
    header("X-Incus-properties", Text, "Of a file: properties, written as a query");
pub const IMAGE_ALIASES: Parameter =
    header("X-Incus-aliases", Text, "Of a file: `alias=NAME`, written as a query");
pub const IMAGE_PROFILES: Parameter = header(
    "X-Incus-profiles",
    Text,
    "Of a file that is brought by a secret: `profile=NAME`, written as a query; refused without one",
);
pub const IMAGE_SECRET: Parameter = header(
    "X-Incus-secret",
    Text,
    "Of a file that is awaited here (`source.mode` is `push`): the secret by which who is not known may bring it",
);
pub const DISK_FORMAT: Parameter = header(
    "X-Karst-disk-format",
    Word(&["qcow2", "raw", "vmdk", "ova"]),
    "Of a file that is a disk by itself: its format",
);
