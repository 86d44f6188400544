//! QEMU's monitor by libvirt's protocol: commands, events, and that only administrators reach it.
#![allow(clippy::disallowed_methods)] // a test

use crate::support::{Client, PATIENCE, Refused, Server, argument};
use karst_frontend_libvirt::{
    error::Code,
    frame::{Frame, Header, Kind, QEMU, Status},
    xdr::Reader,
};
use karst_model::instance::InstanceKind;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

/// A call of the QEMU program.
async fn ask(client: &mut Client, procedure: i32, payload: &[u8]) -> Result<Vec<u8>, Refused> {
    client.serial += 1;
    let header = Header {
        program: QEMU,
        version: 1,
        procedure,
        kind: Kind::Call,
        serial: client.serial,
        status: Status::Ok,
    };
    client.stream.write_all(&Frame::new(header, payload.to_vec()).encode()).await.unwrap();
    let frame = loop {
        let frame = client.receive().await;
        if frame.header.kind == Kind::Reply {
            break frame;
        }
    };
    assert_eq!((frame.header.program, frame.header.serial), (QEMU, client.serial));
    if frame.header.status == Status::Ok {
        return Ok(frame.payload.to_vec());
    }
    let mut r = Reader::new(&frame.payload);
    let (code, _) = (r.i32().unwrap(), r.i32().unwrap());
    Err((code, r.option(|r| r.string()).unwrap().unwrap()))
}

async fn command(client: &mut Client, domain: &[u8], text: &str, flags: u32) -> Result<String, Refused> {
    let said = argument(|w| {
        w.string(text).u32(flags);
    });
    let answer = ask(client, 1, &[domain, &said].concat()).await?;
    Ok(Reader::new(&answer).string().unwrap())
}

async fn register(client: &mut Client, event: Option<&str>, flags: u32) -> Result<i32, Refused> {
    let said = argument(|w| {
        // Of any domain.
        w.u32(0).optional(event).u32(flags);
    });
    let answer = ask(client, 4, &said).await?;
    Ok(Reader::new(&answer).i32().unwrap())
}

