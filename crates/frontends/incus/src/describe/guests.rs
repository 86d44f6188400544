//! The rows of instances and images, as [`super::rows`].

use super::{
    Answer::{Content, Created, Done, Head, Listed, Operation, Sync, Upgrade},
    Body::{self, Blank, Both, Json, Nothing},
    Described,
    Kind::{List, Object, Texts},
    answers::*,
    parameters::*,
    requests::*,
    rows::described,
};

/// Content of any kind.
pub(super) const BYTES: &str = "application/octet-stream";
/// A file.
pub(super) const FILE: Body = Body::Content(&[BYTES]);

pub(super) static INSTANCE_ROWS: &[Described] = described! {
    "GET" "/1.0/instances" "Instances"
        [STATE_RECURSION, FILTER, LIMIT, AFTER, ALL_PROJECTS, INSTANCE_TYPE, PROJECT] Nothing => Listed(&INSTANCE);
    "POST" "/1.0/instances" "Makes an instance, or imports a backup of one"
        [TARGET, NEW_TYPE, PROJECT, UPLOAD_NAME, UPLOAD_POOL, UPLOAD_CONFIG, UPLOAD_DEVICES]
        Both(&[&INSTANCES_POST], &[BYTES]) => Operation;
    "PUT" "/1.0/instances" "Changes the power of all of a project" [PROJECT] Json(&INSTANCES_PUT) => Operation;
    "GET" "/1.0/instances/{name}" "An instance" [PROJECT, STATE_TOO] Nothing => Sync(Object(&INSTANCE));
    "POST" "/1.0/instances/{name}" "Renames or moves it" [PROJECT] Json(&INSTANCE_POST) => Operation;
    "PUT" "/1.0/instances/{name}" "Replaces what may be changed of it, or restores a snapshot" [PROJECT, IF_MATCH]
        Json(&INSTANCE_PUT) => Operation;
    "PATCH" "/1.0/instances/{name}" "Changes it" [PROJECT, IF_MATCH] Json(&INSTANCE_PATCH) => Done;
    "DELETE" "/1.0/instances/{name}" "Deletes it" [PROJECT] Nothing => Operation;
    "GET" "/1.0/instances/{name}/access" "Who has a role in its project" [PROJECT] Nothing =>
        Sync(List(&Object(&ACCESS)));
    "GET" "/1.0/instances/{name}/backups" "Its backups" [RECURSION, FILTER, PROJECT] Nothing =>
        Listed(&INSTANCE_BACKUP);
    "POST" "/1.0/instances/{name}/backups" "Makes a backup" [PROJECT] Json(&BACKUPS_POST) => Operation;
    "GET" "/1.0/instances/{name}/backups/{backup}" "A backup" [PROJECT] Nothing => Sync(Object(&INSTANCE_BACKUP));
    "POST" "/1.0/instances/{name}/backups/{backup}" "Renames it" [PROJECT] Json(&RENAME) => Operation;
    "DELETE" "/1.0/instances/{name}/backups/{backup}" "Deletes it" [PROJECT] Nothing => Operation;
    "GET" "/1.0/instances/{name}/backups/{backup}/export" "Its file" [PROJECT] Nothing => Content(BYTES);
    "GET" "/1.0/instances/{name}/console" "What its console said, or what its screen shows" [CONSOLE_TYPE, PROJECT]
        Nothing => Content(BYTES), Content("image/png");
    "POST" "/1.0/instances/{name}/console" "Opens its console, its screen or one of its ports on websockets" [PROJECT]
        Json(&CONSOLE_POST) => Operation;
    "DELETE" "/1.0/instances/{name}/console" "Empties the console's log" [PROJECT] Nothing => Done;
    "GET" "/1.0/instances/{name}/debug/memory" "What is in its memory" [DUMP_FORMAT, PROJECT] Nothing =>
        Content(BYTES);
    "POST" "/1.0/instances/{name}/exec" "Runs a program in it" [PROJECT] Json(&EXEC_POST) => Operation;
    "GET" "/1.0/instances/{name}/files" "A file, or the names in a directory" [PATH, PROJECT] Nothing =>
        Content(BYTES), Sync(Texts);
    "HEAD" "/1.0/instances/{name}/files" "What is known of a file, in headers" [PATH, PROJECT] Nothing => Head;
    "POST" "/1.0/instances/{name}/files" "Writes a file, or makes a directory or a link"
        [PATH, PROJECT, UID, GID, MODE, FILE_TYPE, WRITE] FILE => Done;
    "DELETE" "/1.0/instances/{name}/files" "Deletes a file" [PATH, PROJECT] Nothing => Done;
    "GET" "/1.0/instances/{name}/logs" "Its logs" [PROJECT] Nothing => Sync(Texts);
    "GET" "/1.0/instances/{name}/logs/exec-output" "What programs printed that had it kept" [PROJECT] Nothing =>
        Sync(Texts);
    "GET" "/1.0/instances/{name}/logs/exec-output/{filename}" "What one of them printed" [PROJECT] Nothing =>
        Content(BYTES);
    "DELETE" "/1.0/instances/{name}/logs/exec-output/{filename}" "Deletes it" [PROJECT] Nothing => Done;
    "GET" "/1.0/instances/{name}/logs/{filename}" "A log" [PROJECT] Nothing => Content("text/plain");
    "DELETE" "/1.0/instances/{name}/logs/{filename}" "Empties it" [PROJECT] Nothing => Done;
    "GET" "/1.0/instances/{name}/metadata" "What is kept of its image's metadata" [PROJECT] Nothing =>
        Sync(Object(&METADATA));
    "PUT" "/1.0/instances/{name}/metadata" "Replaces it" [PROJECT, IF_MATCH] Json(&METADATA_PUT) => Done;
    "PATCH" "/1.0/instances/{name}/metadata" "Changes it" [PROJECT, IF_MATCH] Json(&METADATA_PUT) => Done;
    "GET" "/1.0/instances/{name}/metadata/templates" "Names of its templates, or one of them"
        [TEMPLATE_TOO, PROJECT] Nothing => Sync(Texts), Content(BYTES);
    "POST" "/1.0/instances/{name}/metadata/templates" "Writes a template" [TEMPLATE, PROJECT] FILE => Done;
    "DELETE" "/1.0/instances/{name}/metadata/templates" "Deletes a template" [TEMPLATE, PROJECT] Nothing => Done;
    "POST" "/1.0/instances/{name}/rebuild" "Its root disk begins again" [PROJECT]
        Json(&INSTANCE_REBUILD_POST) => Operation;
    "GET" "/1.0/instances/{name}/sftp" "Its files by SFTP" [PROJECT] Nothing => Upgrade("sftp");
    "GET" "/1.0/instances/{name}/snapshots" "Its snapshots" [RECURSION, FILTER, PROJECT] Nothing =>
        Listed(&INSTANCE_SNAPSHOT);
    "POST" "/1.0/instances/{name}/snapshots" "Takes a snapshot" [PROJECT] Json(&SNAPSHOTS_POST) => Operation;
    "GET" "/1.0/instances/{name}/snapshots/{snapshot}" "A snapshot" [PROJECT] Nothing =>
        Sync(Object(&INSTANCE_SNAPSHOT));
    "POST" "/1.0/instances/{name}/snapshots/{snapshot}" "Renames it" [PROJECT] Json(&SNAPSHOT_POST) => Operation;
    "PUT" "/1.0/instances/{name}/snapshots/{snapshot}" "Replaces what may be changed of it" [PROJECT, IF_MATCH]
        Json(&SNAPSHOT_PUT) => Operation;
    "PATCH" "/1.0/instances/{name}/snapshots/{snapshot}" "Changes it" [PROJECT, IF_MATCH]
        Json(&SNAPSHOT_PUT) => Operation;
    "DELETE" "/1.0/instances/{name}/snapshots/{snapshot}" "Deletes it" [PROJECT] Nothing => Operation;
    "GET" "/1.0/instances/{name}/state" "Its state" [PROJECT] Nothing => Sync(Object(&INSTANCE_STATE));
    "PUT" "/1.0/instances/{name}/state" "Changes its power" [PROJECT] Json(&INSTANCE_STATE_PUT) => Operation;
};

