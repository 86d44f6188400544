//! Each path of the API by which something is changed has a command: run against a server that takes everything, it asks for
//! just that. And files on their way: what is asked for, and what is left when it breaks.
#![allow(clippy::disallowed_methods)] // tests live in the real world

mod common;

use std::{
    collections::BTreeSet,
    io,
    path::Path,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::State,
    http::{Method, Uri},
    response::{IntoResponse, Response},
};
use common::{PATIENCE, karst, signal, texts};
use futures::StreamExt;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::UnixListener};

/// The table of paths, as the front end writes it.
const TABLE: &str = include_str!("../../../docs/incus-api-table.md");

/// Paths that have no command, each with its reason. There are so many and never more: who gives one a command lowers the number.
const WITHOUT: &[(&str, &str)] = &[
    ("POST /1.0/images/{fingerprint}/secret", "asked for by clients that let another server fetch an image"),
    (
        "PUT /1.0/instances",
        "`start --all` and its like ask for each by itself, so that each failure has its name",
    ),
    (
        "POST /1.0/karst/instances/{name}/vnc",
        "the way of viewers, which speak VNC on the websocket that they get",
    ),
    ("POST /1.0/storage-pools/{name}/volumes", "the same as …/volumes/{type}, which is what is asked for"),
];
const MOST_WITHOUT: usize = 4;

