//! Block jobs by libvirt's protocol: a disk is copied, its machine goes on from the copy or not, and listeners hear of it.
#![allow(clippy::disallowed_methods)] // a test

use crate::support::{Client, PATIENCE, Refused, Server, argument};
use karst_engine::{Context, storage::CreatePool};
use karst_frontend_libvirt::{
    error::Code,
    frame::Kind,
    xdr::{Reader, Typed},
};
use karst_model::{access::Principal, instance::InstanceKind};
use std::time::{Duration, Instant};

const ABORT: i32 = 237;
const INFO: i32 = 238;
const SET_SPEED: i32 = 239;
const REBASE: i32 = 266;
const COPY: i32 = 345;

fn admin() -> Context {
    Context::new(Principal::system())
}

async fn copy(
    client: &mut Client,
    domain: &[u8],
    xml: &str,
    parameters: &[(&str, Typed)],
    flags: u32,
) -> Result<(), Refused> {
    let said = argument(|w| {
        w.string("sda").string(xml).u32(parameters.len() as u32);
        for (field, value) in parameters {
            w.typed(field, value);
        }
        w.u32(flags);
    });
    client.call(COPY, &[domain, &said].concat()).await.map(drop)
}

fn volume(pool: &str, name: &str) -> String {
    format!("<disk type='volume'><source pool='{pool}' volume='{name}'/><driver type='raw'/></disk>")
}

async fn rebase(client: &mut Client, domain: &[u8], base: &str, flags: u32) -> Result<(), Refused> {
    let said = argument(|w| {
        w.string("sda").optional(Some(base)).u64(0).u32(flags);
    });
    client.call(REBASE, &[domain, &said].concat()).await.map(drop)
}

async fn abort(client: &mut Client, domain: &[u8], flags: u32) -> Result<(), Refused> {
    let said = argument(|w| {
        w.string("sda").u32(flags);
    });
    client.call(ABORT, &[domain, &said].concat()).await.map(drop)
}

/// Found, kind, bandwidth, how far, and the end.
async fn info(client: &mut Client, domain: &[u8], flags: u32) -> (i32, i32, u64, u64, u64) {
    let said = argument(|w| {
        w.string("sda").u32(flags);
    });
    let answer = client.call(INFO, &[domain, &said].concat()).await.unwrap();
    let mut r = Reader::new(&answer);
    let all = (r.i32().unwrap(), r.i32().unwrap(), r.u64().unwrap(), r.u64().unwrap(), r.u64().unwrap());
    r.end().unwrap();
    all
}

