//! The rows of the table that are served, each with what it reads, takes and answers. Instances and images are in
//! [`super::guests`].

use super::{
    Answer::{Content, Created, Done, Head, Listed, Operation, Sync, Upgrade},
    Body::{Blank, Both, Json, Nothing},
    Described,
    Kind::{Any, Either, List, Map, Object, Texts},
    answers::*,
    guests::{self, BYTES, FILE},
    hosts::*,
    parameters::*,
    requests::*,
};

/// Rows as they are written here: methods, path, what it does, parameters beside the path's, body, answers.
macro_rules! described {
    ($( $methods:literal $path:literal $text:literal [ $($parameter:expr),* ] $body:expr => $($answer:expr),+ ; )+) => {
        &[ $( Described {
            methods: $methods,
            path: $path,
            text: $text,
            parameters: &[ $($parameter),* ],
            body: $body,
            answers: &[ $($answer),+ ],
        } ),+ ]
    };
}
pub(crate) use described;

/// All of them.
pub fn all() -> impl Iterator<Item = &'static Described> {
    [SERVER_ROWS, guests::INSTANCE_ROWS, guests::IMAGE_ROWS, NETWORK_ROWS, STORAGE_ROWS, KARST_ROWS]
        .into_iter()
        .flatten()
}

static SERVER_ROWS: &[Described] = described! {
    "GET" "/" "Versions of the API" [] Nothing => Sync(Texts);
    "GET" "/1.0" "The server" [PROJECT] Nothing => Sync(Object(&SERVER));
    "PUT" "/1.0" "Replaces the server's configuration" [IF_MATCH] Json(&SERVER_PUT) => Done;
    "PATCH" "/1.0" "Changes keys of the server's configuration" [IF_MATCH] Json(&SERVER_PUT) => Done;
    "GET" "/1.0/certificates" "Trusted certificates" [RECURSION, FILTER] Nothing => Listed(&CERTIFICATE);
    "POST" "/1.0/certificates" "Trusts a certificate, issues a token, or redeems one" []
        Json(&CERTIFICATES_POST) => Created, Operation;
    "GET" "/1.0/certificates/{fingerprint}" "A trusted certificate" [] Nothing => Sync(Object(&CERTIFICATE));
    "PUT" "/1.0/certificates/{fingerprint}" "Replaces what may be changed of it" [IF_MATCH]
        Json(&CERTIFICATE_PUT) => Done;
    "PATCH" "/1.0/certificates/{fingerprint}" "Changes it" [IF_MATCH] Json(&CERTIFICATE_PUT) => Done;
    "DELETE" "/1.0/certificates/{fingerprint}" "Trusts it no more" [] Nothing => Done;
    "GET" "/1.0/cluster" "The cluster that this server is in" [] Nothing => Sync(Object(&CLUSTER));
    "GET" "/1.0/events" "Events as they come" [EVENTS, ALL_PROJECTS, PROJECT] Nothing => Upgrade("websocket");
    "GET" "/1.0/metadata/configuration" "The tables of keys" [] Nothing => Sync(Object(&KEY_TABLE));
    "GET" "/1.0/metrics" "Figures of instances and the server" [OF_PROJECT] Nothing =>
        Content("text/plain"), Content("application/openmetrics-text");
    "GET" "/1.0/operations" "Operations by status" [RECURSION, ALL_PROJECTS, PROJECT] Nothing =>
        Sync(Map(&Either(&[List(&Object(&OPERATION)), Texts])));
    "GET" "/1.0/operations/{id}" "An operation" [] Nothing => Sync(Object(&OPERATION));
    "DELETE" "/1.0/operations/{id}" "Cancels it" [] Nothing => Done;
    "GET" "/1.0/operations/{id}/wait" "Waits for its end" [TIMEOUT, WAIT_SECRET] Nothing =>
        Sync(Object(&OPERATION));
    "GET" "/1.0/operations/{id}/websocket" "One of its websockets" [SOCKET_SECRET] Nothing => Upgrade("websocket");
    "GET" "/1.0/profiles" "Profiles" [RECURSION, FILTER, ALL_PROJECTS, PROJECT] Nothing => Listed(&PROFILE);
    "POST" "/1.0/profiles" "Makes a profile" [PROJECT] Json(&PROFILES_POST) => Created;
    "GET" "/1.0/profiles/{name}" "A profile" [PROJECT] Nothing => Sync(Object(&PROFILE));
    "POST" "/1.0/profiles/{name}" "Renames it" [PROJECT] Json(&RENAME) => Created;
    "PUT" "/1.0/profiles/{name}" "Replaces what may be changed of it" [PROJECT, IF_MATCH] Json(&PROFILE_PUT) => Done;
    "PATCH" "/1.0/profiles/{name}" "Changes it" [PROJECT, IF_MATCH] Json(&PROFILE_PUT) => Done;
    "DELETE" "/1.0/profiles/{name}" "Deletes it" [PROJECT] Nothing => Done;
    "GET" "/1.0/projects" "Projects" [RECURSION, FILTER] Nothing => Listed(&PROJECT_VIEW);
    "POST" "/1.0/projects" "Makes a project" [] Json(&PROJECTS_POST) => Created;
    "GET" "/1.0/projects/{name}" "A project" [] Nothing => Sync(Object(&PROJECT_VIEW));
    "POST" "/1.0/projects/{name}" "Renames it" [] Json(&RENAME) => Operation;
    "PUT" "/1.0/projects/{name}" "Replaces what may be changed of it" [IF_MATCH] Json(&PROJECT_PUT) => Done;
    "PATCH" "/1.0/projects/{name}" "Changes it" [IF_MATCH] Json(&PROJECT_PUT) => Done;
    "DELETE" "/1.0/projects/{name}" "Deletes it" [] Nothing => Done;
    "GET" "/1.0/projects/{name}/access" "Who has a role in it" [] Nothing => Sync(List(&Object(&ACCESS)));
    "GET" "/1.0/projects/{name}/state" "Its limits and what it uses of them" [] Nothing => Sync(Object(&PROJECT_STATE));
    "GET" "/1.0/resources" "The host's hardware" [] Nothing => Sync(Object(&RESOURCES));
    "GET" "/1.0/warnings" "Warnings" [RECURSION, FILTER, OF_PROJECT] Nothing => Listed(&WARNING);
    "GET" "/1.0/warnings/{uuid}" "A warning" [] Nothing => Sync(Object(&WARNING));
    "PUT PATCH" "/1.0/warnings/{uuid}" "Acknowledges it, or makes it new again" [] Json(&WARNING_PUT) => Done;
    "DELETE" "/1.0/warnings/{uuid}" "Deletes it" [] Nothing => Done;
    "GET" "/internal/ready" "Is the server ready?" [] Nothing => Done;
    "POST" "/internal/recover/import" "Recovers what is on pools" [] Json(&RECOVER_POST) => Done;
    "POST" "/internal/recover/validate" "What could be recovered" [] Json(&RECOVER_POST) => Sync(Object(&RECOVERED));
    "PUT" "/internal/shutdown" "Stops all guests, then the server" [] Blank => Done;
};

