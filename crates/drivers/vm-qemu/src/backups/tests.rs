//! What is made of jobs, and of a QEMU that breaks off while a backup begins: all of it, or nothing.

use super::*;
use crate::machine::without_owner;
use karst_guest::{BackedUpDisk, MarkedDisk};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Mutex, MutexGuard},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixListener,
};

const SLOT: &str = "scsi0";

fn running(served: bool) -> Running {
    let disk = |slot: &str| RunningDisk {
        name: format!("disk-{slot}"),
        slot: slot.into(),
        side: Side::Second,
        bitmap: None,
    };
    Running { id: id(), disks: vec![disk("scsi0"), disk("scsi1")], served, begun: true }
}

fn id() -> DiskBackupId {
    DiskBackupId(uuid::Uuid::from_u128(7))
}

#[test]
fn jobs_together_are_one_backup() {
    let job = |slot: &str, status: &str, error: Option<&str>| {
        let mut job = json!({
            "id": job_id(slot), "type": "backup", "status": status, "current-progress": 4, "total-progress": 10,
        });
        if let Some(error) = error {
            job["error"] = error.into();
        }
        job
    };
    let of = |served, a: (&str, Option<&str>), b: (&str, Option<&str>)| {
        state_of(&running(served), &json!([job("scsi0", a.0, a.1), job("scsi1", b.0, b.1)]))
    };
    let state = of(false, ("running", None), ("concluded", None));
    assert_eq!((state.phase, state.done, state.total), (DiskBackupPhase::Running, 8, 20));
    assert_eq!(of(false, ("concluded", None), ("concluded", None)).phase, DiskBackupPhase::Done);
    assert_eq!(of(true, ("running", None), ("running", None)).phase, DiskBackupPhase::Running);
    let failed = |state: DiskBackupState| match state.phase {
        DiskBackupPhase::Failed { reason } => reason,
        other => panic!("{other:?}"),
    };
    let full = of(false, ("running", None), ("concluded", Some("No space left on device")));
    assert!(failed(full).contains("no space left where disk \"disk-scsi1\""));
    assert!(failed(of(true, ("running", None), ("concluded", None))).contains("disk-scsi1"));
    assert!(failed(state_of(&running(false), &json!([]))).contains("disk-scsi0"));
}

/// What a QEMU has, of one disk.
#[derive(Default)]
struct Qemu {
    nodes: BTreeSet<String>,
    sets: BTreeSet<u64>,
    /// Bitmaps of the disk's node, and whether they record.
    bitmaps: BTreeMap<String, bool>,
    jobs: BTreeMap<String, &'static str>,
    serves: bool,
    exports: Vec<Value>,
    said: Vec<String>,
    /// What was done in transactions.
    acted: Vec<String>,
    /// What it does, and closes the connection instead of an answer.
    silent_at: Option<&'static str>,
    /// What it refuses.
    refuses: Option<&'static str>,
}

impl Qemu {
    fn act(&mut self, kind: &str, data: &Value) {
        let text = |key: &str| data[key].as_str().unwrap_or_default().to_owned();
        match kind {
            "block-dirty-bitmap-add" => {
                let disabled = data["disabled"].as_bool().unwrap_or(false);
                assert_eq!(self.bitmaps.insert(text("name"), !disabled), None, "{data}");
            }
            "block-dirty-bitmap-remove" => assert!(self.bitmaps.remove(&text("name")).is_some(), "{data}"),
            "block-dirty-bitmap-enable" => drop(self.bitmaps.insert(text("name"), true)),
            "block-dirty-bitmap-disable" => drop(self.bitmaps.insert(text("name"), false)),
            "block-dirty-bitmap-merge" => {
                let all = data["bitmaps"].as_array().unwrap().iter().map(|b| b.as_str().unwrap().to_owned());
                let all: Vec<_> = all.chain([text("target")]).collect();
                assert!(all.iter().all(|b| self.bitmaps.contains_key(b)), "{data}");
            }
            "blockdev-backup" => {
                assert!(self.nodes.contains(&text("target")), "{data}");
                self.jobs.insert(text("job-id"), "running");
            }
            other => panic!("{other} in a transaction"),
        }
    }