/// A method and path as in the table, and a command line that asks for it. A PUT stands for the PATCH of the same path, and
/// the other way round.
const COMMANDS: &[(&str, &str)] = &[
    ("PUT /1.0", "config set core.https_address=:8443"),
    ("POST /1.0/certificates", "trust add laptop"),
    ("DELETE /1.0/certificates/{fingerprint}", "trust remove 0123"),
    ("PUT /1.0/certificates/{fingerprint}", "trust set 0123 name=laptop"),
    ("POST /1.0/images", "publish c1/s1 --alias mine"),
    ("POST /1.0/images/aliases", "image alias create new f6452920a30d"),
    ("DELETE /1.0/images/aliases/{name}", "image alias delete old"),
    ("POST /1.0/images/aliases/{name}", "image alias rename old new"),
    ("PUT /1.0/images/aliases/{name}", "image alias set old f6452920a30d"),
    ("DELETE /1.0/images/{fingerprint}", "image delete f6452920a30d"),
    ("PUT /1.0/images/{fingerprint}", "image edit f6452920a30d"),
    ("POST /1.0/images/{fingerprint}/export", "image push f6452920a30d https://other.example:8443"),
    ("POST /1.0/images/{fingerprint}/refresh", "image refresh debian/12"),
    ("POST /1.0/instances", "launch debian/12 c1"),
    ("DELETE /1.0/instances/{name}", "delete c1"),
    ("POST /1.0/instances/{name}", "move c1 --to-pool fast"),
    ("PUT /1.0/instances/{name}", "config set c1 user.a=b"),
    ("POST /1.0/instances/{name}/backups", "backup create c1 b1"),
    ("DELETE /1.0/instances/{name}/backups/{backup}", "backup delete c1 b1"),
    ("POST /1.0/instances/{name}/backups/{backup}", "backup rename c1 b1 b2"),
    ("DELETE /1.0/instances/{name}/console", "console c1 --clear-log"),
    ("POST /1.0/instances/{name}/console", "console c1"),
    ("POST /1.0/instances/{name}/exec", "exec c1 true"),
    ("DELETE /1.0/instances/{name}/files", "file delete c1/root/x"),
    ("POST /1.0/instances/{name}/files", "file push here c1/root/x"),
    ("DELETE /1.0/instances/{name}/logs/exec-output/{filename}", "log delete c1 exec-output/x.stdout"),
    ("DELETE /1.0/instances/{name}/logs/{filename}", "log delete c1 lxc.log"),
    ("PUT /1.0/instances/{name}/metadata", "config metadata edit c1"),
    ("DELETE /1.0/instances/{name}/metadata/templates", "config template delete c1 t.tpl"),
    ("POST /1.0/instances/{name}/metadata/templates", "config template edit c1 t.tpl"),
    ("POST /1.0/instances/{name}/rebuild", "rebuild debian/12 c1"),
    ("POST /1.0/instances/{name}/snapshots", "snapshot create c1 s1"),
    ("DELETE /1.0/instances/{name}/snapshots/{snapshot}", "snapshot delete c1 s1"),
    ("POST /1.0/instances/{name}/snapshots/{snapshot}", "snapshot rename c1 s1 s2"),
    ("PUT /1.0/instances/{name}/snapshots/{snapshot}", "snapshot set c1 s1 expires_at=7d"),
    ("PUT /1.0/instances/{name}/state", "start c1"),
    ("DELETE /1.0/karst/access", "access revoke robot viewer"),
    ("POST /1.0/karst/access", "access grant robot viewer"),
    ("POST /1.0/karst/images/build", "image build debian/12"),
    ("POST /1.0/karst/instances/{name}/keys", "send-key v1 ctrl-alt-delete"),
    ("POST /1.0/karst/instances/{name}/layers", "disk layer v1 root --snapshot before"),
    ("POST /1.0/karst/instances/{name}/layers/commit", "disk commit v1 root"),
    ("POST /1.0/karst/instances/{name}/layers/pull", "disk pull v1 root"),
    ("POST /1.0/karst/instances/{name}/reset", "reset v1"),
    ("DELETE /1.0/karst/instances/{name}/vnc", "display unset-password v1"),
    ("PUT /1.0/karst/instances/{name}/vnc", "display set-password v1"),
    ("POST /1.0/karst/libvirt/clients", "trust add-libvirt laptop pki"),
    ("PUT /1.0/karst/networks/{name}", "network start n1"),
    ("DELETE /1.0/karst/registries/{host}", "image registry remove docker.io"),
    ("PUT /1.0/karst/registries/{host}", "image registry add docker.io --user me"),
    ("POST /1.0/karst/secrets", "secret create --type volume --usage /a"),
    ("DELETE /1.0/karst/secrets/{uuid}", "secret delete 00000000-0000-0000-0000-000000000005"),
    ("PUT /1.0/karst/secrets/{uuid}", "secret set 00000000-0000-0000-0000-000000000005"),
    ("POST /1.0/karst/tokens", "token create robot --role viewer"),
    ("DELETE /1.0/karst/tokens/{name}", "token delete robot"),
    ("POST /1.0/network-acls", "network acl create web"),
    ("DELETE /1.0/network-acls/{name}", "network acl delete web"),
    ("POST /1.0/network-acls/{name}", "network acl rename web www"),
    ("PUT /1.0/network-acls/{name}", "network acl rule add web ingress action=allow"),
    ("POST /1.0/network-address-sets", "network address-set create a 192.0.2.1"),
    ("DELETE /1.0/network-address-sets/{name}", "network address-set delete a"),
    ("POST /1.0/network-address-sets/{name}", "network address-set rename a b"),
    ("PUT /1.0/network-address-sets/{name}", "network address-set add a 192.0.2.2"),
    ("POST /1.0/networks", "network create n1"),
    ("DELETE /1.0/networks/{name}", "network delete n1"),
    ("POST /1.0/networks/{name}", "network rename n1 n2"),
    ("PUT /1.0/networks/{name}", "network set n1 ipv4.nat=false"),
    ("POST /1.0/networks/{name}/forwards", "network forward create n1 192.0.2.1"),
    ("DELETE /1.0/networks/{name}/forwards/{listenAddress}", "network forward delete n1 192.0.2.1"),
    (
        "PUT /1.0/networks/{name}/forwards/{listenAddress}",
        "network forward add-port n1 192.0.2.1 tcp 80 10.0.0.2",
    ),
    ("DELETE /1.0/operations/{id}", "operation delete 0f3a"),
    ("POST /1.0/profiles", "profile create web"),
    ("DELETE /1.0/profiles/{name}", "profile delete web"),
    ("POST /1.0/profiles/{name}", "profile rename web www"),
    ("PUT /1.0/profiles/{name}", "profile set web user.a=b"),
    ("POST /1.0/projects", "project create acme"),
    ("DELETE /1.0/projects/{name}", "project delete acme"),
    ("POST /1.0/projects/{name}", "project rename acme emca"),
    ("PUT /1.0/projects/{name}", "project set acme limits.instances=3"),
    ("PUT /1.0/karst/storage-pools/{name}", "storage stop fast"),
    ("POST /1.0/storage-pools", "storage create fast dir"),
    ("DELETE /1.0/storage-pools/{name}", "storage delete fast"),
    ("PUT /1.0/storage-pools/{name}", "storage set fast user.a=b"),
    ("POST /1.0/storage-pools/{name}/volumes/{type}", "storage volume create fast data"),
    ("DELETE /1.0/storage-pools/{name}/volumes/{type}/{volumeName}", "storage volume delete fast data"),
    ("PUT /1.0/storage-pools/{name}/volumes/{type}/{volumeName}", "storage volume set fast data size=1GiB"),
    ("POST /1.0/storage-pools/{name}/volumes/{type}/{volumeName}", "storage volume rename fast data other"),
    (
        "POST /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/rebuild",
        "storage volume rebuild fast data",
    ),
    (
        "POST /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files",
        "storage volume file fast push here data/x",
    ),
    (
        "DELETE /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files",
        "storage volume file fast delete data/x",
    ),
    (
        "POST /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups",
        "storage volume backup create fast data b1",
    ),
    (
        "DELETE /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups/{backupName}",
        "storage volume backup delete fast data b1",
    ),
    (
        "POST /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups/{backupName}",
        "storage volume backup rename fast data b1 b2",
    ),
    (
        "POST /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots",
        "storage volume snapshot create fast data s1",
    ),
    (
        "DELETE /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}",
        "storage volume snapshot delete fast data s1",
    ),
    (
        "POST /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}",
        "storage volume snapshot rename fast data s1 s2",
    ),
    (
        "PUT /1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots/{snapshotName}",
        "storage volume snapshot set fast data s1 expires_at=never",
    ),
    ("DELETE /1.0/warnings/{uuid}", "warning delete 0f3a"),
    ("PATCH /1.0/warnings/{uuid}", "warning ack 0f3a"),
    ("POST /internal/recover/validate", "admin recover --yes --pool data=dir:/srv/data"),
    ("POST /internal/recover/import", "admin recover --yes --pool data=dir:/srv/data"),
    ("PUT /internal/shutdown", "host shutdown"),
];

