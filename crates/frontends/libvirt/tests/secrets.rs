//! Secrets over the protocol: defined, listed, given and refused; events; and who may not.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    host::{arguments, ask, number, string},
    support::{Client, Server},
};
use karst_engine::secrets::SecretKey;
use karst_frontend_libvirt::{error::Code, frame::Kind, xdr::Reader};
use karst_model::secret::VALUE_MAX;
use uuid::Uuid;

const VALUE: &[u8] = b"open\0sesame";

async fn server() -> Server {
    let server = Server::start().await;
    server.engine.set_secret_key(SecretKey::new(&[7; 32]).unwrap());
    server
}

async fn define(client: &mut Client, xml: &str) -> Result<Vec<u8>, i32> {
    ask(client, "SECRET_DEFINE_XML", |w| w.string(xml).u32(0)).await
}

fn document(n: u128, flags: &str, usage: &str) -> String {
    format!(
        "<secret {flags}><uuid>{}</uuid><usage type='volume'><volume>{usage}</volume></usage></secret>",
        Uuid::from_u128(n)
    )
}

async fn set(client: &mut Client, secret: &[u8], value: &[u8]) -> Result<Vec<u8>, i32> {
    let rest = arguments(|w| w.opaque(value).u32(0));
    client.call(number("SECRET_SET_VALUE"), &[secret, &rest].concat()).await.map_err(|e| e.0)
}

async fn get(client: &mut Client, secret: &[u8]) -> Result<Vec<u8>, i32> {
    let answer = client.call(number("SECRET_GET_VALUE"), &[secret, &[0; 4]].concat()).await;
    answer.map(|p| Reader::new(&p).opaque(VALUE_MAX).unwrap().to_vec()).map_err(|e| e.0)
}