static NETWORK_ROWS: &[Described] = described! {
    "GET" "/1.0/network-acls" "Network ACLs" [RECURSION, FILTER, PROJECT] Nothing => Listed(&ACL);
    "POST" "/1.0/network-acls" "Makes a network ACL" [PROJECT] Json(&NETWORK_ACLS_POST) => Created;
    "GET" "/1.0/network-acls/{name}" "A network ACL" [PROJECT] Nothing => Sync(Object(&ACL));
    "POST" "/1.0/network-acls/{name}" "Renames it" [PROJECT] Json(&RENAME) => Created;
    "PUT" "/1.0/network-acls/{name}" "Replaces what may be changed of it" [PROJECT, IF_MATCH]
        Json(&NETWORK_ACL_PUT) => Done;
    "PATCH" "/1.0/network-acls/{name}" "Changes it" [PROJECT, IF_MATCH] Json(&NETWORK_ACL_PUT) => Done;
    "DELETE" "/1.0/network-acls/{name}" "Deletes it" [PROJECT] Nothing => Done;
    "GET" "/1.0/network-acls/{name}/log" "What its rules logged, an entry of JSON a line" [PROJECT] Nothing =>
        Content(BYTES);
    "GET" "/1.0/network-address-sets" "Address sets" [RECURSION, FILTER, PROJECT] Nothing => Listed(&ADDRESS_SET);
    "POST" "/1.0/network-address-sets" "Makes an address set" [PROJECT] Json(&NETWORK_ADDRESS_SETS_POST) => Created;
    "GET" "/1.0/network-address-sets/{name}" "An address set" [PROJECT] Nothing => Sync(Object(&ADDRESS_SET));
    "POST" "/1.0/network-address-sets/{name}" "Renames it" [PROJECT] Json(&RENAME) => Created;
    "PUT" "/1.0/network-address-sets/{name}" "Replaces what may be changed of it" [PROJECT, IF_MATCH]
        Json(&NETWORK_ADDRESS_SET_PUT) => Done;
    "PATCH" "/1.0/network-address-sets/{name}" "Changes it" [PROJECT, IF_MATCH]
        Json(&NETWORK_ADDRESS_SET_PUT) => Done;
    "DELETE" "/1.0/network-address-sets/{name}" "Deletes it" [PROJECT] Nothing => Done;
    "GET" "/1.0/network-allocations" "Which addresses are given to what" [ALL_PROJECTS, PROJECT] Nothing =>
        Sync(List(&Object(&ALLOCATION)));
    "GET" "/1.0/networks" "Managed networks" [RECURSION, FILTER, PROJECT] Nothing => Listed(&NETWORK);
    "POST" "/1.0/networks" "Makes a network" [PROJECT] Json(&NETWORKS_POST) => Created;
    "GET" "/1.0/networks/{name}" "A network" [PROJECT] Nothing => Sync(Object(&NETWORK));
    "POST" "/1.0/networks/{name}" "Renames it" [PROJECT] Json(&RENAME) => Created;
    "PUT" "/1.0/networks/{name}" "Replaces what may be changed of it" [PROJECT, IF_MATCH] Json(&NETWORK_PUT) => Done;
    "PATCH" "/1.0/networks/{name}" "Changes it" [PROJECT, IF_MATCH] Json(&NETWORK_PUT) => Done;
    "DELETE" "/1.0/networks/{name}" "Deletes it" [PROJECT] Nothing => Done;
    "GET" "/1.0/networks/{name}/leases" "Its leases" [PROJECT] Nothing => Sync(List(&Object(&LEASE)));
    "GET" "/1.0/networks/{name}/state" "Its state" [PROJECT] Nothing => Sync(Object(&NETWORK_STATE));
    "GET" "/1.0/networks/{name}/forwards" "Its forwards" [RECURSION, FILTER, PROJECT] Nothing => Listed(&FORWARD);
    "POST" "/1.0/networks/{name}/forwards" "Makes a forward" [PROJECT] Json(&NETWORK_FORWARDS_POST) => Created;
    "GET" "/1.0/networks/{name}/forwards/{listenAddress}" "A forward" [PROJECT] Nothing => Sync(Object(&FORWARD));
    "PUT" "/1.0/networks/{name}/forwards/{listenAddress}" "Replaces what may be changed of it" [PROJECT, IF_MATCH]
        Json(&NETWORK_FORWARD_PUT) => Done;
    "PATCH" "/1.0/networks/{name}/forwards/{listenAddress}" "Changes it" [PROJECT, IF_MATCH]
        Json(&NETWORK_FORWARD_PUT) => Done;
    "DELETE" "/1.0/networks/{name}/forwards/{listenAddress}" "Deletes it" [PROJECT] Nothing => Done;
};

