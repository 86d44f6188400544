//! Pools from their definition to its end, and what is refused on the way.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    host::{arguments, ask, number, string},
    support::{Client, Refused, Server},
};
use karst_engine::Context;
use karst_frontend_libvirt::{error::Code, frame::Kind, xdr::Reader};
use karst_model::{access::Principal, instance::InstanceKind};

async fn call(client: &mut Client, procedure: &str, pool: &[u8], rest: &[u8]) -> Result<Vec<u8>, Refused> {
    client.call(number(&format!("STORAGE_POOL_{procedure}")), &[pool, rest].concat()).await
}

/// With flags that say nothing.
async fn plain(client: &mut Client, procedure: &str, pool: &[u8]) -> Result<Vec<u8>, Refused> {
    call(client, procedure, pool, &[0; 4]).await
}

async fn define(client: &mut Client, xml: &str) -> Result<Vec<u8>, Refused> {
    client.call(number("STORAGE_POOL_DEFINE_XML"), &arguments(|w| w.string(xml).u32(0))).await
}

async fn named(client: &mut Client, flags: u32) -> Vec<String> {
    let listed = ask(client, "CONNECT_LIST_ALL_STORAGE_POOLS", |w| w.i32(1).u32(flags)).await.unwrap();
    let mut r = Reader::new(&listed);
    r.array(100, |r| Ok((r.string()?, r.uuid()?))).unwrap().into_iter().map(|(name, _)| name).collect()
}

/// Is it active, persistent, and does it begin with its host?
async fn is(client: &mut Client, pool: &[u8]) -> [bool; 3] {
    let mut found = [false; 3];
    for (n, procedure) in ["IS_ACTIVE", "IS_PERSISTENT", "GET_AUTOSTART"].into_iter().enumerate() {
        let answer = call(client, procedure, pool, &[]).await.unwrap();
        found[n] = Reader::new(&answer).i32().unwrap() == 1;
    }
    found
}

async fn volume(client: &mut Client, pool: &[u8], name: &str) -> Result<Vec<u8>, Refused> {
    let xml = format!("<volume><name>{name}</name><capacity unit='MiB'>4</capacity></volume>");
    client
        .call(number("STORAGE_VOL_CREATE_XML"), &[pool, &arguments(|w| w.string(&xml).u32(0))].concat())
        .await
}