/// What the server was asked, as `METHOD /path`.
type Seen = Arc<Mutex<Vec<String>>>;

/// A server that does everything at once and has everything.
struct Everything {
    directory: tempfile::TempDir,
    seen: Seen,
}

impl Everything {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let seen = Seen::default();
        let router = Router::new().fallback(answer).with_state(seen.clone());
        let listener = UnixListener::bind(directory.path().join("unix.socket")).unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { directory, seen }
    }

    /// Runs a command in this directory; what it asked the server meanwhile.
    async fn run(&self, arguments: &[&str], within: &Path, input: &[u8]) -> (Output, Vec<String>) {
        self.seen.lock().unwrap().clear();
        let mut command = karst(self.directory.path(), arguments);
        let mut child = command.current_dir(within).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // Many commands read nothing, and some are gone by then.
        let _ = stdin.write_all(input).await;
        drop(stdin);
        let ended = tokio::time::timeout(PATIENCE, child.wait_with_output());
        let output = ended.await.unwrap_or_else(|_| panic!("never ends: {arguments:?}")).unwrap();
        (output, self.seen.lock().unwrap().clone())
    }
}

async fn answer(State(seen): State<Seen>, method: Method, uri: Uri, body: Bytes) -> Response {
    seen.lock().unwrap().push(format!("{method} {}", uri.path()));
    let path = uri.path();
    if method == Method::GET && path.ends_with("/export") {
        if path.contains("/cut/") {
            let parts = [Ok(Bytes::from_static(b"half a")), Err(io::Error::other("the disk is gone"))];
            return Body::from_stream(futures::stream::iter(parts)).into_response();
        }
        if path.contains("/slow/") {
            let first = futures::stream::iter([Ok::<_, io::Error>(Bytes::from_static(b"half a"))]);
            return Body::from_stream(first.chain(futures::stream::pending())).into_response();
        }
        return "a whole backup".into_response();
    }
    if method == Method::POST && path.ends_with("/instances") && body.starts_with(b"backup") {
        let text = format!("{} bytes came", body.len());
        let refusal = json!({"type": "error", "error_code": 400, "error": text});
        return (axum::http::StatusCode::BAD_REQUEST, Json(refusal)).into_response();
    }
    if method == Method::GET && path == "/1.0/instances/c1/snapshots" && uri.query().is_none() {
        let paths = json!([format!("{path}/s1"), format!("{path}/s2"), format!("{path}/other")]);
        return Json(json!({"type": "sync", "status_code": 200, "metadata": paths})).into_response();
    }
    let listed = uri.query().is_some_and(|query| query.contains("recursion"));
    let metadata = if method == Method::GET && listed { json!([]) } else { anything() };
    Json(json!({"type": "sync", "status": "Success", "status_code": 200, "metadata": metadata}))
        .into_response()
}

