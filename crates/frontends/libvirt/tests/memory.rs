//! Memory in files of the host by libvirt's protocol: saved, looked into, changed, restored; dumped; and told of as of a domain's job.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    define::{define, domain, dump, ready},
    support::{Client, PATIENCE, Refused, Server, argument},
};
use karst_agent::Fault;
use karst_frontend_libvirt::{error::Code, xdr::Reader};
use karst_model::{Error, instance::InstanceKind};
use std::time::{Duration, Instant};

const CREATE: i32 = 9;
const DESTROY: i32 = 12;
const CORE_DUMP: i32 = 53;
const RESTORE: i32 = 54;
const SAVE: i32 = 55;
const JOB_INFO: i32 = 163;
const ABORT_JOB: i32 = 164;
const MANAGED_SAVE: i32 = 182;
const UNDEFINE_FLAGS: i32 = 231;
const SAVE_FLAGS: i32 = 232;
const RESTORE_FLAGS: i32 = 233;
const IMAGE_XML: i32 = 235;
const IMAGE_DEFINE: i32 = 236;
const JOB_STATS: i32 = 298;
const DUMP_WITH_FORMAT: i32 = 334;
const SAVE_PARAMS: i32 = 440;

const FILE: &str = "/srv/saves/v1";
const RUNNING: u32 = 2;
const PAUSED: u32 = 4;
const MEMORY_ONLY: u32 = 16;

fn words(texts: &[&str], flags: Option<u32>) -> Vec<u8> {
    argument(|w| {
        for text in texts {
            w.string(text);
        }
        if let Some(flags) = flags {
            w.u32(flags);
        }
    })
}

async fn save(client: &mut Client, of: &[u8], path: &str) -> Result<Vec<u8>, Refused> {
    client.call(SAVE, &[of, &words(&[path], None)].concat()).await
}

async fn restore(client: &mut Client, path: &str, document: Option<&str>, flags: u32) -> Result<(), Refused> {
    let said = argument(|w| {
        w.string(path).optional(document).u32(flags);
    });
    client.call(RESTORE_FLAGS, &said).await.map(drop)
}

async fn image_xml(client: &mut Client, path: &str) -> Result<String, Refused> {
    let answer = client.call(IMAGE_XML, &words(&[path], Some(0))).await?;
    Ok(Reader::new(&answer).string().unwrap())
}

async fn job(client: &mut Client, of: &[u8], flags: u32) -> (i32, Vec<u8>) {
    let answer = client.call(JOB_STATS, &[of, &flags.to_be_bytes()].concat()).await.unwrap();
    (Reader::new(&answer).i32().unwrap(), answer)
}

