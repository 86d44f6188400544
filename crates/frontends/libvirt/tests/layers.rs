//! External snapshots by libvirt's protocol, and block jobs of the layers that they leave: pull, commit, and how they end.
#![allow(clippy::disallowed_methods)] // a test

use crate::support::{Client, PATIENCE, Refused, Server, argument};
use karst_engine::Context;
use karst_frontend_libvirt::{error::Code, xdr::Reader};
use karst_model::{access::Principal, instance::InstanceKind};
use std::time::{Duration, Instant};

const XML: i32 = 14;
const CREATE: i32 = 185;
const SNAPSHOT_XML: i32 = 186;
const NUM: i32 = 187;
const REVERT: i32 = 192;
const DELETE: i32 = 193;
const ABORT: i32 = 237;
const INFO: i32 = 238;
const PULL: i32 = 240;
const REBASE: i32 = 266;
const COMMIT: i32 = 290;
/// `VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY`, `_NO_METADATA`
const DISK_ONLY: u32 = 16;
const NO_METADATA: u32 = 4;

struct Place {
    server: Server,
    client: Client,
    v1: Vec<u8>,
}

impl Place {
    async fn new() -> Self {
        let server = Server::start().await;
        server.guest("v1", InstanceKind::VirtualMachine, true).await;
        let mut client = server.open("full", "qemu:///system").await;
        let v1 = client.domain("v1").await;
        Self { server, client, v1 }
    }

    async fn call(&mut self, procedure: i32, payload: Vec<u8>) -> Result<Vec<u8>, Refused> {
        let payload = [&self.v1[..], &payload].concat();
        self.client.call(procedure, &payload).await
    }

    /// Takes a snapshot; `disks` is what its document says of them.
    async fn snapshot(&mut self, name: &str, disks: &str, flags: u32) -> Result<String, Refused> {
        let memory = if name == "whole" { "<memory snapshot='no'/>" } else { "" };
        let xml =
            format!("<domainsnapshot><name>{name}</name>{memory}<disks>{disks}</disks></domainsnapshot>");
        let said = argument(|w| {
            w.string(&xml).u32(flags);
        });
        let answer = self.call(CREATE, said).await?;
        Ok(Reader::new(&answer).string().unwrap())
    }

    async fn of_snapshot(&mut self, procedure: i32, name: &str, flags: u32) -> Result<Vec<u8>, Refused> {
        let mut said = argument(|w| {
            w.string(name);
        });
        said.extend(&self.v1);
        said.extend(argument(|w| {
            w.u32(flags);
        }));
        self.client.call(procedure, &said).await
    }

    async fn count(&mut self, flags: u32) -> i32 {
        let said = argument(|w| {
            w.u32(flags);
        });
        Reader::new(&self.call(NUM, said).await.unwrap()).i32().unwrap()
    }

    async fn document(&mut self) -> String {
        let said = argument(|w| {
            w.u32(0);
        });
        Reader::new(&self.call(XML, said).await.unwrap()).string().unwrap()
    }

    async fn commit(&mut self, base: Option<&str>, top: Option<&str>, flags: u32) -> Result<(), Refused> {
        let said = argument(|w| {
            w.string("sda").optional(base).optional(top).u64(0).u32(flags);
        });
        self.call(COMMIT, said).await.map(drop)
    }

    async fn pull(&mut self) -> Result<(), Refused> {
        let said = argument(|w| {
            w.string("sda").u64(0).u32(0);
        });
        self.call(PULL, said).await.map(drop)
    }

    async fn rebase(&mut self, base: &str) -> Result<(), Refused> {
        let said = argument(|w| {
            w.string("sda").optional(Some(base)).u64(0).u32(0);
        });
        self.call(REBASE, said).await.map(drop)
    }

    /// Kind of the job, and whether it is ready; nothing when there is none.
    async fn job(&mut self) -> Option<(i32, bool)> {
        let said = argument(|w| {
            w.string("sda").u32(0);
        });
        let answer = self.call(INFO, said).await.unwrap();
        let mut r = Reader::new(&answer);
        let (found, kind) = (r.i32().unwrap(), r.i32().unwrap());
        let (_, now, end) = (r.u64().unwrap(), r.u64().unwrap(), r.u64().unwrap());
        (found == 1).then_some((kind, now == end))
    }