async fn until_ready(client: &mut Client, domain: &[u8]) {
    let end = Instant::now() + PATIENCE;
    loop {
        let (found, kind, _, now, whole) = info(client, domain, 0).await;
        assert_eq!((found, kind), (1, 2));
        if now == whole {
            return;
        }
        assert!(Instant::now() < end, "{now} of {whole}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The next event of a block job: procedure, disk, status.
async fn event(listener: &mut Client) -> (i32, String, i32) {
    let frame = listener.receive().await;
    assert_eq!(frame.header.kind, Kind::Message);
    let mut r = Reader::new(&frame.payload);
    r.i32().unwrap();
    assert_eq!(r.string().unwrap(), "v1");
    r.uuid().unwrap();
    assert!(r.i32().unwrap() > 0, "it runs");
    let disk = r.string().unwrap();
    assert_eq!(r.i32().unwrap(), 2, "a copy");
    let status = r.i32().unwrap();
    r.end().unwrap();
    (frame.header.procedure, disk, status)
}

/// What both callbacks hear next.
async fn told(listener: &mut Client, path: &str, status: i32) {
    let mut heard = vec![event(listener).await, event(listener).await];
    heard.sort();
    assert_eq!(heard, [(326, path.to_owned(), status), (339, "sda".to_owned(), status)]);
}

const COMPLETED: i32 = 0;
const CANCELED: i32 = 2;
const READY: i32 = 3;

async fn ready() -> (Server, Client, Client, Vec<u8>) {
    let server = Server::start().await;
    let pool = CreatePool { name: "p2".into(), driver: "dir".into(), ..Default::default() };
    let made = server.engine.pool_create(&admin(), pool).await.unwrap();
    assert_eq!(made.ended().await.error, None);
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let domain = client.domain("v1").await;
    let mut listener = server.open("ro", "qemu:///system").await;
    for id in [8, 16] {
        let said = argument(|w| {
            w.i32(id).u32(0);
        });
        listener.call(316, &said).await.unwrap();
    }
    (server, client, listener, domain)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_is_copied_and_its_machine_goes_on_from_the_copy() {
    let (server, mut client, mut listener, v1) = ready().await;
    assert_eq!(info(&mut client, &v1, 0).await, (0, 0, 0, 0, 0));
    // The instance's own name in another pool: it moves there.
    copy(&mut client, &v1, &volume("p2", "instances/v1"), &[], 4).await.unwrap();
    assert_eq!(info(&mut client, &v1, 0).await.0, 1);
    until_ready(&mut client, &v1).await;
    told(&mut listener, "/karst/default/instances/v1", READY).await;
    let again = copy(&mut client, &v1, &volume("p2", "other"), &[], 0).await.unwrap_err();
    assert_eq!(again.0, Code::BlockCopyActive as i32, "{again:?}");
    abort(&mut client, &v1, 2).await.unwrap();
    told(&mut listener, "/karst/p2/instances/v1", COMPLETED).await;
    assert_eq!(info(&mut client, &v1, 0).await.0, 0);
    let view = server.engine.instance(&admin(), "default", "v1").unwrap();
    assert_eq!(view.pool, "p2");
    let path = argument(|w| {
        w.string("/karst/p2/instances/v1");
    });
    client.call(97, &path).await.expect("the volume is there");
    let old = argument(|w| {
        w.string("/karst/default/instances/v1");
    });
    assert_eq!(client.call(97, &old).await.unwrap_err().0, Code::NoStorageVol as i32);

    // By the older call, by a path, and left as the disk is.
    rebase(&mut client, &v1, "/karst/default/left", 8 | 4).await.unwrap();
    until_ready(&mut client, &v1).await;
    told(&mut listener, "/karst/p2/instances/v1", READY).await;
    let stays = abort(&mut client, &v1, 2).await.unwrap_err();
    assert_eq!(stays.0, Code::ConfigUnsupported as i32, "{stays:?}");
    assert!(stays.1.contains("another pool"), "{stays:?}");
    abort(&mut client, &v1, 0).await.unwrap();
    told(&mut listener, "/karst/p2/instances/v1", COMPLETED).await;
    let left = argument(|w| {
        w.string("/karst/default/left");
    });
    client.call(97, &left).await.expect("it is left");

    // Into what is there, slowly, and then not.
    let limit = [("bandwidth", Typed::Ullong(1 << 20)), ("granularity", Typed::Uint(0))];
    copy(&mut client, &v1, &volume("default", "left"), &limit, 2 | 8).await.unwrap();
    let early = abort(&mut client, &v1, 2).await.unwrap_err();
    assert_eq!(early.0, Code::BlockCopyActive as i32, "{early:?}");
    assert!(early.1.contains("not ready for pivot yet"), "{early:?}");
    let end = Instant::now() + PATIENCE;
    while info(&mut client, &v1, 1).await.2 != 1 << 20 {
        assert!(Instant::now() < end, "it begins");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let faster = argument(|w| {
        w.string("sda").u64(5).u32(0);
    });
    client.call(SET_SPEED, &[&v1[..], &faster].concat()).await.unwrap();
    let (found, _, bandwidth, now, whole) = info(&mut client, &v1, 0).await;
    assert!((found, bandwidth) == (1, 5) && now < whole, "{now} of {whole}");
    // Not waited for: the event says that it is over.
    abort(&mut client, &v1, 1).await.unwrap();
    told(&mut listener, "/karst/p2/instances/v1", CANCELED).await;
    client.call(97, &left).await.expect("what was there before stays");
}

/// The end of a disk that is to be encrypted.
const ENCRYPTION: &str =
    "<encryption format='luks'><secret type='passphrase' usage='a'/></encryption></disk>";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_there_is_none_of_says_why() {
    let (server, mut client, _listener, v1) = ready().await;
    let file = |path: &str| format!("<disk type='file'><source file='{path}'/></disk>");
    let unsupported = Code::ConfigUnsupported;
    let good = volume("p2", "x");
    for (xml, parameters, flags, code, word) in [
        (file("/tmp/copy.img"), vec![], 0, unsupported, "/karst/POOL/NAME"),
        ("<disk type='network'><source protocol='nbd'/></disk>".to_owned(), vec![], 0, unsupported, "type"),
        (good.replace("raw", "qcow2"), vec![], 0, unsupported, "qcow2"),
        (good.replace("</disk>", ENCRYPTION), vec![], 0, unsupported, "encryption"),
        (good.clone(), vec![], 1, unsupported, "chain"),
        (good.clone(), vec![("granularity", Typed::Uint(65536))], 0, unsupported, "granularity"),
        (good.clone(), vec![("nonsense", Typed::Uint(1))], 0, Code::InvalidArg, "nonsense"),
        (good.clone(), vec![("bandwidth", Typed::Ullong(u64::MAX))], 0, Code::InvalidArg, "bandwidth"),
        (good.clone(), vec![], 16, Code::InvalidArg, "flags"),
        (good.clone(), vec![], 2, Code::OperationFailed, "missing"),
        (volume("default", "instances/v1"), vec![], 0, unsupported, "already exists"),
        (volume("nope", "x"), vec![], 0, Code::NoStoragePool, "nope"),
        ("<domain/>".to_owned(), vec![], 0, Code::XmlError, "domain"),
        ("<disk".to_owned(), vec![], 0, Code::XmlError, ""),
    ] {
        let refused = copy(&mut client, &v1, &xml, &parameters, flags).await.unwrap_err();
        assert!(refused.0 == code as i32 && refused.1.contains(word), "{xml} {flags}: {refused:?}");
    }
    for (base, flags, code) in [
        ("/karst/p2/x", 0, Code::InvalidArg),
        ("/karst/p2/x", 8 | 1, unsupported),
        ("/tmp/x", 8, unsupported),
        ("/karst/p2/x", 128, Code::InvalidArg),
    ] {
        let refused = rebase(&mut client, &v1, base, flags).await.unwrap_err();
        assert_eq!(refused.0, code as i32, "{base} {flags}: {refused:?}");
    }
    // Without a job, of another disk, of what does not run, of containers, and by who only reads.
    assert_eq!(abort(&mut client, &v1, 0).await.unwrap_err().0, Code::OperationInvalid as i32);
    let speed = argument(|w| {
        w.string("sda").u64(1).u32(0);
    });
    let refused = client.call(SET_SPEED, &[&v1[..], &speed].concat()).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationInvalid as i32);
    let other = argument(|w| {
        w.string("vdz").u32(0);
    });
    let refused = client.call(INFO, &[&v1[..], &other].concat()).await.unwrap_err();
    assert_eq!(refused.0, Code::InvalidArg as i32);
    server.guest("off", InstanceKind::VirtualMachine, false).await;
    let off = client.domain("off").await;
    let refused = copy(&mut client, &off, &good, &[], 0).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationInvalid as i32);
    let mut reader = server.open("ro", "qemu:///system").await;
    assert_eq!(info(&mut reader, &v1, 0).await.0, 0);
    let refused = copy(&mut reader, &v1, &good, &[], 0).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationDenied as i32);
    server.guest("c1", InstanceKind::Container, true).await;
    let mut lxc = server.open("full", "lxc:///system").await;
    let c1 = lxc.domain("c1").await;
    assert_eq!(copy(&mut lxc, &c1, &good, &[], 0).await.unwrap_err().0, Code::NoSupport as i32);
    // None of it has left anything.
    let names: Vec<String> =
        server.engine.volumes(&admin(), "p2", None).unwrap().iter().map(|v| v.name.clone()).collect();
    assert_eq!(names, Vec::<String>::new());
    // A copy does not keep a machine from being ended.
    let slow = [("bandwidth", Typed::Ullong(1))];
    copy(&mut client, &v1, &good, &slow, 0).await.unwrap();
    client.call(12, &v1).await.unwrap();
    assert!(server.engine.volumes(&admin(), "p2", None).unwrap().is_empty());
}