    fn run(&mut self, command: &str, arguments: &Value) -> std::result::Result<Value, &'static str> {
        let text = |key: &str| arguments[key].as_str().unwrap_or_default().to_owned();
        if self.refuses == Some(command) {
            return Err("it will not");
        }
        match command {
            "query-block" => return Ok(json!([{"inserted": {"node-name": "d-scsi0"}}])),
            "query-jobs" => {
                let told = |(id, status): (&String, &&str)| json!({"id": id, "status": status});
                return Ok(self.jobs.iter().map(told).collect());
            }
            "query-named-block-nodes" => {
                let node = |name: &String| {
                    let mut node = json!({"node-name": name, "image": {"virtual-size": 1 << 20}});
                    if name == "i-scsi0" {
                        let told = self.bitmaps.iter().map(|(n, r)| json!({"name": n, "recording": r}));
                        node["dirty-bitmaps"] = told.collect();
                    }
                    node
                };
                return Ok(self.nodes.iter().map(node).collect());
            }
            "qom-list" => return Ok(json!([])),
            "query-fdsets" => return Ok(self.sets.iter().map(|n| json!({"fdset-id": n})).collect()),
            "add-fd" => drop(self.sets.insert(arguments["fdset-id"].as_u64().unwrap())),
            "remove-fd" => drop(self.sets.remove(&arguments["fdset-id"].as_u64().unwrap())),
            "blockdev-add" => drop(self.nodes.insert(text("node-name"))),
            "blockdev-del" if self.jobs.values().any(|s| *s == "running") => return Err("Node is in use"),
            "blockdev-del" => drop(self.nodes.remove(&text("node-name"))),
            "blockdev-create" => drop(self.jobs.insert(text("job-id"), "concluded")),
            "job-cancel" => drop(self.jobs.insert(text("id"), "concluded")),
            "job-dismiss" => drop(self.jobs.remove(&text("id"))),
            "nbd-server-start" => self.serves = true,
            "nbd-server-stop" if !self.serves => return Err("NBD server not running"),
            "nbd-server-stop" => {
                self.serves = false;
                self.exports.clear();
            }
            "block-export-add" => self.exports.push(arguments.clone()),
            "block-dirty-bitmap-remove" => self.act(command, arguments),
            "transaction" => {
                for action in arguments["actions"].as_array().unwrap() {
                    let kind = action["type"].as_str().unwrap();
                    self.acted.push(kind.to_owned());
                    self.act(kind, &action["data"]);
                }
            }
            _ => {}
        }
        Ok(json!({}))
    }

    /// Nothing: it closes the connection.
    fn answer(&mut self, line: &str) -> Option<String> {
        let asked: Value = serde_json::from_str(line).unwrap();
        let command = asked["execute"].as_str().unwrap();
        self.said.push(command.to_owned());
        let silent = self.silent_at.take_if(|at| *at == command).is_some();
        let mut answer = match self.run(command, &asked["arguments"]) {
            Ok(value) => json!({"return": value}),
            Err(text) => json!({"error": {"class": "GenericError", "desc": text}}),
        };
        answer["id"] = asked["id"].clone();
        (!silent).then(|| format!("{answer}\n"))
    }
}

struct Place {
    dir: tempfile::TempDir,
    machine: Arc<Machine>,
    qemu: Arc<Mutex<Qemu>>,
    // Its owner is whoever has this.
    _owner: Box<dyn std::any::Any>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let qemu = Arc::new(Mutex::new(Qemu::default()));
        qemu.lock().unwrap().nodes.extend(["i-scsi0".to_owned(), "d-scsi0".to_owned()]);
        let listener = UnixListener::bind(dir.path().join(launch::QMP)).unwrap();
        tokio::spawn(Self::serve(listener, qemu.clone()));
        let (machine, owner) = without_owner(dir.path().to_owned());
        for name in ["disk", "to"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        machine.record().devices = Some(crate::record::Devices {
            machine: "q35".into(),
            ports: 8,
            display: false,
            disks: vec![disk(&dir.path().join("disk"))],
            nics: vec![],
        });
        Self { dir, machine: Arc::new(machine), qemu, _owner: Box::new(owner) }
    }

    async fn serve(listener: UnixListener, qemu: Arc<Mutex<Qemu>>) {
        while let Ok((stream, _)) = listener.accept().await {
            let (read, mut write) = stream.into_split();
            let mut lines = BufReader::new(read).lines();
            let mut answer = Some("{\"QMP\": {}}\n".to_owned());
            while let Some(text) = answer {
                if write.write_all(text.as_bytes()).await.is_err() {
                    break;
                }
                let Ok(Some(line)) = lines.next_line().await else { break };
                answer = qemu.lock().unwrap().answer(&line);
            }
        }
    }