async fn listed(client: &mut Client, flags: u32) -> Vec<u128> {
    let payload = ask(client, "CONNECT_LIST_ALL_SECRETS", |w| w.i32(1).u32(flags)).await.unwrap();
    let mut r = Reader::new(&payload);
    let all = r.array(100, |r| Ok((r.uuid()?, r.i32()?, r.string()?))).unwrap();
    assert_eq!(r.u32().unwrap() as usize, all.len());
    all.into_iter().map(|s| s.0.as_u128()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_kept_listed_and_given_to_who_may() {
    let server = server().await;
    let mut client = server.open("full", "qemu:///system").await;
    let open = define(&mut client, &document(1, "", "/a")).await.unwrap();
    let private = define(&mut client, &document(2, "private='yes'", "/b")).await.unwrap();
    let ephemeral = define(&mut client, &document(3, "ephemeral='yes'", "/of-memory")).await.unwrap();
    define(&mut client, &document(4, "ephemeral='yes' private='yes'", "/d")).await.unwrap();
    for (flags, wanted) in [
        (0, &[1, 2, 3, 4][..]),
        (1, &[3, 4]),
        (2, &[1, 2]),
        (4, &[2, 4]),
        (8, &[1, 3]),
        (1 | 4, &[4]),
        (1 | 2 | 8, &[1, 3]),
    ] {
        assert_eq!(listed(&mut client, flags).await, wanted, "{flags}");
    }
    assert_eq!(
        ask(&mut client, "CONNECT_LIST_ALL_SECRETS", |w| w.i32(1).u32(16)).await,
        Err(Code::InvalidArg as i32)
    );
    let count = ask(&mut client, "CONNECT_NUM_OF_SECRETS", |w| w).await.unwrap();
    assert_eq!(count, [0, 0, 0, 4]);
    let uuids = ask(&mut client, "CONNECT_LIST_SECRETS", |w| w.i32(2)).await.unwrap();
    assert_eq!(Reader::new(&uuids).array(9, |r| r.string()).unwrap()[1], Uuid::from_u128(2).to_string());
    // Values: none yet, then those that were set; a private one's stays here.
    assert_eq!(get(&mut client, &open).await, Err(Code::NoSecret as i32));
    for secret in [&open, &private, &ephemeral] {
        set(&mut client, secret, VALUE).await.unwrap();
    }
    assert_eq!(get(&mut client, &open).await.unwrap(), VALUE);
    assert_eq!(get(&mut client, &ephemeral).await.unwrap(), VALUE);
    assert_eq!(get(&mut client, &private).await, Err(Code::InvalidSecret as i32));
    assert_eq!(set(&mut client, &open, &vec![1; VALUE_MAX]).await, Ok(vec![]));
    assert_eq!(get(&mut client, &open).await.unwrap().len(), VALUE_MAX);
    assert_eq!(set(&mut client, &open, &vec![1; VALUE_MAX + 1]).await, Err(Code::Rpc as i32));
    // Found by what they are for, and described without their values.
    let by_use = ask(&mut client, "SECRET_LOOKUP_BY_USAGE", |w| w.i32(1).string("/b")).await.unwrap();
    assert_eq!(by_use, private);
    let by_uuid = ask(&mut client, "SECRET_LOOKUP_BY_UUID", |w| w.uuid(Uuid::from_u128(3))).await.unwrap();
    assert_eq!(by_uuid, ephemeral);
    let gone = ask(&mut client, "SECRET_LOOKUP_BY_USAGE", |w| w.i32(2).string("/b")).await;
    assert_eq!(gone, Err(Code::NoSecret as i32));
    let xml = client.call(number("SECRET_GET_XML_DESC"), &[&private[..], &[0; 4]].concat()).await.unwrap();
    assert!(string(&xml).contains("<secret ephemeral='no' private='yes'>"), "{}", string(&xml));
    // What is fixed, and what is taken.
    for bad in [
        document(2, "", "/b"),
        document(1, "", "/other"),
        document(9, "", "/a"),
        document(9, "", "/of-memory"),
    ] {
        assert_eq!(define(&mut client, &bad).await, Err(Code::OperationInvalid as i32), "{bad}");
    }
    let nfs = "<secret><usage type='nfs'/></secret>";
    assert_eq!(define(&mut client, nfs).await, Err(Code::ConfigUnsupported as i32));
    // Its value stays when it is defined anew, also when it moves into memory and back.
    for flags in ["", "ephemeral='yes'", ""] {
        define(&mut client, &document(1, flags, "/a")).await.unwrap();
        assert_eq!(get(&mut client, &open).await.unwrap().len(), VALUE_MAX, "{flags}");
        let written = server.engine.inner().inventory.read().secrets.values().any(|s| s.usage == "/a");
        assert_eq!(written, flags.is_empty());
    }
    // Nothing of it can be read in the records, and nothing of an ephemeral one is there.
    {
        let records = server.engine.inner().inventory.read();
        assert_eq!(records.secrets.len(), 2);
        let shown = format!("{records:?}");
        assert!(!shown.contains("/of-memory") && !shown.contains("sesame"));
    }
    client.call(number("SECRET_UNDEFINE"), &open).await.unwrap();
    client.call(number("SECRET_UNDEFINE"), &ephemeral).await.unwrap();
    assert_eq!(client.call(number("SECRET_UNDEFINE"), &open).await.unwrap_err().0, Code::NoSecret as i32);
    assert_eq!(listed(&mut client, 0).await, [2, 4]);
    define(&mut client, &document(9, "", "/a")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_only_reads_gets_no_value() {
    let server = server().await;
    let mut client = server.open("full", "qemu:///system").await;
    let secret = define(&mut client, &document(1, "", "/a")).await.unwrap();
    set(&mut client, &secret, VALUE).await.unwrap();
    let mut reader = server.open("ro", "qemu:///system").await;
    assert_eq!(listed(&mut reader, 0).await, [1]);
    let denied = Err(Code::OperationDenied as i32);
    assert_eq!(get(&mut reader, &secret).await, denied);
    assert_eq!(set(&mut reader, &secret, b"x").await, denied);
    assert_eq!(define(&mut reader, &document(2, "", "/b")).await, denied);
    let gone = reader.call(number("SECRET_UNDEFINE"), &secret).await;
    assert_eq!(gone.unwrap_err().0, Code::OperationDenied as i32);
    assert_eq!(get(&mut client, &secret).await.unwrap(), VALUE);
    // Secrets are a project's; without a key there is nothing to seal with.
    let keyless = Server::start().await;
    let mut client = keyless.open("full", "qemu:///system").await;
    let secret = define(&mut client, &document(1, "", "/a")).await.unwrap();
    assert_eq!(set(&mut client, &secret, VALUE).await, Err(Code::OperationFailed as i32));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_tell_what_becomes_of_secrets() {
    let server = server().await;
    let mut client = server.open("full", "qemu:///system").await;
    let mut listener = server.open("ro", "qemu:///system").await;
    let register = "CONNECT_SECRET_EVENT_REGISTER_ANY";
    let life = ask(&mut listener, register, |w| w.i32(0).u32(0)).await.unwrap();
    let values = ask(&mut listener, register, |w| w.i32(1).u32(0)).await.unwrap();
    assert_eq!(ask(&mut listener, register, |w| w.i32(2).u32(0)).await, Err(Code::InvalidArg as i32));
    let mut hears = async |procedure: i32, parts: &[&[u8]]| {
        let frame = listener.receive().await;
        assert_eq!((frame.header.kind, frame.header.procedure), (Kind::Message, procedure));
        assert_eq!(frame.payload, parts.concat());
    };
    for flags in ["", "ephemeral='yes'"] {
        let secret = define(&mut client, &document(1, flags, "/a")).await.unwrap();
        hears(382, &[&life, &secret, &[0; 8]]).await;
        set(&mut client, &secret, VALUE).await.unwrap();
        hears(383, &[&values, &secret]).await;
        client.call(number("SECRET_UNDEFINE"), &secret).await.unwrap();
        hears(382, &[&life, &secret, &[0, 0, 0, 1, 0, 0, 0, 0]]).await;
    }
    let deregister = number("CONNECT_SECRET_EVENT_DEREGISTER_ANY");
    listener.call(deregister, &values).await.unwrap();
    assert_eq!(listener.call(deregister, &values).await.unwrap_err().0, Code::InvalidArg as i32);
}
