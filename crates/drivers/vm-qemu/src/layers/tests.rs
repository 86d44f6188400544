//! What QEMU is told when a guest goes on in layers, of one that breaks off at any place of it.

use super::*;
use crate::{machine::without_owner, record::Devices};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixListener,
};

const SLOT: &str = "scsi0";

#[derive(Default)]
struct Qemu {
    /// Nodes, and whether something has them.
    nodes: Vec<(String, bool)>,
    said: Vec<Value>,
    /// It does the transaction and closes the connection instead of an answer.
    silent: bool,
    /// It refuses the transaction.
    refuses: bool,
}

impl Qemu {
    fn run(&mut self, command: &str, arguments: &Value) -> std::result::Result<Option<Value>, &'static str> {
        let name = arguments["node-name"].as_str().unwrap_or_default().to_owned();
        match command {
            "query-block" => {
                return Ok(Some(json!([{"inserted": {"node-name": Side::First.name('d', SLOT)}}])));
            }
            "query-block-jobs" | "query-fdsets" => return Ok(Some(json!([]))),
            "query-named-block-nodes" => {
                return Ok(Some(self.nodes.iter().map(|(n, _)| json!({"node-name": n})).collect()));
            }
            "blockdev-add" => self.nodes.push((name, false)),
            "blockdev-del" => {
                if self.nodes.iter().any(|(n, used)| *n == name && *used) {
                    return Err("Node 'x' is in use");
                }
                self.nodes.retain(|(n, _)| *n != name);
            }
            "transaction" if self.refuses => return Err("Could not"),
            "transaction" => {
                let overlay = arguments["actions"][0]["data"]["overlay"].as_str().unwrap().to_owned();
                let file = overlay.replacen('i', "f", 1);
                for (name, used) in &mut self.nodes {
                    *used |= *name == overlay || *name == file;
                }
                if std::mem::take(&mut self.silent) {
                    return Ok(None);
                }
            }
            _ => {}
        }
        Ok(Some(json!({})))
    }

    fn answer(&mut self, line: &str) -> Option<String> {
        let asked: Value = serde_json::from_str(line).unwrap();
        let command = asked["execute"].as_str().unwrap().to_owned();
        self.said.push(asked.clone());
        let mut answer = match self.run(&command, &asked["arguments"]) {
            Ok(None) => return None,
            Ok(Some(value)) => json!({"return": value}),
            Err(text) => json!({"error": {"class": "GenericError", "desc": text}}),
        };
        answer["id"] = asked["id"].clone();
        Some(format!("{answer}\n"))
    }
}

