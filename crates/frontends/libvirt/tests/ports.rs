//! Serial ports, consoles and channels: what documents say of them, what becomes of it, and who attaches.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    host::{arguments, number, string},
    support::{Client, PATIENCE, Server},
};
use karst_engine::Context;
use karst_frontend_libvirt::{
    error::Code,
    frame::{Frame, Header, Kind, REMOTE, Status},
    xdr::Reader,
};
use karst_model::access::Principal;
use tokio::io::AsyncWriteExt;

const PORTS: &str = "<serial type='pty'><target port='0'/></serial><serial type='pty'><target port='1'/></serial>\
    <serial type='tcp'><source mode='bind' host='127.0.0.1' service='4555'/><protocol type='raw'/><target port='2'/></serial>\
    <console type='pty'><target type='serial' port='0'/></console><console type='pty'><target type='virtio' port='1'/></console>\
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
    <channel type='pty'><target type='virtio' name='org.example.0'/></channel>";

async fn define(client: &mut Client, ports: &str) -> Result<Vec<u8>, (i32, String)> {
    let xml = format!(
        "<domain type='qemu'><name>d1</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid><memory>65536</memory>\
         <os><type machine='q35'>hvm</type></os><devices>{ports}</devices></domain>"
    );
    client.call(number("DOMAIN_DEFINE_XML"), &arguments(|w| w.string(&xml))).await
}

async fn document(client: &mut Client, domain: &[u8], flags: u32) -> String {
    let payload = [domain, &flags.to_be_bytes()].concat();
    string(&client.call(number("DOMAIN_GET_XML_DESC"), &payload).await.unwrap())
}