async fn messages(client: &mut Client, domain: &[u8]) -> Vec<String> {
    let answer = client.call(426, &[domain, &[0; 4]].concat()).await.unwrap();
    Reader::new(&answer).array(10, |r| r.string()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_and_events_of_the_monitor() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    server.guest("off", InstanceKind::VirtualMachine, false).await;
    server.guest("c1", InstanceKind::Container, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let mut listener = server.open("full", "qemu:///system").await;
    assert_eq!(register(&mut listener, Some("^st"), 3).await.unwrap(), 1);
    assert_eq!(register(&mut listener, Some("RESUME"), 0).await.unwrap(), 2);
    assert_eq!(register(&mut listener, Some("("), 1).await.unwrap_err().0, Code::InvalidArg as i32);
    assert!(messages(&mut client, &v1).await.is_empty());
    let said = command(&mut client, &v1, r#"{"execute":"query-status","id":"x"}"#, 0).await.unwrap();
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&said["return"]["status"], &said["id"]), (&json!("running"), &json!("x")));
    assert_eq!(command(&mut client, &v1, "info status", 1).await.unwrap(), "VM status: running\r\n");
    assert_eq!(messages(&mut client, &v1).await, ["tainted: custom monitor control commands issued"]);
    // What QEMU refuses is an answer.
    let said = command(&mut client, &v1, r#"{"execute":"never"}"#, 0).await.unwrap();
    assert_eq!(serde_json::from_str::<Value>(&said).unwrap()["error"]["class"], "CommandNotFound");
    for wrong in ["", "{}", "query-status"] {
        assert_eq!(command(&mut client, &v1, wrong, 0).await.unwrap_err().0, Code::InvalidArg as i32);
    }
    assert_eq!(command(&mut client, &v1, "{}", 2).await.unwrap_err().0, Code::InvalidArg as i32);
    let off = client.domain("off").await;
    let refused = command(&mut client, &off, r#"{"execute":"query-status"}"#, 0).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationInvalid as i32);
    // Its events come to who listens for them, by his numbers.
    for (text, number, event) in [("stop", 1, "STOP"), ("cont", 2, "RESUME")] {
        command(&mut client, &v1, &json!({"execute": text}).to_string(), 0).await.unwrap();
        let frame = tokio::time::timeout(PATIENCE, listener.receive()).await.unwrap();
        let Header { program, procedure, kind, .. } = frame.header;
        assert_eq!((program, procedure, kind), (QEMU, 6, Kind::Message));
        let mut r = Reader::new(&frame.payload);
        assert_eq!((r.i32().unwrap(), r.string().unwrap().as_str()), (number, "v1"));
        r.uuid().unwrap();
        r.i32().unwrap();
        assert_eq!(r.string().unwrap(), event);
    }
    // One that stands still too.
    client.call(34, &v1).await.unwrap();
    let said = command(&mut client, &v1, r#"{"execute":"query-status"}"#, 0).await.unwrap();
    assert_eq!(serde_json::from_str::<Value>(&said).unwrap()["return"]["status"], "paused");
    client.call(28, &v1).await.unwrap();
    assert!(ask(&mut listener, 5, &[0, 0, 0, 1]).await.is_ok());
    assert_eq!(ask(&mut listener, 5, &[0, 0, 0, 1]).await.unwrap_err().0, Code::InvalidArg as i32);
    // Who reads only, and containers, have none of it; nor has the whole program anything else.
    let mut reader = server.open("ro", "qemu:///system").await;
    let refused = command(&mut reader, &v1, r#"{"execute":"query-status"}"#, 0).await.unwrap_err();
    assert_eq!(refused.0, Code::OperationDenied as i32);
    assert_eq!(register(&mut reader, None, 0).await.unwrap_err().0, Code::OperationDenied as i32);
    let mut lxc = server.open("full", "lxc:///system").await;
    let c1 = lxc.domain("c1").await;
    assert_eq!(command(&mut lxc, &c1, "info status", 1).await.unwrap_err().0, Code::NoSupport as i32);
    for number in [0, 2, 6, 7, 8] {
        assert_eq!(ask(&mut client, number, &[]).await.unwrap_err().0, Code::NoSupport as i32);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processors_by_number_and_how_fast_memory_is_written() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let of = |map: &str, state: i32, flags: u32| {
        let said = argument(|w| {
            w.string(map).i32(state).u32(flags);
        });
        [&v1[..], &said].concat()
    };
    // It has one, and can have four.
    let most = argument(|w| {
        w.u32(4).u32(2 | 4);
    });
    client.call(199, &[&v1[..], &most].concat()).await.unwrap();
    for (map, state) in [("2", 1), ("0", 1), ("0,2", 0), ("3", 0)] {
        let refused = client.call(384, &of(map, state, 2)).await.unwrap_err();
        assert_eq!(refused.0, Code::OperationUnsupported as i32, "{map} {state}: {refused:?}");
    }
    client.call(384, &of("1-2", 1, 2)).await.unwrap();
    client.call(384, &of("2", 0, 2)).await.unwrap();
    let count = client.call(200, &[&v1[..], &[0, 0, 0, 2]].concat()).await.unwrap();
    assert_eq!(count, [0, 0, 0, 2]);
    for (map, code) in [("x", Code::InvalidArg), ("", Code::InvalidArg), ("4", Code::InvalidArg)] {
        assert_eq!(client.call(384, &of(map, 1, 2)).await.unwrap_err().0, code as i32);
    }
    let rate = |seconds: i32, flags: u32| {
        let said = argument(|w| {
            w.i32(seconds).u32(flags);
        });
        [&v1[..], &said].concat()
    };
    assert_eq!(client.call(427, &rate(0, 0)).await.unwrap_err().0, Code::ConfigUnsupported as i32);
    assert_eq!(client.call(427, &rate(1, 4)).await.unwrap_err().0, Code::InvalidArg as i32);
    for (flags, mode) in [(2, "dirty-ring"), (1, "dirty-bitmap"), (0, "page-sampling")] {
        client.call(427, &rate(1, flags)).await.unwrap();
        let all = argument(|w| {
            w.u32(0).u32(512).u32(0);
        });
        let stats = client.call(344, &all).await.unwrap();
        let text = String::from_utf8_lossy(&stats).into_owned();
        assert!(text.contains(mode), "{mode}: {text}");
        assert_eq!(text.contains("dirtyrate.vcpu.0.megabytes_per_second"), flags == 2, "{text}");
    }
    let all = argument(|w| {
        w.u32(0).u32(512).u32(0);
    });
    let stats = client.call(344, &all).await.unwrap();
    let text = String::from_utf8_lossy(&stats).into_owned();
    assert!(text.contains("dirtyrate.megabytes_per_second"), "{text}");
    // What there is none of says why.
    let refused = client.call(131, &[]).await.unwrap_err();
    assert_eq!(refused.0, Code::NoSupport as i32);
    assert!(refused.1.contains("virInterfaceDefineXML: the interfaces of a host"), "{refused:?}");
}