struct Place {
    dir: tempfile::TempDir,
    machine: Machine,
    qemu: Arc<Mutex<Qemu>>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let qemu = Arc::new(Mutex::new(Qemu::default()));
        qemu.lock().unwrap().nodes.push((Side::First.name('i', SLOT), true));
        let listener = UnixListener::bind(dir.path().join(launch::QMP)).unwrap();
        tokio::spawn(Self::serve(listener, qemu.clone()));
        let (machine, _) = without_owner(dir.path().to_owned());
        for name in ["old", "new"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let old = dir.path().join("old");
        machine.record().root = old.clone();
        machine.record().devices = Some(Devices {
            machine: "q35".into(),
            ports: 8,
            display: false,
            disks: vec![karst_guest::samples::disk("root", SLOT, old, DiskFormat::Raw)],
            nics: vec![],
        });
        machine.observed.send_modify(|o| o.state = RuntimeState::Running);
        Self { dir, machine, qemu }
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

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn layer(&self) -> Vec<NewLayer> {
        vec![NewLayer { disk: self.path("old"), path: self.path("new"), number: 3 }]
    }

    fn disk(&self) -> ResolvedDisk {
        self.machine.record().devices.as_ref().unwrap().disks[0].clone()
    }

    fn said(&self, command: &str) -> Vec<Value> {
        let qemu = self.qemu.lock().unwrap();
        qemu.said.iter().filter(|s| s["execute"] == command).map(|s| s["arguments"].clone()).collect()
    }

    fn nodes(&self) -> Vec<String> {
        self.qemu.lock().unwrap().nodes.iter().map(|(n, _)| n.clone()).collect()
    }
}

#[tokio::test]
async fn a_guest_goes_on_in_a_layer_over_what_its_disk_was() {
    let place = Place::new();
    for _ in 0..2 {
        add(&place.machine, &place.layer()).await.unwrap();
    }
    let told = place.said("transaction");
    assert_eq!(told.len(), 1, "twice is once");
    let action = json!({"type": "blockdev-snapshot", "data": {"node": "i-scsi0", "overlay": "i-scsi0.l3"}});
    assert_eq!(told[0]["actions"], json!([action]));
    let added = place.said("blockdev-add");
    assert_eq!(added[0]["node-name"], "f-scsi0.l3");
    assert_eq!((&added[1]["node-name"], &added[1]["backing"]), (&json!("i-scsi0.l3"), &Value::Null));
    let disk = place.disk();
    assert_eq!((disk.path, disk.format, disk.chain.number), (place.path("new"), DiskFormat::Qcow2, 3));
    let below = LowerFile { number: 0, path: place.path("old"), format: DiskFormat::Raw };
    assert_eq!(disk.chain.below, [below]);
    assert_eq!(place.machine.record().root, place.path("new"));
    assert!(take_back(&place.machine, &place.layer()).await.unwrap(), "nothing leads back");
}

#[tokio::test]
async fn what_was_done_unheard_is_found_again() {
    let place = Place::new();
    place.qemu.lock().unwrap().silent = true;
    add(&place.machine, &place.layer()).await.unwrap_err();
    assert_eq!(place.disk().chain.number, 0, "nobody has heard of it");
    add(&place.machine, &place.layer()).await.unwrap();
    assert_eq!((place.disk().chain.number, place.said("transaction").len()), (3, 1));

    let place = Place::new();
    place.qemu.lock().unwrap().silent = true;
    add(&place.machine, &place.layer()).await.unwrap_err();
    assert!(take_back(&place.machine, &place.layer()).await.unwrap());
    assert_eq!(place.disk().chain.number, 3, "it is written down then");
}

#[tokio::test]
async fn what_qemu_refuses_leaves_nothing() {
    let place = Place::new();
    place.qemu.lock().unwrap().refuses = true;
    add(&place.machine, &place.layer()).await.unwrap_err();
    assert!(!take_back(&place.machine, &place.layer()).await.unwrap());
    assert_eq!(place.nodes(), ["i-scsi0"]);
    assert_eq!((place.disk().chain, place.disk().path), (DiskChain::default(), place.path("old")));
    // And what it left does not keep the next from being made.
    add(&place.machine, &place.layer()).await.unwrap_err();
    place.qemu.lock().unwrap().refuses = false;
    add(&place.machine, &place.layer()).await.unwrap();
    assert_eq!(place.nodes(), ["i-scsi0", "f-scsi0.l3", "i-scsi0.l3"]);
}

#[tokio::test]
async fn only_volumes_that_a_guest_writes_alone_get_layers() {
    for change in [
        (|d: &mut ResolvedDisk| d.readonly = true) as fn(&mut ResolvedDisk),
        |d| d.cdrom = true,
        |d| d.shared = true,
        |d| d.foreign = true,
    ] {
        let place = Place::new();
        change(&mut place.machine.record().devices.as_mut().unwrap().disks[0]);
        let refused = add(&place.machine, &place.layer()).await.unwrap_err();
        assert!(refused.is(karst_model::ErrorKind::Unsupported), "{refused}");
        assert_eq!(refused.field.as_deref(), Some("devices.root"));
        assert!(place.said("blockdev-add").is_empty());
    }
}