/// It has what any object has.
fn anything() -> Value {
    json!({
        "name": "x", "description": "", "status": "Stopped", "config": {"user.x": "y"}, "devices": {},
        "profiles": ["default"], "target": "f6452920a30d", "fingerprint": "f6452920a30d", "ingress": [],
        "egress": [], "addresses": [], "ports": [], "restricted": false, "projects": [], "type": "client",
        "expires_at": "0001-01-01T00:00:00Z",
    })
}

/// Of `METHOD /path`; PUT and PATCH are the same.
fn key(row: &str) -> String {
    row.replacen("PATCH ", "PUT ", 1)
}

/// The rows of the table that are done and change something.
fn rows() -> BTreeSet<String> {
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, method, path, state, ..] = cells.as_slice() else { return None };
        let changes = ["POST", "PUT", "PATCH", "DELETE"].contains(method);
        (changes && state.starts_with("done")).then(|| key(&format!("{method} {}", path.trim_matches('`'))))
    };
    TABLE.lines().filter_map(row).collect()
}

/// Whether a request is of a row.
fn is_of(request: &str, row: &str) -> bool {
    let (asked, wanted): (Vec<&str>, Vec<&str>) = (request.split('/').collect(), row.split('/').collect());
    let fits = |(a, w): (&&str, &&str)| a == w || w.starts_with('{') && !a.is_empty();
    asked.len() == wanted.len() && asked.iter().zip(&wanted).all(fits)
}

#[test]
fn each_path_has_a_command_or_a_reason() {
    let rows = rows();
    assert!(rows.len() > 80, "the table is read: {rows:#?}");
    let with: BTreeSet<String> = COMMANDS.iter().map(|(row, _)| key(row)).collect();
    let without: BTreeSet<String> = WITHOUT.iter().map(|(row, _)| key(row)).collect();
    assert_eq!(with.len(), COMMANDS.len(), "a row twice");
    let missing: Vec<_> = rows.iter().filter(|row| !with.contains(*row) && !without.contains(*row)).collect();
    assert!(missing.is_empty(), "no command of karst, and no reason why: {missing:#?}");
    let both: Vec<_> = with.intersection(&without).collect();
    assert!(both.is_empty(), "a command, and a reason why there is none: {both:#?}");
    let gone: Vec<_> = with.union(&without).filter(|row| !rows.contains(*row)).collect();
    assert!(gone.is_empty(), "no such path: {gone:#?}");
    assert_eq!(WITHOUT.len(), MOST_WITHOUT, "the list only shrinks, and its number with it");
    assert!(WITHOUT.iter().all(|(_, reason)| !reason.is_empty()));
}