pub(super) static IMAGE_ROWS: &[Described] = described! {
    "GET" "/1.0/images" "Images" [RECURSION, FILTER, ALL_PROJECTS, PROJECT] Nothing => Listed(&IMAGE);
    "POST" "/1.0/images"
        "Makes an image of an instance, fetches one from a server, awaits one that is pushed, or takes an upload"
        [PROJECT, IMAGE_FINGERPRINT, IMAGE_FILENAME, IMAGE_PUBLIC, IMAGE_PROPERTIES, IMAGE_ALIASES, IMAGE_PROFILES,
        IMAGE_SECRET, DISK_FORMAT]
        Both(&[&IMAGES_POST], &[BYTES, "multipart/form-data"]) => Operation;
    "GET" "/1.0/images/aliases" "Aliases" [RECURSION, FILTER, PROJECT] Nothing => Listed(&IMAGE_ALIAS);
    "POST" "/1.0/images/aliases" "Makes an alias" [PROJECT] Json(&IMAGE_ALIASES_POST) => Created;
    "GET" "/1.0/images/aliases/{name}" "An alias" [ALIAS_TYPE, PROJECT] Nothing => Sync(Object(&IMAGE_ALIAS));
    "POST" "/1.0/images/aliases/{name}" "Renames it" [PROJECT] Json(&RENAME) => Created;
    "PUT" "/1.0/images/aliases/{name}" "Replaces what may be changed of it" [ALIAS_TYPE, PROJECT, IF_MATCH]
        Json(&IMAGE_ALIAS_PUT) => Done;
    "PATCH" "/1.0/images/aliases/{name}" "Changes it" [ALIAS_TYPE, PROJECT, IF_MATCH]
        Json(&IMAGE_ALIAS_PUT) => Done;
    "DELETE" "/1.0/images/aliases/{name}" "Deletes it" [PROJECT] Nothing => Done;
    "GET" "/1.0/images/{fingerprint}" "An image" [SECRET, PROJECT] Nothing => Sync(Object(&IMAGE));
    "PUT" "/1.0/images/{fingerprint}" "Replaces what may be changed of it" [PROJECT, IF_MATCH]
        Json(&IMAGE_PUT) => Done;
    "PATCH" "/1.0/images/{fingerprint}" "Changes it" [PROJECT, IF_MATCH] Json(&IMAGE_PUT) => Done;
    "DELETE" "/1.0/images/{fingerprint}" "Deletes it" [PROJECT] Nothing => Operation;
    "GET" "/1.0/images/{fingerprint}/export" "Its files" [SECRET, PROJECT] Nothing =>
        Content(BYTES), Content("multipart/form-data");
    "POST" "/1.0/images/{fingerprint}/export" "Pushes it to another server, which awaits it" [PROJECT]
        Json(&IMAGE_EXPORT_POST) => Operation;
    "POST" "/1.0/images/{fingerprint}/refresh" "Fetches it again where there is a newer one" [PROJECT] Blank =>
        Operation;
    "POST" "/1.0/images/{fingerprint}/secret" "Makes a secret that shows it once" [PROJECT] Blank => Operation;
};
