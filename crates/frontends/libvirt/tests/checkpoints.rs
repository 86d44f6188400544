//! Checkpoints and backups by libvirt's protocol: a line of checkpoints, a backup that is written, one that is read, and what is told of
//! them as of a domain's job.
#![allow(clippy::disallowed_methods)] // a test

use crate::support::{Client, PATIENCE, Refused, Server, argument};
use karst_frontend_libvirt::{error::Code, frame::Kind, xdr::Reader};
use karst_model::instance::InstanceKind;
use std::time::{Duration, Instant};

const ABORT_JOB: i32 = 164;
const JOB_STATS: i32 = 298;
const CREATE: i32 = 411;
const XML: i32 = 412;
const LIST: i32 = 413;
const CHILDREN: i32 = 414;
const BY_NAME: i32 = 415;
const PARENT: i32 = 416;
const DELETE: i32 = 417;
const BEGIN: i32 = 421;
const BACKUP_XML: i32 = 422;

async fn create(client: &mut Client, domain: &[u8], xml: &str, flags: u32) -> Result<Vec<u8>, Refused> {
    let said = argument(|w| {
        w.string(xml).u32(flags);
    });
    client.call(CREATE, &[domain, &said].concat()).await
}

/// A call on a checkpoint, with what else it says.
async fn of(
    client: &mut Client,
    procedure: i32,
    domain: &[u8],
    name: &str,
    rest: &[i32],
) -> Result<Vec<u8>, Refused> {
    let name = argument(|w| {
        w.string(name);
    });
    let rest = argument(|w| {
        for n in rest {
            w.i32(*n);
        }
    });
    client.call(procedure, &[&name, domain, &rest].concat()).await
}

async fn text(client: &mut Client, domain: &[u8], name: &str, flags: i32) -> String {
    let answer = of(client, XML, domain, name, &[flags]).await.unwrap();
    Reader::new(&answer).string().unwrap()
}

/// Names of a list of checkpoints.
fn names(answer: &[u8]) -> Vec<String> {
    let mut r = Reader::new(answer);
    let all = r
        .array(64, |r| {
            let name = r.string()?;
            r.string()?;
            r.uuid()?;
            r.i32()?;
            Ok(name)
        })
        .unwrap();
    assert_eq!(r.u32().unwrap() as usize, all.len());
    all
}

async fn list(client: &mut Client, domain: &[u8], flags: i32) -> Vec<String> {
    let said = argument(|w| {
        w.i32(1).i32(flags);
    });
    names(&client.call(LIST, &[domain, &said].concat()).await.unwrap())
}

async fn begin(
    client: &mut Client,
    domain: &[u8],
    xml: &str,
    checkpoint: Option<&str>,
    flags: u32,
) -> Result<(), Refused> {
    let said = argument(|w| {
        w.string(xml).optional(checkpoint).u32(flags);
    });
    client.call(BEGIN, &[domain, &said].concat()).await.map(drop)
}

/// Kind of a domain's job, and the names of what is told of it.
async fn job(client: &mut Client, domain: &[u8], flags: u32) -> (i32, Vec<String>) {
    let said = argument(|w| {
        w.u32(flags);
    });
    let answer = client.call(JOB_STATS, &[domain, &said].concat()).await.unwrap();
    let mut r = Reader::new(&answer);
    let kind = r.i32().unwrap();
    (kind, params(&mut r))
}

fn params(r: &mut Reader<'_>) -> Vec<String> {
    let all = r
        .array(32, |r| {
            let name = r.string()?;
            match r.u32()? {
                4 => drop(r.u64()?),
                7 => drop(r.string()?),
                _ => drop(r.u32()?),
            }
            Ok(name)
        })
        .unwrap();
    r.end().unwrap();
    all
}