#[tokio::test]
async fn each_command_asks_for_its_path() {
    let server = Everything::start().await;
    let work = tempfile::tempdir().unwrap();
    std::fs::write(work.path().join("here"), "a file").unwrap();
    let mut wrong = vec![];
    for (row, line) in COMMANDS {
        let arguments: Vec<&str> = line.split_whitespace().collect();
        // YAML for what is edited, a line for what wants a password.
        let (output, seen) = server.run(&arguments, work.path(), b"name: x\n").await;
        if !seen.iter().any(|request| is_of(&key(request), &key(row))) {
            wrong.push(format!("karst {line}: not {row} but {seen:?}; {}", texts(&output).1));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn an_export_is_made_fetched_and_deleted() {
    let server = Everything::start().await;
    let work = tempfile::tempdir().unwrap();
    let (output, seen) = server.run(&["export", "c1", "--compression", "zstd"], work.path(), b"").await;
    let (out, err, code) = texts(&output);
    assert_eq!((out.as_str(), err.as_str(), code), ("c1.tar.zst\n", "", 0));
    assert_eq!(std::fs::read(work.path().join("c1.tar.zst")).unwrap(), b"a whole backup");
    let [made, fetched, deleted] = seen.as_slice() else { panic!("{seen:?}") };
    assert_eq!(made, "POST /1.0/instances/c1/backups");
    assert!(is_of(fetched, "GET /1.0/instances/{name}/backups/{backup}/export"), "{fetched}");
    assert_eq!(*deleted, fetched.replacen("GET", "DELETE", 1).trim_end_matches("/export"));
    // The same to standard output.
    let (output, _) = server.run(&["storage", "volume", "export", "p", "v", "-"], work.path(), b"").await;
    let (out, err, code) = texts(&output);
    assert_eq!((out.as_str(), err.as_str(), code), ("a whole backup", "", 0));
}

#[tokio::test]
async fn an_export_that_breaks_leaves_nothing() {
    let server = Everything::start().await;
    let work = tempfile::tempdir().unwrap();
    let (output, seen) = server.run(&["export", "cut"], work.path(), b"").await;
    let (out, err, code) = texts(&output);
    assert_eq!((out.as_str(), code), ("", 1), "{err}");
    assert!(err.starts_with("karst: ") && err.lines().count() == 1, "{err}");
    assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 0, "no file, not even a part");
    assert!(seen.last().is_some_and(|request| request.starts_with("DELETE ")), "{seen:?}");
    // What cannot be written is known before the server works.
    let (output, seen) = server.run(&["export", "c1", "no/such/file"], work.path(), b"").await;
    let (_, err, code) = texts(&output);
    assert_eq!((code, seen.len()), (1, 0), "{err} {seen:?}");
    assert!(err.contains("no such file or directory"), "{err}");
}

#[tokio::test]
async fn ctrl_c_gives_an_export_up() {
    let server = Everything::start().await;
    let work = tempfile::tempdir().unwrap();
    let mut command = karst(server.directory.path(), &["export", "slow"]);
    let child = command.current_dir(work.path()).spawn().unwrap();
    let fetched = || server.seen.lock().unwrap().iter().any(|request| request.ends_with("/export"));
    let wait = async {
        while !fetched() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("the file is asked for");
    signal(&child, Signal::INT);
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.expect("it ends").unwrap();
    let (_, err, code) = texts(&output);
    assert_eq!((err.as_str(), code), ("karst: interrupted\n", 130));
    assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 0, "no file, not even a part");
    let last = server.seen.lock().unwrap().last().cloned().unwrap_or_default();
    assert!(last.starts_with("DELETE /1.0/instances/slow/backups/"), "{last}");
}

#[tokio::test]
async fn imports_are_streamed_from_files_and_stdin() {
    let server = Everything::start().await;
    let work = tempfile::tempdir().unwrap();
    let backup = [b"backup".as_slice(), &[7; 1_000_000]].concat();
    std::fs::write(work.path().join("c1.tar.gz"), &backup).unwrap();
    for (arguments, input) in
        [(["import", "c1.tar.gz", "c2"], b"".as_slice()), (["import", "-", "c2"], backup.as_slice())]
    {
        let (output, seen) = server.run(&arguments, work.path(), input).await;
        let (_, err, code) = texts(&output);
        assert_eq!((err.as_str(), code), ("karst: 1000006 bytes came\n", 1), "{arguments:?}");
        assert_eq!(seen, ["POST /1.0/instances"]);
    }
    let (output, seen) = server.run(&["import", "missing.tar.gz"], work.path(), b"").await;
    let (_, err, code) = texts(&output);
    assert_eq!((err.as_str(), code), ("karst: missing.tar.gz: no such file or directory\n", 1));
    assert!(seen.is_empty(), "{seen:?}");
}

#[tokio::test]
async fn names_are_completed_below_what_stands_before() {
    let server = Everything::start().await;
    let line = ["--", "karst", "snapshot", "restore", "c1", "s"];
    let mut command = karst(server.directory.path(), &line);
    command.env("COMPLETE", "bash").env("_CLAP_COMPLETE_INDEX", "4").env("_CLAP_COMPLETE_COMP_TYPE", "9");
    let (out, err, _) = texts(&command.output().await.unwrap());
    let mut names: Vec<&str> = out.split_whitespace().filter(|word| !word.starts_with('-')).collect();
    names.sort_unstable();
    assert_eq!(names, ["s1", "s2"], "{err}");
}