fn refused<T: std::fmt::Debug>(outcome: Result<T, Refused>, code: Code, word: &str) {
    let (number, text) = outcome.unwrap_err();
    assert!(number == code as i32 && text.contains(word), "{number}: {text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_is_defined_built_started_stopped_deleted_and_undefined() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let mut listener = server.open("ro", "qemu:///system").await;
    let register = "CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY";
    ask(&mut listener, register, |w| w.i32(0).u32(0)).await.unwrap();
    let invalid = Code::OperationInvalid;

    let xml = "<pool type='dir'><name>p1</name><uuid>7aa2e9e5-c8b7-4e4f-a1b5-1e1a3ab1c111</uuid></pool>";
    let pool = define(&mut client, xml).await.unwrap();
    assert_eq!(is(&mut client, &pool).await, [false, true, false]);
    assert_eq!(define(&mut client, xml).await.unwrap(), pool, "its own document changes nothing");
    let other = xml.replace("<name>p1<", "<name>p2<");
    refused(define(&mut client, &other).await, Code::OperationFailed, "already defined with uuid 7aa2e9e5");
    let nameless = "<pool type='dir'><name>p1</name></pool>";
    refused(define(&mut client, nameless).await, Code::OperationFailed, "already exists with uuid 7aa2e9e5");
    for (procedure, word) in [("DESTROY", "is not active"), ("LIST_VOLUMES", "is not active")] {
        let rest: &[u8] = if procedure == "DESTROY" { &[] } else { &[0, 0, 0, 9] };
        refused(call(&mut client, procedure, &pool, rest).await, invalid, word);
    }
    refused(volume(&mut client, &pool, "v1").await, invalid, "'p1' is not active");
    refused(plain(&mut client, "REFRESH", &pool).await, invalid, "is not active");
    refused(plain(&mut client, "DELETE", &pool).await, invalid, "not built");
    // State, and no space.
    let info = call(&mut client, "GET_INFO", &pool, &[]).await.unwrap();
    assert_eq!(info, [0; 28]);
    let shown = string(&plain(&mut client, "GET_XML_DESC", &pool).await.unwrap());
    assert!(shown.contains("<capacity unit='bytes'>0</capacity>"), "{shown}");

    plain(&mut client, "BUILD", &pool).await.unwrap();
    plain(&mut client, "BUILD", &pool).await.expect("as a directory that is there");
    plain(&mut client, "CREATE", &pool).await.unwrap();
    assert_eq!(is(&mut client, &pool).await, [true, true, false]);
    refused(plain(&mut client, "CREATE", &pool).await, invalid, "'p1' is already active");
    refused(plain(&mut client, "BUILD", &pool).await, invalid, "'p1' is already active");
    refused(plain(&mut client, "DELETE", &pool).await, invalid, "'p1' is still active");
    refused(call(&mut client, "UNDEFINE", &pool, &[]).await, invalid, "'p1' is still active");
    call(&mut client, "SET_AUTOSTART", &pool, &[0, 0, 0, 1]).await.unwrap();
    assert_eq!(is(&mut client, &pool).await, [true, true, true]);
    call(&mut client, "SET_AUTOSTART", &pool, &[0; 4]).await.unwrap();

    let v1 = volume(&mut client, &pool, "v1").await.unwrap();
    assert_eq!(
        [named(&mut client, 0x1).await, named(&mut client, 0x20).await, named(&mut client, 0x2 | 0x10).await],
        [vec![], vec!["p1".to_owned()], vec!["default".to_owned()]]
    );
    assert_eq!(named(&mut client, 1 << 6).await.len(), 2, "of the kind dir");
    assert!(named(&mut client, 1 << 9).await.is_empty(), "of the kind logical");
    call(&mut client, "DESTROY", &pool, &[]).await.unwrap();
    assert_eq!(named(&mut client, 0x1).await, ["p1"]);
    let gone = client.call(number("STORAGE_VOL_GET_INFO"), &v1).await;
    refused(gone, invalid, "'p1' is not active");
    refused(plain(&mut client, "DELETE", &pool).await, invalid, "\"v1\"");

    // Its definition goes; what is in it comes back with the next.
    call(&mut client, "UNDEFINE", &pool, &[]).await.unwrap();
    refused(call(&mut client, "IS_ACTIVE", &pool, &[]).await, Code::NoStoragePool, "no storage pool");
    assert_eq!(define(&mut client, nameless).await.unwrap(), pool, "the same name is the same pool");
    plain(&mut client, "CREATE", &pool).await.unwrap();
    client.call(number("STORAGE_VOL_GET_INFO"), &v1).await.expect("with its volume");
    client.call(number("STORAGE_VOL_DELETE"), &[&v1[..], &[0; 4]].concat()).await.unwrap();
    call(&mut client, "DESTROY", &pool, &[]).await.unwrap();
    plain(&mut client, "DELETE", &pool).await.unwrap();
    call(&mut client, "UNDEFINE", &pool, &[]).await.unwrap();

    // Defined, updated twice, created, started, stopped; then without what was not done again.
    let wanted = [0, 4, 2, 0, 0, 3, 1, 0, 2, 3, 5, 1];
    let mut happened = vec![];
    while happened.len() < wanted.len() {
        let frame = listener.receive().await;
        assert_eq!((frame.header.kind, frame.header.procedure), (Kind::Message, 370));
        // A number of the callback, then the pool.
        happened.push(Reader::new(&frame.payload[4 + pool.len()..]).i32().unwrap());
    }
    assert_eq!(happened, wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transient_pool_ends_with_its_stop() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let create = number("STORAGE_POOL_CREATE_XML");
    let document = |xml: &str| arguments(|w| w.string(xml).u32(0));
    let pool = client.call(create, &document("<pool type='dir'><name>p1</name></pool>")).await.unwrap();
    assert_eq!(is(&mut client, &pool).await, [true, false, false]);
    assert_eq!(named(&mut client, 0x8).await, ["p1"]);
    let autostart = call(&mut client, "SET_AUTOSTART", &pool, &[0, 0, 0, 1]).await;
    refused(autostart, Code::InvalidArg, "pool has no config file");
    let own = string(&plain(&mut client, "GET_XML_DESC", &pool).await.unwrap());
    refused(client.call(create, &document(&own)).await, Code::OperationInvalid, "already active as 'p1'");
    volume(&mut client, &pool, "v1").await.unwrap();
    call(&mut client, "DESTROY", &pool, &[]).await.unwrap();
    assert_eq!(named(&mut client, 0).await, ["default"]);
    assert!(!server.engine.inner().inventory.read().volumes.values().any(|v| v.name == "v1"));
    // One whose start fails is not there afterwards.
    server.host.inject(
        "pool_ensure",
        karst_agent::Fault::FailBefore(karst_model::Error::unavailable("its disk is away")),
    );
    let failed = client.call(create, &document("<pool type='dir'><name>p2</name></pool>")).await;
    assert!(failed.unwrap_err().1.contains("its disk is away"));
    assert_eq!(named(&mut client, 0).await, ["default"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_from_a_pool_keeps_it() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let pool = ask(&mut client, "STORAGE_POOL_LOOKUP_BY_NAME", |w| w.string("default")).await.unwrap();
    let invalid = Code::OperationInvalid;
    refused(call(&mut client, "DESTROY", &pool, &[]).await, invalid, "instance \"v1\", which runs");
    let v1 = client.domain("v1").await;
    client.call(number("DOMAIN_DESTROY"), &v1).await.unwrap();
    call(&mut client, "DESTROY", &pool, &[]).await.unwrap();
    refused(client.call(number("DOMAIN_CREATE"), &v1).await, invalid, "\"default\" is not active");
    refused(call(&mut client, "UNDEFINE", &pool, &[]).await, invalid, "used by instance \"v1\"");
    // As others see it.
    let admin = Context::new(Principal::system());
    let refused_there = server.engine.pool_usage(&admin, "default").await.unwrap_err();
    assert!(refused_there.message.contains("not active"), "{refused_there}");
    plain(&mut client, "CREATE", &pool).await.unwrap();
    client.call(number("DOMAIN_CREATE"), &v1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_of_the_host_are_found() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let mut find = async |kind: &str| {
        ask(&mut client, "CONNECT_FIND_STORAGE_POOL_SOURCES", |w| w.string(kind).u32(0).u32(0)).await
    };
    let found = string(&find("logical").await.unwrap());
    assert!(found.contains("<device path='/dev/sdb'/>") && found.contains("<name>vg0</name>"), "{found}");
    assert!(!string(&find("zfs").await.unwrap()).contains("<source>"));
    for kind in ["netfs", "iscsi", "scsi", "dir"] {
        assert_eq!(find(kind).await, Err(Code::NoSupport as i32), "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_neither_shrink_nor_get_patterns() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let pool = ask(&mut client, "STORAGE_POOL_LOOKUP_BY_NAME", |w| w.string("default")).await.unwrap();
    let v1 = volume(&mut client, &pool, "v1").await.unwrap();
    let mut resize = async |to: u64, flags: u32| {
        let rest = arguments(|w| w.u64(to).u32(flags));
        client.call(number("STORAGE_VOL_RESIZE"), &[&v1[..], &rest].concat()).await
    };
    refused(resize(1 << 20, 0).await, Code::InvalidArg, "unless shrink flag explicitly specified");
    refused(resize(1 << 20, 4).await, Code::OperationUnsupported, "cannot shrink");
    refused(resize(1 << 20, 2 | 4).await, Code::OperationUnsupported, "cannot shrink");
    resize(1 << 20, 2).await.unwrap();
    let info = client.call(number("STORAGE_VOL_GET_INFO"), &v1).await.unwrap();
    let mut r = Reader::new(&info);
    r.i32().unwrap();
    assert_eq!(r.u64().unwrap(), 5 << 20);
    for (algorithm, code) in [(8, Code::OperationUnsupported), (10, Code::InvalidArg)] {
        let rest = arguments(|w| w.u32(algorithm).u32(0));
        let wiped = client.call(number("STORAGE_VOL_WIPE_PATTERN"), &[&v1[..], &rest].concat()).await;
        refused(wiped, code, "");
    }
}

/// What lies over another in libvirt begins as a copy of it here, and is another's no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_over_another_begins_as_it() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let pool = ask(&mut client, "STORAGE_POOL_LOOKUP_BY_NAME", |w| w.string("default")).await.unwrap();
    let base = volume(&mut client, &pool, "base").await.unwrap();
    let make = async |client: &mut Client, inner: &str, path: &str| {
        let xml = format!("<volume>{inner}<backingStore><path>{path}</path></backingStore></volume>");
        let document = arguments(|w| w.string(&xml).u32(0));
        client.call(number("STORAGE_VOL_CREATE_XML"), &[&pool[..], &document].concat()).await
    };
    let size = async |client: &mut Client, volume: &[u8]| {
        let info = client.call(number("STORAGE_VOL_GET_INFO"), volume).await.unwrap();
        let mut r = Reader::new(&info);
        r.i32().unwrap();
        r.u64().unwrap()
    };
    let path = "/karst/default/base";
    let larger = "<name>v1</name><capacity unit='MiB'>8</capacity><target><format type='qcow2'/></target>";
    let v1 = make(&mut client, larger, path).await.unwrap();
    assert_eq!(size(&mut client, &v1).await, 8 << 20);
    let v2 = make(&mut client, "<name>v2</name>", path).await.unwrap();
    assert_eq!(size(&mut client, &v2).await, 4 << 20);
    refused(make(&mut client, larger, path).await, Code::StorageVolExist, "'v1' exists already");
    refused(make(&mut client, "<name>v3</name>", "/karst/default/none").await, Code::NoStorageVol, "none");
    // The other goes as it likes.
    client.call(number("STORAGE_VOL_DELETE"), &[&base[..], &[0; 4]].concat()).await.unwrap();
    assert_eq!(size(&mut client, &v1).await, 8 << 20);
}