    fn qemu(&self) -> MutexGuard<'_, Qemu> {
        self.qemu.lock().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A backup with a checkpoint, of what changed since the first one.
    fn backup(&self, server: Option<BackupServer>) -> DiskBackup {
        DiskBackup {
            id: id(),
            disks: vec![BackedUpDisk {
                path: self.path("disk"),
                since: vec![checkpoint(1)],
                to: self.path("to"),
                export: "vda".into(),
                bitmap: "backup-vda".into(),
            }],
            checkpoint: Some(NewCheckpoint {
                id: checkpoint(2),
                disks: vec![MarkedDisk { path: self.path("disk"), before: Some(checkpoint(1)) }],
            }),
            known: vec![checkpoint(1)],
            server,
        }
    }

    /// The first checkpoint follows the disk, and there is one that nobody knows.
    fn marked(&self) {
        let bitmaps = [(bitmaps::name(checkpoint(1)), true), (bitmaps::name(checkpoint(9)), true)];
        self.qemu().bitmaps.extend(bitmaps);
    }

    async fn phase(&self) -> DiskBackupPhase {
        state(self.dir.path(), Some(&self.machine), id()).await.unwrap().phase
    }

    async fn end(&self) {
        end(self.dir.path(), Some(&self.machine), id()).await.unwrap();
    }

    /// Nothing of a backup is left, and these bitmaps are what there is.
    fn demand_clean(&self, bitmaps: &[(u128, bool)]) {
        let qemu = self.qemu();
        let expected: BTreeMap<_, _> =
            bitmaps.iter().map(|(n, recording)| (bitmaps::name(checkpoint(*n)), *recording)).collect();
        assert_eq!(qemu.bitmaps, expected, "{:?}", qemu.said);
        assert_eq!((qemu.nodes.len(), qemu.jobs.len(), qemu.sets.len()), (2, 0, 0), "{:?}", qemu.said);
        assert!(!qemu.serves && qemu.exports.is_empty());
        assert!(!self.path(FILE).exists() && !self.path(launch::BACKUP).exists());
    }
}

fn checkpoint(n: u128) -> CheckpointId {
    CheckpointId(uuid::Uuid::from_u128(n))
}

fn disk(path: &Path) -> ResolvedDisk {
    karst_guest::samples::disk("root", SLOT, path, DiskFormat::Qcow2)
}

#[tokio::test]
async fn a_backup_is_written_and_its_checkpoint_stays() {
    let place = Place::new();
    place.marked();
    begin(&place.machine, &place.backup(None)).await.unwrap();
    begin(&place.machine, &place.backup(None)).await.expect("twice is once");
    assert_eq!(place.phase().await, DiskBackupPhase::Running);
    assert!(demand_none(&place.machine).await.unwrap_err().is(ErrorKind::Conflict));
    let other = DiskBackup { id: DiskBackupId(uuid::Uuid::from_u128(8)), ..place.backup(None) };
    assert!(begin(&place.machine, &other).await.unwrap_err().is(ErrorKind::Conflict));
    {
        let qemu = place.qemu();
        assert!(!qemu.serves && qemu.nodes.contains("d-scsi0.2"));
        assert!(!qemu.bitmaps.contains_key(&bitmaps::name(checkpoint(9))), "nobody knows it");
        assert_eq!(qemu.bitmaps.get("backup-scsi0"), Some(&false));
        // What the guest writes meanwhile is in the new checkpoint at least.
        let at = |kind: &str| qemu.acted.iter().position(|a| a.ends_with(kind)).unwrap();
        assert!(at("-disable") < at("-merge") && at("-merge") < at("blockdev-backup"), "{:?}", qemu.acted);
    }
    place.qemu().jobs.insert(job_id(SLOT), "concluded");
    assert_eq!(place.phase().await, DiskBackupPhase::Done);
    place.end().await;
    place.end().await;
    place.demand_clean(&[(1, false), (2, true)]);
    assert_eq!(place.phase().await, DiskBackupPhase::Gone);
}

#[tokio::test]
async fn a_backup_that_others_read_is_there_until_its_end() {
    let place = Place::new();
    place.marked();
    begin(&place.machine, &place.backup(Some(BackupServer::Unix))).await.unwrap();
    let now = state(place.dir.path(), Some(&place.machine), id()).await.unwrap();
    assert_eq!(now.phase, DiskBackupPhase::Running);
    assert_eq!(now.socket, Some(place.path(launch::BACKUP).display().to_string()));
    {
        let qemu = place.qemu();
        assert!(qemu.serves && qemu.nodes.contains("i-scsi0.2"));
        let export = &qemu.exports[0];
        assert_eq!((export["name"].as_str(), export["writable"].as_bool()), (Some("vda"), Some(false)));
        assert_eq!(export["bitmaps"], json!(["backup-vda"]));
        assert_eq!(export["node-name"], "i-scsi0.2");
    }
    place.end().await;
    place.demand_clean(&[(1, false), (2, true)]);
}