static STORAGE_ROWS: &[Described] = described! {
    "GET" "/1.0/storage-pools" "Storage pools" [RECURSION, FILTER] Nothing => Listed(&POOL);
    "POST" "/1.0/storage-pools" "Makes a storage pool" [] Json(&STORAGE_POOLS_POST) => Created;
    "GET" "/1.0/storage-pools/{name}" "A storage pool" [] Nothing => Sync(Object(&POOL));
    "PUT" "/1.0/storage-pools/{name}" "Replaces what may be changed of it" [IF_MATCH] Json(&STORAGE_POOL_PUT) => Done;
    "PATCH" "/1.0/storage-pools/{name}" "Changes it" [IF_MATCH] Json(&STORAGE_POOL_PUT) => Done;
    "DELETE" "/1.0/storage-pools/{name}" "Deletes it" [] Nothing => Done;
    "GET" "/1.0/storage-pools/{name}/resources" "Its space" [] Nothing => Sync(Object(&POOL_RESOURCES));
    "GET" "/1.0/storage-pools/{name}/volumes" "Its volumes" [RECURSION, FILTER, ALL_PROJECTS, PROJECT] Nothing =>
        Listed(&VOLUME);
    "POST" "/1.0/storage-pools/{name}/volumes" "Makes a custom volume" [PROJECT, UPLOAD_NAME, UPLOAD_TYPE]
        Both(&[&STORAGE_VOLUMES_POST], &[BYTES]) => Created, Operation;
    "GET" "/1.0/storage-pools/{name}/volumes/{type}" "Its volumes of a type"
        [RECURSION, FILTER, ALL_PROJECTS, PROJECT] Nothing => Listed(&VOLUME);
    "POST" "/1.0/storage-pools/{name}/volumes/{type}" "Makes a custom volume" [PROJECT, UPLOAD_NAME, UPLOAD_TYPE]
        Both(&[&STORAGE_VOLUMES_POST], &[BYTES]) => Created, Operation;
    "GET" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}" "A volume" [ALL_PROJECTS, PROJECT] Nothing =>
        Sync(Object(&VOLUME));
    "POST" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}" "Renames or moves it" [PROJECT]
        Json(&STORAGE_VOLUME_POST) => Created, Operation;
    "PUT" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}"
        "Replaces what may be changed of it, or restores a snapshot" [PROJECT, IF_MATCH]
        Json(&STORAGE_VOLUME_PUT) => Done;
    "PATCH" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}" "Changes it, or restores a snapshot"
        [PROJECT, IF_MATCH] Json(&STORAGE_VOLUME_PUT) => Done;
    "DELETE" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}" "Deletes it" [PROJECT] Nothing => Done;
    "GET" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups" "Its backups"
        [RECURSION, FILTER, PROJECT] Nothing => Listed(&VOLUME_BACKUP);
    "POST" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups" "Makes a backup" [PROJECT]
        Json(&BACKUPS_POST) => Operation;
    "GET" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups/{backupName}" "A backup" [PROJECT]
        Nothing => Sync(Object(&VOLUME_BACKUP));
    "POST" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups/{backupName}" "Renames it" [PROJECT]
        Json(&RENAME) => Operation;
    "DELETE" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups/{backupName}" "Deletes it" [PROJECT]
        Nothing => Operation;
    "GET" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups/{backupName}/export" "Its file" [PROJECT]
        Nothing => Content(BYTES);
    "GET" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files" "A file, or the names in a directory"
        [VOLUME_PATH, PROJECT] Nothing => Content(BYTES), Sync(Texts);
    "HEAD" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files" "What is known of a file, in headers"
        [VOLUME_PATH, PROJECT] Nothing => Head;
    "POST" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files"
        "Writes a file, or makes a directory or a link" [VOLUME_PATH, PROJECT, UID, GID, MODE, FILE_TYPE, WRITE]
        FILE => Done;
    "DELETE" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files" "Deletes a file" [VOLUME_PATH, PROJECT]
        Nothing => Done;
    "POST" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/rebuild" "It is empty then" [PROJECT]
        Json(&BLANK) => Operation;
    "GET" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/sftp" "Its files by SFTP" [PROJECT] Nothing =>
        Upgrade("sftp");
    "GET" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots" "Its snapshots"
        [RECURSION, FILTER, PROJECT] Nothing => Listed(&VOLUME_SNAPSHOT);
    "POST" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots" "Takes a snapshot" [PROJECT]
        Json(&SNAPSHOTS_POST) => Operation;
    "GET" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}" "A snapshot" [PROJECT]
        Nothing => Sync(Object(&VOLUME_SNAPSHOT));
    "POST" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}" "Renames it" [PROJECT]
        Json(&SNAPSHOT_POST) => Operation;
    "PUT" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}"
        "Replaces what may be changed of it" [PROJECT, IF_MATCH] Json(&SNAPSHOT_PUT) => Done;
    "PATCH" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}" "Changes it"
        [PROJECT, IF_MATCH] Json(&SNAPSHOT_PUT) => Done;
    "DELETE" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}" "Deletes it" [PROJECT]
        Nothing => Operation;
    "GET" "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/state" "Its state" [ALL_PROJECTS, PROJECT] Nothing =>
        Sync(Object(&VOLUME_STATE));
};