/// Opens a console, says a word there, and demands it back; then it ends.
async fn answers(server: &Server, domain: &[u8], device: Option<&str>, word: &str) {
    let mut client = server.open("full", "qemu:///system").await;
    let procedure = number("DOMAIN_OPEN_CONSOLE");
    // Who was there before may not be gone yet.
    let payload = [domain, &arguments(|w| w.optional(device).u32(1))].concat();
    let serial = client.send(procedure, &payload).await;
    let answer = client.receive().await;
    let said = Reader::new(&answer.payload).i32();
    assert_eq!(answer.header.status, Status::Ok, "{device:?}: {said:?}");
    let header = Header {
        program: REMOTE,
        version: 1,
        procedure,
        kind: Kind::Stream,
        serial,
        status: Status::Continue,
    };
    client.stream.write_all(&Frame::new(header, word.as_bytes().to_vec()).encode()).await.unwrap();
    let mut back = vec![];
    let told = async {
        while !String::from_utf8_lossy(&back).contains(word) {
            let frame = client.receive().await;
            assert_eq!((frame.header.kind, frame.header.status), (Kind::Stream, Status::Continue));
            back.extend_from_slice(&frame.payload);
        }
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_become_devices_that_clients_attach_to() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let d1 = define(&mut client, PORTS).await.unwrap();
    let admin = Context::new(Principal::system());
    let devices = || {
        let view = server.engine.instance(&admin, "default", "d1").unwrap();
        let ports = view.instance.devices.iter().filter(|(_, keys)| keys["type"] == "port");
        ports.map(|(name, keys)| format!("{name} {}", keys["to"])).collect::<Vec<_>>()
    };
    let wanted = ["channel0 stream", "console1 stream", "serial1 stream", "serial2 tcp"];
    assert_eq!(devices(), wanted);
    let shown = document(&mut client, &d1, 2).await;
    assert!(shown.contains("<source mode='bind' host='127.0.0.1' service='4555'/>"), "{shown}");
    client.call(number("DOMAIN_CREATE"), &d1).await.unwrap();
    for (n, device) in
        [None, Some("serial1"), Some("console1"), Some("org.example.0")].into_iter().enumerate()
    {
        answers(&server, &d1, device, &format!("word-{n}")).await;
    }
    for (device, word) in [("serial2", "elsewhere"), ("serial3", "cannot find character device serial3")] {
        let payload = [&d1[..], &arguments(|w| w.optional(Some(device)).u32(0))].concat();
        let (_, text) = client.call(number("DOMAIN_OPEN_CONSOLE"), &payload).await.unwrap_err();
        assert!(text.contains(word), "{device}: {text}");
    }
    // What the document says no more goes at the next start, and what runs is shown as it is.
    define(&mut client, "<serial type='pty'/>").await.unwrap();
    assert!(devices().is_empty());
    assert!(document(&mut client, &d1, 0).await.contains("service='4555'"));
    assert!(!document(&mut client, &d1, 2).await.contains("service='4555'"));
    answers(&server, &d1, Some("serial1"), "still").await;
    for (bad, word) in [
        ("<serial type='udp'><source mode='connect' host='::1' service='1'/></serial>", "serial type"),
        ("<serial type='pty'/><serial type='pty'><target port='0'/></serial>", "same port"),
    ] {
        let (code, text) = define(&mut client, bad).await.unwrap_err();
        assert!(text.contains(word), "{bad}: {text}");
        assert!(code == Code::ConfigUnsupported as i32 || code == Code::XmlError as i32, "{bad}: {code}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_that_no_document_said_are_shown() {
    let server = Server::start().await;
    server.guest("v1", karst_model::instance::InstanceKind::VirtualMachine, false).await;
    let admin = Context::new(Principal::system());
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    let mut devices = view.instance.devices.clone();
    let keys =
        [("type", "port"), ("port", "serial"), ("number", "0"), ("to", "file"), ("path", "/srv/v1.log")];
    let keys = keys.map(|(k, v)| (k.to_owned(), v.to_owned()));
    devices.insert("log".into(), keys.into());
    let request = karst_engine::compute::update::UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: view.instance.config.clone(),
        devices,
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: None,
    };
    let changed = server.engine.instance_update(&admin, "default", "v1", request).await.unwrap();
    assert_eq!(changed.ended().await.error, None);
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let shown = document(&mut client, &v1, 2).await;
    assert!(shown.contains("<serial type='file'>") && shown.contains("path='/srv/v1.log'"), "{shown}");
    assert_eq!(shown.matches("<serial ").count(), 1, "the first one is there once: {shown}");
    // Its own document defines it again.
    client.call(number("DOMAIN_DEFINE_XML"), &arguments(|w| w.string(&shown))).await.unwrap();
    let again = document(&mut client, &v1, 2).await;
    let serial = |text: &str| {
        text.split("<serial ").nth(1).map(|rest| rest.split("</serial>").next().map(str::to_owned))
    };
    assert_eq!(serial(&again), serial(&shown));
    let view = server.engine.instance(&admin, "default", "v1").unwrap();
    assert!(view.instance.devices.contains_key("log"), "the device keeps its name");
}

/// Clients open consoles by the aliases that the document of a running domain says, and by nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_has_aliases_that_clients_open_it_by() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let d1 = define(&mut client, PORTS).await.unwrap();
    assert!(!document(&mut client, &d1, 2).await.contains("<alias"));
    client.call(number("DOMAIN_CREATE"), &d1).await.unwrap();
    let live = document(&mut client, &d1, 0).await;
    for (alias, times) in [("serial0", 2), ("serial1", 1), ("console1", 1), ("channel0", 1), ("channel1", 1)]
    {
        assert_eq!(live.matches(&format!("<alias name='{alias}'/>")).count(), times, "{alias}: {live}");
    }
    for (n, alias) in ["serial0", "serial1", "console1", "channel0"].into_iter().enumerate() {
        answers(&server, &d1, Some(alias), &format!("by-alias-{n}")).await;
    }
    // They are of the run: what is defined of that document does not keep them.
    client.call(number("DOMAIN_DEFINE_XML"), &arguments(|w| w.string(&live))).await.unwrap();
    let defined = document(&mut client, &d1, 2).await;
    assert!(!defined.contains("<alias"), "{defined}");
}