    async fn until_gone(&mut self) {
        let end = Instant::now() + PATIENCE;
        while self.job().await.is_some() {
            assert!(Instant::now() < end, "the job goes on");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_ready(&mut self, kind: i32) {
        let end = Instant::now() + PATIENCE;
        while self.job().await != Some((kind, true)) {
            assert!(Instant::now() < end, "the job is not ready");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn abort(&mut self, flags: u32) -> Result<(), Refused> {
        let said = argument(|w| {
            w.string("sda").u32(flags);
        });
        self.call(ABORT, said).await.map(drop)
    }

    fn layers(&self) -> Vec<String> {
        let context = Context::new(Principal::system());
        let mut disks = self.server.engine.disk_layers(&context, "default", "v1").unwrap();
        disks.remove(0).layers.into_iter().map(|l| l.name).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_go_on_in_layers_which_documents_show() {
    let mut p = Place::new().await;
    let external = "<disk name='sda' snapshot='external'><source file='/karst/default/mine'/></disk>";
    assert_eq!(p.snapshot("s1", "", DISK_ONLY).await.unwrap(), "s1");
    assert_eq!(p.snapshot("s2", external, DISK_ONLY | NO_METADATA).await.unwrap(), "s2");
    assert_eq!(p.layers(), ["instances/v1.s1", "mine"]);
    let text = p.document().await;
    let disk = &text[text.find("<disk ").unwrap()..text.find("</disk>").unwrap()];
    for part in [
        "<disk type='file' device='disk'>",
        "<source file='/karst/default/mine'/>",
        "<backingStore type='file' index='1'>",
        "<source file='/karst/default/instances/v1.s1'/>",
        "<source file='/karst/default/instances/v1'/>",
    ] {
        assert!(disk.contains(part), "{part} in {disk}");
    }
    // Only the first has a record.
    assert_eq!(p.count(0).await, 1);
    for (flags, found) in
        [(1 << 9, 1), (1 << 8, 0), (1 << 7, 1), (1 << 6, 0), (1 << 5, 0), ((1 << 8) | (1 << 9), 1)]
    {
        assert_eq!(p.count(flags).await, found, "{flags:#x}");
    }
    let answer = p.of_snapshot(SNAPSHOT_XML, "s1", 0).await.unwrap();
    let text = Reader::new(&answer).string().unwrap();
    for part in [
        "<state>disk-snapshot</state>",
        "<memory snapshot='no'/>",
        "<disk name='sda' snapshot='external' type='file'>",
        "<source file='/karst/default/instances/v1.s1'/>",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    // What would be no snapshot of this kind is refused, and changes nothing.
    let path = |path: &str| format!("<disk name='sda' snapshot='external'><source file='{path}'/></disk>");
    let unsupported = Code::ConfigUnsupported;
    for (disks, flags, code, word) in [
        (path("/tmp/x.qcow2"), DISK_ONLY, unsupported, "/karst/default/NAME"),
        (path("/karst/default/mine"), DISK_ONLY, unsupported, "already exists"),
        (path("/karst/default/instances/v1"), DISK_ONLY, unsupported, "already exists"),
        (path("/karst/default/ok"), 0, unsupported, "mixing"),
        ("<disk name='sda' snapshot='no'/>".into(), DISK_ONLY, unsupported, "nothing selected"),
        ("<disk name='vdz' snapshot='external'/>".into(), DISK_ONLY, unsupported, "no disk named"),
        (String::new(), DISK_ONLY | 32, Code::OperationUnsupported, "made by its pool"),
    ] {
        let refused = p.snapshot("s3", &disks, flags).await.unwrap_err();
        assert!(refused.0 == code as i32 && refused.1.contains(word), "{disks} {flags}: {refused:?}");
    }
    assert_eq!(p.layers().len(), 2);
    let back = p.of_snapshot(REVERT, "s1", 0).await.unwrap_err();
    assert!(back.0 == unsupported as i32 && back.1.contains("revert to external snapshot"), "{back:?}");
    p.of_snapshot(DELETE, "s1", 2).await.expect("the record alone");
    assert_eq!((p.count(0).await, p.layers().len()), (0, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_are_committed_and_pulled() {
    let mut p = Place::new().await;
    for name in ["s1", "s2", "s3"] {
        p.snapshot(name, "", DISK_ONLY).await.unwrap();
    }
    for (base, top, flags, word) in [
        (None, None, 0, "active flag"),
        (None, Some("sda[1]"), 4, "is not active"),
        (None, Some("sda[3]"), 0, "no backing file"),
        (Some("/tmp/x"), None, 4, "could not find image"),
        (Some("sda[3]"), None, 4 | 1, "not immediately below"),
        (None, None, 64, "flags"),
    ] {
        let refused = p.commit(base, top, flags).await.unwrap_err();
        assert!(
            refused.0 == Code::InvalidArg as i32 && refused.1.contains(word),
            "{base:?} {top:?}: {refused:?}"
        );
    }
    let relative = p.commit(None, None, 4 | 8).await.unwrap_err();
    assert_eq!(relative.0, Code::ConfigUnsupported as i32, "{relative:?}");

    // One in the middle goes by itself.
    let first = "/karst/default/instances/v1.s1";
    p.commit(Some(first), Some("/karst/default/instances/v1.s2"), 0).await.unwrap();
    p.until_gone().await;
    assert_eq!(p.layers(), ["instances/v1.s1", "instances/v1.s3"]);

    // The active one waits for a word: left, then gone over to.
    p.commit(None, None, 4 | 1).await.unwrap();
    let busy = p.pull().await.unwrap_err();
    assert_eq!(busy.0, Code::BlockCopyActive as i32, "{busy:?}");
    p.until_ready(4).await;
    p.abort(0).await.unwrap();
    assert_eq!((p.job().await, p.layers().len()), (None, 2));
    p.commit(None, None, 4 | 1).await.unwrap();
    p.until_ready(4).await;
    p.abort(2).await.unwrap();
    assert_eq!(p.layers(), ["instances/v1.s1"]);

    // What is below comes into the active one, down to what stays.
    p.snapshot("s4", "", DISK_ONLY).await.unwrap();
    p.rebase("/karst/default/instances/v1").await.unwrap();
    p.until_gone().await;
    assert_eq!(p.layers(), ["instances/v1.s4"]);
    p.pull().await.unwrap();
    p.until_gone().await;
    assert!(p.layers().is_empty());
    let text = p.document().await;
    assert!(!text.contains("backingStore"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_goes_with_its_data_has_its_layers_committed() {
    let mut p = Place::new().await;
    for name in ["s1", "s2"] {
        p.snapshot(name, "", DISK_ONLY).await.unwrap();
    }
    let unsupported = Code::ConfigUnsupported as i32;
    let parent = p.of_snapshot(DELETE, "s1", 0).await.unwrap_err();
    assert!(parent.0 == unsupported && parent.1.contains("with children"), "{parent:?}");
    let children = p.of_snapshot(DELETE, "s1", 4).await.unwrap_err();
    assert!(children.0 == unsupported && children.1.contains("external children"), "{children:?}");
    assert_eq!(p.layers().len(), 2);
    p.of_snapshot(DELETE, "s2", 0).await.unwrap();
    assert_eq!((p.layers(), p.count(0).await), (vec!["instances/v1.s1".to_owned()], 1));
    p.of_snapshot(DELETE, "s1", 0).await.unwrap();
    assert_eq!((p.layers().len(), p.count(0).await), (0, 0));
    // Beside an internal one a record goes only if it is no more than that.
    p.snapshot("whole", "", 0).await.unwrap();
    let whole = p.of_snapshot(DELETE, "whole", 2).await.unwrap_err();
    assert_eq!(whole.0, Code::OperationUnsupported as i32, "{whole:?}");
}