static KARST_ROWS: &[Described] = described! {
    "GET" "/1.0/karst/access" "Every role that somebody has" [OF_PROJECT] Nothing => Sync(List(&Object(&ROLE)));
    "POST" "/1.0/karst/access" "Gives a role" [] Json(&ACCESS_GRANT) => Done;
    "DELETE" "/1.0/karst/access" "Takes a role away, as it was given" [] Json(&ACCESS_GRANT) => Done;
    "GET" "/1.0/karst/access/why" "May somebody do something, and why" [PRINCIPAL, PERMISSION, OBJECT] Nothing =>
        Sync(Object(&WHY));
    "GET" "/1.0/karst/audit" "Records of the audit log" [FROM_NUMBER, RECORDS] Nothing =>
        Sync(List(&Object(&AUDIT_RECORD)));
    "GET" "/1.0/karst/audit/verify" "Is the audit log whole?" [] Nothing => Sync(List(&Object(&AUDIT_VERDICT)));
    "GET" "/1.0/karst/network/explain" "What becomes of the first packet of a connection" [FROM, TO, PORT, PROJECT]
        Nothing => Sync(Object(&EXPLANATION));
    "GET" "/1.0/karst/check" "What disagrees between the records and the hosts" [] Nothing => Sync(Object(&HEALTH));
    "GET" "/1.0/karst/host" "The nodes" [] Nothing => Sync(Object(&HOST));
    "GET" "/1.0/karst/instances/{name}" "What an instance is known by besides its name" [PROJECT] Nothing =>
        Sync(Object(&IDENTITY));
    "GET" "/1.0/karst/instances/{name}/history" "What it used" [SECONDS, PROJECT] Nothing => Sync(Object(&HISTORY));
    "GET" "/1.0/karst/instances/{name}/layers" "The layers of its disks" [PROJECT] Nothing =>
        Sync(List(&Object(&LAYERED_DISK)));
    "POST" "/1.0/karst/instances/{name}/layers" "Lets disks go on in new layers" [PROJECT]
        Json(&LAYERS_POST) => Operation;
    "POST" "/1.0/karst/instances/{name}/layers/commit" "Puts layers into what lies below them" [PROJECT]
        Json(&LAYERS_COMMIT) => Operation;
    "POST" "/1.0/karst/instances/{name}/layers/pull" "Puts what lies below the active layer into it" [PROJECT]
        Json(&LAYERS_PULL) => Operation;
    "GET" "/1.0/karst/instances/{name}/pending" "What waits for its next start" [PROJECT] Nothing =>
        Sync(List(&Object(&PENDING)));
    "POST" "/1.0/karst/instances/{name}/keys" "Presses keys" [PROJECT] Json(&KEYS_POST) => Done;
    "POST" "/1.0/karst/instances/{name}/reset" "Presses the reset button" [PROJECT] Json(&BLANK) => Done;
    "GET" "/1.0/karst/instances/{name}/screenshot" "What it shows" [PROJECT] Nothing => Content("image/png");
    "GET" "/1.0/karst/instances/{name}/vnc" "Its display" [PROJECT] Nothing => Sync(Object(&DISPLAY));
    "POST" "/1.0/karst/instances/{name}/vnc" "Opens its display on websockets" [PROJECT] Json(&BLANK) => Operation;
    "PUT" "/1.0/karst/instances/{name}/vnc" "Gives its display a password" [PROJECT] Json(&DISPLAY_PUT) => Done;
    "DELETE" "/1.0/karst/instances/{name}/vnc" "Takes the password away" [PROJECT] Nothing => Done;
    "GET" "/1.0/karst/libvirt" "Where clients of libvirt reach this server" [] Nothing => Sync(Object(&LIBVIRT));
    "POST" "/1.0/karst/libvirt/clients" "Makes a certificate for a client of libvirt" []
        Json(&LIBVIRT_CLIENTS_POST) => Sync(Object(&LIBVIRT_CLIENT));
    "GET" "/1.0/karst/networks/{name}" "Is a network there, and does it begin with its host?" [PROJECT] Nothing =>
        Sync(Object(&NETWORK_LIFE));
    "PUT" "/1.0/karst/networks/{name}" "Starts or stops a network" [PROJECT] Json(&NETWORK_LIFE_PUT) => Done;
    "GET" "/1.0/karst/openapi" "This document" [] Nothing => Sync(Map(&Any));
    "GET" "/1.0/karst/status" "This daemon, and whether its host answers now" [] Nothing => Sync(Object(&DAEMON));
    "GET" "/1.0/karst/storage-pools/{name}" "What Incus does not tell of a storage pool" [] Nothing =>
        Sync(Object(&POOL_LIFE));
    "PUT" "/1.0/karst/storage-pools/{name}" "Starts or stops a storage pool, and says whether it begins with its hosts" []
        Json(&POOL_LIFE_PUT) => Done;
    "GET" "/1.0/karst/top" "What running instances have used so far" [ALL_PROJECTS, INSTANCE_TYPE, PROJECT] Nothing =>
        Sync(List(&Object(&USED)));
    "GET" "/1.0/karst/registries" "Who a project is at registries" [PROJECT] Nothing =>
        Sync(List(&Object(&REGISTRY)));
    "PUT" "/1.0/karst/registries/{host}" "Says who a project is at a registry" [PROJECT] Json(&REGISTRY_PUT) => Done;
    "DELETE" "/1.0/karst/registries/{host}" "Forgets it" [PROJECT] Nothing => Done;
    "GET" "/1.0/karst/secrets" "Secrets of a project" [PROJECT] Nothing => Sync(List(&Object(&KEPT_SECRET)));
    "POST" "/1.0/karst/secrets" "Makes a secret" [PROJECT] Json(&SECRETS_POST) => Sync(Object(&KEPT_SECRET));
    "PUT" "/1.0/karst/secrets/{uuid}" "Sets its value" [PROJECT] Json(&SECRET_PUT) => Done;
    "DELETE" "/1.0/karst/secrets/{uuid}" "Deletes it" [PROJECT] Nothing => Done;
    "GET" "/1.0/karst/tokens" "API tokens" [] Nothing => Sync(List(&Object(&TOKEN)));
    "POST" "/1.0/karst/tokens" "Makes an API token" [] Json(&TOKENS_POST) => Sync(Object(&NEW_TOKEN));
    "DELETE" "/1.0/karst/tokens/{name}" "Deletes it" [] Nothing => Done;
    "POST" "/1.0/karst/images/build" "Builds an image of a recipe" [PROJECT] Json(&IMAGES_BUILD) => Operation;
};