async fn running() -> (Server, Client, Vec<u8>) {
    let (server, mut client) = ready().await;
    define(&mut client, &domain("v1", &[])).await.unwrap();
    let v1 = client.domain("v1").await;
    client.call(CREATE, &v1).await.unwrap();
    (server, client, v1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_domain_is_saved_and_goes_on() {
    let (server, mut client, v1) = running().await;
    let e = save(&mut client, &v1, "/etc/shadow").await.unwrap_err();
    assert!(e.0 == Code::AccessDenied as i32 && e.1.contains("save_paths"), "{e:?}");
    server.host.put_foreign_file("/srv/saves/other");
    let e = save(&mut client, &v1, "/srv/saves/other").await.unwrap_err();
    assert!(e.1.contains("is there already"), "{e:?}");
    assert_eq!(client.state(&v1).await.0, 1, "it runs");
    save(&mut client, &v1, FILE).await.unwrap();
    assert_eq!(client.state(&v1).await, (5, 2), "shut off; of the file nothing is kept");
    let document = image_xml(&mut client, FILE).await.unwrap();
    assert!(document.contains("<name>v1</name>") && document.contains("/karst/default/d1"), "{document}");
    assert!(save(&mut client, &v1, FILE).await.unwrap_err().1.contains("not running"));

    restore(&mut client, FILE, None, 0).await.unwrap();
    assert_eq!(client.state(&v1).await, (1, 3), "running, restored");
    let e = client.call(RESTORE, &words(&[FILE], None)).await.unwrap_err();
    assert!(e.0 == Code::OperationInvalid as i32 && e.1.contains("already active"), "{e:?}");
    client.call(DESTROY, &v1).await.unwrap();
    restore(&mut client, FILE, None, PAUSED).await.unwrap();
    assert_eq!(client.state(&v1).await.0, 3, "the file stays, and the flag holds");
    // Saved while it stands still, it stands still again.
    save(&mut client, &v1, FILE).await.unwrap();
    restore(&mut client, FILE, None, 0).await.unwrap();
    assert_eq!(client.state(&v1).await.0, 3);
    let both = restore(&mut client, FILE, None, RUNNING | PAUSED).await.unwrap_err();
    assert_eq!(both.0, Code::InvalidArg as i32);
    let e = restore(&mut client, "/srv/saves/other", None, 0).await.unwrap_err();
    assert!(e.0 == Code::OperationFailed as i32, "no memory: {e:?}");
    let e = restore(&mut client, "/srv/saves/none", None, 0).await.unwrap_err();
    assert!(e.1.contains("does not exist"), "{e:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_file_says_is_changed_as_far_as_the_guest_does_not_see_it() {
    let (_server, mut client, v1) = running().await;
    save(&mut client, &v1, FILE).await.unwrap();
    let document = image_xml(&mut client, FILE).await.unwrap();
    let define_image = async |client: &mut Client, text: &str, flags: u32| {
        client.call(IMAGE_DEFINE, &words(&[FILE, text], Some(flags))).await.map(drop)
    };
    let titled = document.replace("<title>A title</title>", "<title>Another</title>");
    assert_ne!(titled, document);
    define_image(&mut client, &titled, PAUSED).await.unwrap();
    assert!(image_xml(&mut client, FILE).await.unwrap().contains("Another"));
    for (from, to, what) in [
        ("<name>v1</name>", "<name>v2</name>", "name"),
        ("c7a5fdbd", "c7a5fdbe", "uuid"),
        ("dev='vda'", "dev='vdb'", "disk vda"),
        ("52:54:00:11:22:33", "52:54:00:11:22:34", "interface"),
    ] {
        assert!(document.contains(from), "{from}: {document}");
        let e = define_image(&mut client, &document.replace(from, to), 0).await.unwrap_err();
        assert!(e.0 == Code::ConfigUnsupported as i32 && e.1.contains(what), "{what}: {e:?}");
    }
    assert_eq!(define_image(&mut client, "<domain", 0).await.unwrap_err().0, Code::XmlError as i32);
    // Another disk in the file than in the definition: nothing starts over it.
    let moved = document.replace("/karst/default/d1", "/karst/default/d3");
    define_image(&mut client, &moved, 0).await.unwrap();
    let e = restore(&mut client, FILE, None, 0).await.unwrap_err();
    assert!(e.0 == Code::ConfigUnsupported as i32 && e.1.contains("disk vda"), "{e:?}");
    assert_eq!(client.state(&v1).await.0, 5);
    restore(&mut client, FILE, Some(&document), RUNNING).await.unwrap();
    assert_eq!(client.state(&v1).await.0, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_defined_any_more_is_transient_then() {
    let (server, mut client, v1) = running().await;
    save(&mut client, &v1, FILE).await.unwrap();
    client.call(UNDEFINE_FLAGS, &[&v1[..], &4u32.to_be_bytes()].concat()).await.unwrap();
    assert!(client.names().await.is_empty());
    // What fails leaves nothing.
    server.host.inject("guest_start", Fault::FailBefore(Error::conflict("no")));
    assert!(restore(&mut client, FILE, None, 0).await.is_err());
    assert!(client.names().await.is_empty());
    restore(&mut client, FILE, None, 0).await.unwrap();
    assert_eq!(client.domain("v1").await[..24], v1[..24], "by its name and UUID");
    assert_eq!(client.state(&v1).await, (1, 3));
    assert!(dump(&mut client, "v1", 0).await.contains("c7a5fdbd"));
    save(&mut client, &v1, FILE).await.unwrap();
    assert!(client.names().await.is_empty(), "a transient domain goes with its save");
    restore(&mut client, FILE, None, PAUSED).await.unwrap();
    assert_eq!(client.state(&v1).await.0, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dumps_and_parameters() {
    let (server, mut client, v1) = running().await;
    let core = async |client: &mut Client, path: &str, flags: u32| {
        client.call(CORE_DUMP, &[&v1[..], &words(&[path], Some(flags))].concat()).await.map(drop)
    };
    let e = core(&mut client, "/srv/saves/dump", 0).await.unwrap_err();
    assert!(e.0 == Code::ConfigUnsupported as i32 && e.1.contains("--memory-only"), "{e:?}");
    core(&mut client, "/srv/saves/dump", MEMORY_ONLY).await.unwrap();
    assert!(core(&mut client, "/srv/saves/dump", MEMORY_ONLY).await.unwrap_err().1.contains("already"));
    assert_eq!(
        core(&mut client, "/srv/saves/x", MEMORY_ONLY | 1 | 8).await.unwrap_err().0,
        Code::InvalidArg as i32
    );
    assert_eq!(client.state(&v1).await.0, 1);
    let with_format = argument(|w| {
        w.string("/srv/saves/kdump").u32(1).u32(MEMORY_ONLY);
    });
    client.call(DUMP_WITH_FORMAT, &[&v1[..], &with_format].concat()).await.unwrap();
    assert_eq!(server.host.memory_files(), ["/srv/saves/dump", "/srv/saves/kdump"]);
    let params = |name: &str, value: &str| {
        argument(|w| {
            w.u32(2).string("file").u32(7).string(FILE).string(name).u32(7).string(value).u32(0);
        })
    };
    let zstd =
        client.call(SAVE_PARAMS, &[&v1[..], &params("image_format", "zstd")].concat()).await.unwrap_err();
    assert!(zstd.0 == Code::ConfigUnsupported as i32 && zstd.1.contains("image_format"), "{zstd:?}");
    let document = dump(&mut client, "v1", 2).await;
    client.call(SAVE_PARAMS, &[&v1[..], &params("dxml", &document)].concat()).await.unwrap();
    assert_eq!(client.state(&v1).await.0, 5);
    core(&mut client, "/srv/saves/x", MEMORY_ONLY).await.unwrap_err();
    restore(&mut client, FILE, None, 0).await.unwrap();
    core(&mut client, "/srv/saves/x", MEMORY_ONLY | 1).await.unwrap();
    assert_eq!(client.state(&v1).await, (5, 2), "ended by force");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_writes_memory_is_a_job() {
    let (server, mut client, v1) = running().await;
    let mut other = server.open("full", "qemu:///system").await;
    for (procedure, rest) in [(SAVE, words(&[FILE], None)), (MANAGED_SAVE, 0u32.to_be_bytes().to_vec())] {
        // The host does not come to its end before somebody ends it.
        let slow = if procedure == SAVE { "machine_memory_begin" } else { "guest_stop" };
        server.host.inject(slow, Fault::HangBefore);
        client.send(procedure, &[&v1[..], &rest].concat()).await;
        let end = Instant::now() + PATIENCE;
        while server.host.faults_left() > 0 || job(&mut other, &v1, 0).await.0 != 2 {
            assert!(Instant::now() < end, "it is a job, unbounded");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let info = other.call(JOB_INFO, &v1).await.unwrap();
        assert_eq!(Reader::new(&info).i32().unwrap(), 2);
        other.call(ABORT_JOB, &v1).await.unwrap();
        client.receive().await;
        assert_eq!(other.state(&v1).await.0, 1, "it goes on");
        assert_eq!(job(&mut other, &v1, 0).await.0, 0);
        assert_eq!(job(&mut other, &v1, 1).await.0, 5, "cancelled");
        assert_eq!(server.host.memory_files(), Vec::<String>::new());
    }
    assert!(other.call(ABORT_JOB, &v1).await.unwrap_err().1.contains("no job is active"));
    save(&mut client, &v1, FILE).await.unwrap();
    let (kind, all) = job(&mut other, &v1, 1).await;
    assert_eq!(kind, 3, "completed");
    for field in ["memory_total", "memory_processed", "memory_remaining", "success"] {
        assert!(String::from_utf8_lossy(&all).contains(field), "{field}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_have_no_such_files() {
    let server = Server::start().await;
    server.guest("c1", InstanceKind::Container, true).await;
    let mut client = server.open("full", "lxc:///system").await;
    let c1 = client.domain("c1").await;
    let flags = argument(|w| {
        w.string(FILE).optional(None).u32(0);
    });
    let refused = [
        client.call(SAVE_FLAGS, &[&c1[..], &flags].concat()).await,
        client.call(RESTORE_FLAGS, &flags).await,
        client.call(IMAGE_XML, &words(&[FILE], Some(0))).await,
        client.call(CORE_DUMP, &[&c1[..], &words(&[FILE], Some(MEMORY_ONLY))].concat()).await,
    ];
    for answer in refused {
        assert_eq!(answer.unwrap_err().0, Code::NoSupport as i32);
    }
}