#[tokio::test]
async fn a_begin_that_breaks_off_leaves_nothing_or_goes_on() {
    // Before the moment, at it without an answer, and after it.
    for at in ["object-add", "blockdev-add", "transaction"] {
        let place = Place::new();
        place.marked();
        if at == "transaction" {
            // There is nothing to be swept: it is the moment itself.
            place.qemu().bitmaps.remove(&bitmaps::name(checkpoint(9)));
        }
        place.qemu().silent_at = Some(at);
        begin(&place.machine, &place.backup(None)).await.unwrap_err();
        place.demand_clean(&[(1, true)]);
        assert_eq!(place.phase().await, DiskBackupPhase::Gone, "{at}");
    }
    for at in ["nbd-server-start", "block-export-add"] {
        let place = Place::new();
        place.marked();
        place.qemu().refuses = Some(at);
        let server = Some(BackupServer::Unix);
        begin(&place.machine, &place.backup(server)).await.unwrap_err();
        place.demand_clean(&[(1, true)]);
    }
    // The host's process ended just after the moment: who asks again finds its jobs.
    let place = Place::new();
    place.marked();
    begin(&place.machine, &place.backup(None)).await.unwrap();
    let mut now = read(place.dir.path()).unwrap().unwrap();
    now.begun = false;
    note(place.dir.path(), &now).await.unwrap();
    assert_eq!(place.phase().await, DiskBackupPhase::Running);
    begin(&place.machine, &place.backup(None)).await.unwrap();
    assert!(read(place.dir.path()).unwrap().unwrap().begun);
    assert_eq!(place.qemu().said.iter().filter(|s| *s == "transaction").count(), 2, "a sweep and a begin");
    place.end().await;
    place.demand_clean(&[(1, false), (2, true)]);
    // The same of one that nobody can read in the end.
    let place = Place::new();
    place.marked();
    let read_by = || place.backup(Some(BackupServer::Unix));
    begin(&place.machine, &read_by()).await.unwrap();
    let mut now = read(place.dir.path()).unwrap().unwrap();
    now.begun = false;
    note(place.dir.path(), &now).await.unwrap();
    place.qemu().refuses = Some("block-export-add");
    begin(&place.machine, &read_by()).await.unwrap_err();
    place.demand_clean(&[(1, true)]);
}

#[tokio::test]
async fn what_cannot_be_backed_up_is_named_and_nothing_is_made() {
    let place = Place::new();
    // The checkpoint that it is to be since is not there.
    let e = begin(&place.machine, &place.backup(None)).await.unwrap_err();
    assert!(e.is(ErrorKind::Conflict) && e.field.as_deref() == Some("devices.root"), "{e:?}");
    place.demand_clean(&[]);
    // A raw disk keeps no checkpoint.
    if let Some(devices) = &mut place.machine.record().devices {
        devices.disks[0].format = DiskFormat::Raw;
    }
    let mut whole = place.backup(None);
    whole.disks[0].since.clear();
    let e = begin(&place.machine, &whole).await.unwrap_err();
    assert!(e.is(ErrorKind::Unsupported) && e.message.contains("\"root\" is raw"), "{e}");
    place.demand_clean(&[]);
    whole.checkpoint = None;
    begin(&place.machine, &whole).await.unwrap();
    place.end().await;
    place.demand_clean(&[]);
    let nowhere = DiskBackup {
        disks: vec![BackedUpDisk { path: "/nonexistent".into(), ..whole.disks[0].clone() }],
        ..whole
    };
    assert!(begin(&place.machine, &nowhere).await.unwrap_err().is(ErrorKind::NotFound));
}

#[tokio::test]
async fn of_a_machine_that_has_ended_nothing_is_left() {
    let place = Place::new();
    place.marked();
    begin(&place.machine, &place.backup(None)).await.unwrap();
    assert_eq!(state(place.dir.path(), None, id()).await.unwrap().phase, DiskBackupPhase::Gone);
    end(place.dir.path(), None, id()).await.unwrap();
    assert!(!place.path(FILE).exists());
    clear(place.dir.path()).unwrap();
}