async fn until_none(client: &mut Client, domain: &[u8]) {
    let end = Instant::now() + PATIENCE;
    while job(client, domain, 0).await.0 != 0 {
        assert!(Instant::now() < end, "it does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn ready() -> (Server, Client, Vec<u8>) {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let domain = client.domain("v1").await;
    (server, client, domain)
}

fn checkpoint(name: &str) -> String {
    format!("<domaincheckpoint><name>{name}</name></domaincheckpoint>")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoints_are_a_line() {
    let (server, mut client, v1) = ready().await;
    assert!(list(&mut client, &v1, 0).await.is_empty());
    for name in ["a", "b", "c"] {
        create(&mut client, &v1, &checkpoint(name), 0).await.unwrap();
    }
    assert_eq!(list(&mut client, &v1, 0).await, ["a", "b", "c"]);
    assert_eq!(list(&mut client, &v1, 1).await, ["a"], "roots");
    assert_eq!(list(&mut client, &v1, 4).await, ["c"], "leaves");
    assert_eq!(list(&mut client, &v1, 8).await, ["a", "b"], "no leaves");
    let below = of(&mut client, CHILDREN, &v1, "a", &[1, 0]).await.unwrap();
    assert_eq!(names(&below), ["b"]);
    let below = of(&mut client, CHILDREN, &v1, "a", &[1, 1]).await.unwrap();
    assert_eq!(names(&below), ["b", "c"]);
    let parent = of(&mut client, PARENT, &v1, "b", &[0]).await.unwrap();
    assert_eq!(Reader::new(&parent).string().unwrap(), "a");
    for (procedure, name) in [(PARENT, "a"), (PARENT, "nope"), (XML, "nope"), (DELETE, "nope")] {
        let e = of(&mut client, procedure, &v1, name, &[0]).await.unwrap_err();
        assert_eq!(e.0, Code::NoDomainCheckpoint as i32, "{e:?}");
    }
    let said = argument(|w| {
        w.string("nope").u32(0);
    });
    let e = client.call(BY_NAME, &[&v1[..], &said].concat()).await.unwrap_err();
    assert_eq!(e.0, Code::NoDomainCheckpoint as i32, "{e:?}");

    let whole = text(&mut client, &v1, "b", 0).await;
    assert!(whole.contains("<disk name='sda' checkpoint='bitmap' bitmap='b'/>"), "{whole}");
    assert!(whole.contains("<parent>\n    <name>a</name>") && whole.contains("<domain "), "{whole}");
    assert!(!text(&mut client, &v1, "b", 2).await.contains("<domain "), "without the domain");
    // As libvirt has it, whoever may only look does not ask for what is secure.
    let mut reader = server.open("ro", "qemu:///system").await;
    let denied = of(&mut reader, XML, &v1, "b", &[1]).await.unwrap_err();
    assert_eq!(denied.0, Code::OperationDenied as i32, "{denied:?}");
    of(&mut reader, XML, &v1, "b", &[0]).await.unwrap();
    // 64 KiB in each of the two that follow.
    let sizes = text(&mut client, &v1, "b", 2 | 4).await;
    assert!(sizes.contains("bitmap='b' size='131072'"), "{sizes}");

    // What is there gets another description, and nothing else.
    let described = whole.replace("<parent>", "<description>mine</description><parent>");
    create(&mut client, &v1, &described, 1).await.unwrap();
    assert!(text(&mut client, &v1, "b", 0).await.contains("<description>mine</description>"));
    let e = create(&mut client, &v1, &whole.replace("bitmap='b'", "bitmap='x'"), 1).await.unwrap_err();
    assert!(e.0 == Code::ConfigUnsupported as i32 && e.1.contains("disks"), "{e:?}");
    let e =
        create(&mut client, &v1, &whole.replace("<name>b</name>", "<name>new</name>"), 1).await.unwrap_err();
    assert_eq!(e.0, Code::OperationUnsupported as i32, "{e:?}");
    let e = create(&mut client, &v1, &checkpoint("b"), 0).await.unwrap_err();
    assert!(e.1.contains("has a checkpoint \"b\" already"), "{e:?}");

    let e = of(&mut client, DELETE, &v1, "b", &[2]).await.unwrap_err();
    assert_eq!(e.0, Code::OperationUnsupported as i32, "{e:?}");
    of(&mut client, DELETE, &v1, "b", &[4]).await.unwrap();
    assert_eq!(list(&mut client, &v1, 0).await, ["a", "b"], "its children only");
    of(&mut client, DELETE, &v1, "a", &[1]).await.unwrap();
    assert!(list(&mut client, &v1, 0).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_is_the_job_of_its_domain() {
    let (server, mut client, v1) = ready().await;
    let mut listener = server.open("ro", "qemu:///system").await;
    let said = argument(|w| {
        w.i32(21).u32(0);
    });
    listener.call(316, &said).await.unwrap();
    assert_eq!(job(&mut client, &v1, 0).await, (0, vec![]));
    let e = client.call(ABORT_JOB, &v1).await.unwrap_err();
    assert!(e.1.contains("no job is active"), "{e:?}");

    // Written, with a checkpoint.
    let push = |since: &str| {
        format!(
            "<domainbackup>{since}<disks><disk name='sda'><target file='/karst/default/b'/></disk></disks></domainbackup>"
        )
    };
    begin(&mut client, &v1, &push(""), Some(&checkpoint("c1")), 0).await.unwrap();
    until_none(&mut client, &v1).await;
    assert_eq!(list(&mut client, &v1, 0).await, ["c1"]);
    let (kind, told) = job(&mut client, &v1, 1).await;
    assert!(kind == 3 && told.contains(&"disk_total".to_owned()), "{kind} {told:?}");
    let frame = listener.receive().await;
    assert_eq!((frame.header.kind, frame.header.procedure), (Kind::Message, 363));
    let mut r = Reader::new(&frame.payload);
    r.i32().unwrap();
    assert_eq!(r.string().unwrap(), "v1");
    r.uuid().unwrap();
    r.i32().unwrap();
    assert!(params(&mut r).contains(&"success".to_owned()));

    // What changed, over it; and not into another.
    let since = "<incremental>c1</incremental>";
    let e = begin(&mut client, &v1, &push(since), None, 0).await.unwrap_err();
    assert_eq!(e.0, Code::ConfigUnsupported as i32, "{e:?}");
    begin(&mut client, &v1, &push(since), None, 1).await.unwrap();
    until_none(&mut client, &v1).await;

    // Read, until it is said that it has been.
    let e = client.call(BACKUP_XML, &[&v1[..], &[0; 4]].concat()).await.unwrap_err();
    assert_eq!(e.0, Code::NoDomainBackup as i32, "{e:?}");
    let pull = format!("<domainbackup mode='pull'>{since}</domainbackup>");
    begin(&mut client, &v1, &pull, None, 0).await.unwrap();
    let answer = client.call(BACKUP_XML, &[&v1[..], &[0; 4]].concat()).await.unwrap();
    let shown = Reader::new(&answer).string().unwrap();
    for part in ["transport='unix' socket='/", "exportname='sda'", "exportbitmap='backup-sda'", "mode='pull'"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert_eq!(job(&mut client, &v1, 0).await.0, 2, "unbounded");
    let e = begin(&mut client, &v1, &pull, None, 0).await.unwrap_err();
    assert!(e.1.contains("another backup job"), "{e:?}");
    client.call(ABORT_JOB, &v1).await.unwrap();
    assert_eq!(job(&mut client, &v1, 0).await.0, 0);
    assert_eq!(job(&mut client, &v1, 1).await.0, 3, "it is done");
}
