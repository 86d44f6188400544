//! The protocol over real sockets: an engine on an in-memory store and a simulated host, and a client that speaks frames.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::support::{PATIENCE, Server, argument};
use karst_frontend_libvirt::{
    bounds::{Bounds, OfOne},
    error::Code,
    frame::{Frame, Header, KEEPALIVE, Kind, Status},
    names::NAMES,
    table::{Demand, PROCEDURES},
    xdr::Reader,
};
use karst_model::instance::InstanceKind;
use std::{sync::Arc, time::Duration};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_driver_shows_its_own_kind() {
    let server = Server::start().await;
    server.guest("c1", InstanceKind::Container, true).await;
    server.guest("v1", InstanceKind::VirtualMachine, true).await;
    let mut qemu = server.open("full", "qemu:///system").await;
    let mut lxc = server.open("full", "lxc:///system").await;
    assert_eq!(qemu.names().await, ["v1"]);
    assert_eq!(lxc.names().await, ["c1"]);
    // Neither reaches the other's, by any name.
    let c1 = lxc.domain("c1").await;
    let refused = qemu
        .call(
            23,
            &argument(|w| {
                w.string("c1");
            }),
        )
        .await
        .unwrap_err();
    assert_eq!(
        refused,
        (Code::NoDomain as i32, "Domain not found: no domain with matching name 'c1'".into())
    );
    for procedure in [12, 14, 16] {
        let flags: &[u8] = if procedure == 14 { &[0; 4] } else { &[] };
        let refused = qemu.call(procedure, &[&c1, flags].concat()).await.unwrap_err();
        assert_eq!(refused.0, Code::NoDomain as i32, "{refused:?}");
    }
    assert_eq!(lxc.state(&c1).await, (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_goes_round_and_events_tell_it() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let mut listener = server.open("full", "qemu:///system").await;
    let registered = listener
        .call(
            316,
            &argument(|w| {
                w.i32(0).u32(0);
            }),
        )
        .await
        .unwrap();
    let mut client = server.open("full", "qemu:///system").await;
    let v1 = client.domain("v1").await;
    let mut told = vec![];
    // Create, suspend, resume, destroy; each is done when it answers.
    for (procedure, state, events) in
        [(9, (1, 1), (2, 0)), (34, (3, 1), (3, 0)), (28, (1, 5), (4, 0)), (12, (5, 2), (5, 1))]
    {
        client.call(procedure, &v1).await.unwrap();
        assert_eq!(client.state(&v1).await, state);
        let frame = listener.receive().await;
        assert_eq!((frame.header.kind, frame.header.procedure), (Kind::Message, 318));
        assert!(frame.payload.starts_with(&registered));
        let mut r = Reader::new(&frame.payload);
        r.i32().unwrap();
        assert_eq!(r.string().unwrap(), "v1");
        r.uuid().unwrap();
        r.i32().unwrap();
        told.push((r.i32().unwrap(), r.i32().unwrap()));
        assert_eq!(told.last(), Some(&events));
    }
    let refused = client.call(12, &v1).await.unwrap_err();
    let text = "Requested operation is not valid: domain is not running";
    assert_eq!(refused, (Code::OperationInvalid as i32, text.into()));
    listener.call(317, &registered).await.unwrap();
    assert_eq!(listener.call(317, &registered).await.unwrap_err().0, Code::InvalidArg as i32);
}

/// A request to shut down is one: whoever asked may ask again, ask otherwise, or end it, and need not wait for the guest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_heeds_no_request_is_ended_at_once() {
    const SHUTDOWN: i32 = 33;
    const REBOOT: i32 = 27;
    const SHUTDOWN_FLAGS: i32 = 258;
    let soon = std::time::Duration::from_secs(10);
    let server = Server::start().await;
    for (uri, kind, name) in [
        ("qemu:///system", InstanceKind::VirtualMachine, "v1"),
        ("lxc:///system", InstanceKind::Container, "c1"),
    ] {
        server.guest(name, kind, false).await;
        let mut client = server.open("full", uri).await;
        let guest = client.domain(name).await;
        let id = {
            let records = server.engine.inner().inventory.read();
            records.instances.values().find(|i| *i.name == *name).map(|i| i.id).unwrap()
        };
        let flagged = |flags: u32| [guest.as_slice(), &flags.to_be_bytes()].concat();
        let refused = client.call(SHUTDOWN, &guest).await.unwrap_err();
        assert_eq!(refused.0, Code::OperationInvalid as i32, "{refused:?}");
        for asked in [(SHUTDOWN, guest.clone()), (REBOOT, flagged(0)), (SHUTDOWN_FLAGS, flagged(0))] {
            client.call(9, &guest).await.unwrap();
            server.host.set_ignores_shutdown(id, true);
            let began = server.host.count("guest_ask");
            client.call(asked.0, &asked.1).await.unwrap();
            // A container that is to boot anew is stopped for it, which others have to wait for.
            let asks = if kind == InstanceKind::Container && asked.0 == REBOOT { 0 } else { 2 };
            assert_eq!(client.state(&guest).await.0, 1, "it goes on");
            if asks > 0 {
                client.call(asked.0, &asked.1).await.unwrap();
                client.call(34, &guest).await.unwrap();
                client.call(28, &guest).await.unwrap();
            }
            assert_eq!(server.host.count("guest_ask") - began, asks, "{name} {}", asked.0);
            let ended = tokio::time::timeout(soon, client.call(12, &guest)).await;
            ended.expect("it does not wait for the guest").unwrap();
            assert_eq!(client.state(&guest).await, (5, 2));
        }
        // One that stands still is asked, too, and goes on standing still.
        client.call(9, &guest).await.unwrap();
        client.call(34, &guest).await.unwrap();
        client.call(SHUTDOWN, &guest).await.unwrap();
        assert_eq!(client.state(&guest).await.0, 3);
        client.call(28, &guest).await.unwrap();
        // Ways that are the other driver's.
        let foreign = if kind == InstanceKind::Container { 2 } else { 4 };
        let refused = client.call(SHUTDOWN_FLAGS, &flagged(foreign)).await.unwrap_err();
        assert_eq!(refused.0, Code::InvalidArg as i32, "{refused:?}");
        server.host.set_ignores_shutdown(id, false);
        client.call(SHUTDOWN, &guest).await.unwrap();
        let end = std::time::Instant::now() + PATIENCE;
        while client.state(&guest).await != (5, 1) {
            assert!(std::time::Instant::now() < end, "it heeds the request");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_answered_before_the_connection_is_open() {
    let server = Server::start().await;
    let mut client = server.connect("full").await;
    for procedure in PROCEDURES.iter().filter(|p| p.demand != Demand::Handshake) {
        let refused = client.call(procedure.number, &[]).await.unwrap_err();
        assert_eq!(refused, (Code::InternalError as i32, "internal error: connection not open".into()));
    }
    let foreign = client
        .call(
            1,
            &argument(|w| {
                w.optional(Some("xen:///system")).u32(0);
            }),
        )
        .await;
    assert_eq!(foreign.unwrap_err().0, Code::NoConnect as i32);
    let project = argument(|w| {
        w.optional(Some("qemu:///system?project=other")).u32(0);
    });
    assert!(client.call(1, &project).await.unwrap_err().1.contains("\"other\" not found"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_read_only_socket_changes_nothing_by_any_procedure() {
    let server = Server::start().await;
    server.guest("c1", InstanceKind::Container, true).await;
    let mut client = server.open("ro", "lxc:///system").await;
    let c1 = client.domain("c1").await;
    let revision = server.settled().await;
    for number in (1..=NAMES.len() as i32).filter(|n| *n != 2) {
        let demand = PROCEDURES.iter().find(|p| p.number == number).map(|p| p.demand);
        // Its domain, then what flags, texts and numbers most procedures take: enough for those that exist.
        for tail in [&[][..], &[0; 4], &[0; 8], &[0, 0, 0, 1], &[0; 16]] {
            let answer = client.call(number, &[&c1, tail].concat()).await;
            match demand {
                Some(Demand::Change | Demand::Inspect) => {
                    assert_eq!(answer.unwrap_err().0, Code::OperationDenied as i32);
                }
                None => assert_eq!(answer.unwrap_err().0, Code::NoSupport as i32),
                _ => {}
            }
        }
    }
    assert_eq!(server.engine.inner().inventory.read().revision, revision);
    assert_eq!(client.state(&c1).await, (1, 1));
    // Nor does a connection that said so itself.
    let mut client = server.connect("full").await;
    client
        .call(
            1,
            &argument(|w| {
                w.optional(Some("lxc:///system")).u32(1);
            }),
        )
        .await
        .unwrap();
    assert_eq!(client.call(12, &c1).await.unwrap_err().0, Code::OperationDenied as i32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_ends_its_own_connection_only() {
    let server = Server::start().await;
    let mut good = server.open("full", "qemu:///system").await;
    let lengths: [&[u8]; 5] = [
        &[0; 64],
        &[0xff; 64],
        b"GET /1.0 HTTP/1.1\r\nHost: x\r\n\r\n\r\n\r\n\r\n",
        &[0, 0, 0, 27],
        &[0, 0, 0, 28, 1, 2],
    ];
    for bytes in lengths {
        let mut bad = server.connect("full").await;
        bad.stream.write_all(bytes).await.unwrap();
        bad.stream.shutdown().await.unwrap();
        let mut rest = vec![];
        // Refused by the end of the connection: at once, not after a timeout.
        let ended = tokio::time::timeout(PATIENCE, bad.stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok() && rest.is_empty(), "{bytes:?}");
        assert!(good.names().await.is_empty());
    }
    // A call that is malformed inside is an error of that call.
    for payload in [&[][..], &[0xff; 16], &[0, 0, 0, 200]] {
        let refused = good.call(23, payload).await.unwrap_err();
        assert_eq!(refused.0, Code::Rpc as i32);
    }
    assert!(good.names().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keepalive_and_many_calls_in_flight() {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let ping = Header {
        program: KEEPALIVE,
        version: 1,
        procedure: 1,
        kind: Kind::Message,
        serial: 0,
        status: Status::Ok,
    };
    client.stream.write_all(&Frame::new(ping, vec![]).encode()).await.unwrap();
    let pong = client.receive().await.header;
    assert_eq!((pong.program, pong.procedure), (KEEPALIVE, 2));
    let mut wanted = vec![];
    for _ in 0..100 {
        wanted.push(
            client
                .send(
                    273,
                    &argument(|w| {
                        w.i32(1).u32(0);
                    }),
                )
                .await,
        );
    }
    let mut got = vec![];
    for _ in 0..100 {
        got.push(client.receive().await.header.serial);
    }
    got.sort_unstable();
    assert_eq!(got, wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_and_one_that_sends_garbage() {
    let server = Arc::new(Server::start().await);
    for n in 0..40 {
        server.guest(&format!("g{n}"), InstanceKind::Container, false).await;
    }
    let noise = {
        let server = server.clone();
        tokio::spawn(async move {
            for n in 0..50u8 {
                let mut bad = server.connect("full").await;
                let _ = bad.stream.write_all(&[n; 200]).await;
            }
        })
    };
    let clients = (0..40).map(|n| {
        let server = server.clone();
        tokio::spawn(async move {
            let mut client = server.open("full", "lxc:///system").await;
            assert_eq!(client.names().await.len(), 40);
            let own = client.domain(&format!("g{n}")).await;
            client.call(9, &own).await.unwrap();
            assert_eq!(client.state(&own).await.0, 1);
            client.call(12, &own).await.unwrap();
            assert_eq!(client.state(&own).await, (5, 2));
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    noise.await.unwrap();
}

/// Whoever is at the read-only socket is anybody: neither connections nor what they begin to send add up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_user_may_have_of_the_read_only_socket_is_bounded() {
    let read_only = OfOne { connections: 2, frame: 1 << 20, ..Bounds::default().read_only };
    // In time for who asks something, also where a thread stands still for a while.
    let first = Duration::from_secs(5);
    let server = Server::bounded(Bounds { first, read_only, ..Bounds::default() }).await;
    let ends = async |client: &mut crate::support::Client| {
        let mut rest = vec![];
        let ended = tokio::time::timeout(PATIENCE, client.stream.read_to_end(&mut rest)).await;
        assert!(ended.expect("it ends").is_ok_and(|n| n == 0), "without a word");
    };
    let mut one = server.open("ro", "qemu:///system").await;
    let mut silent = server.connect("ro").await;
    let mut third = server.connect("ro").await;
    ends(&mut third).await;
    // One that asks nothing does not keep its place.
    ends(&mut silent).await;
    let header = Header {
        program: karst_frontend_libvirt::frame::REMOTE,
        version: 1,
        procedure: 1,
        kind: Kind::Call,
        serial: 1,
        status: Status::Ok,
    };
    let open = argument(|w| {
        w.optional(Some("qemu:///system")).u32(0);
    });
    let open = Frame::new(header, open).encode();
    let entered = async {
        loop {
            let mut client = server.connect("ro").await;
            let sent = client.stream.write_all(&open).await.is_ok();
            if sent && matches!(Frame::read(&mut client.stream).await, Ok(Some(_))) {
                client.serial = 1;
                return client;
            }
        }
    };
    let mut again = tokio::time::timeout(PATIENCE, entered).await.expect("a place is free again");
    assert!(again.names().await.is_empty());
    // A frame that is larger than any that this socket needs; the other one takes it.
    let header = Header { procedure: 66, serial: 9, ..header };
    let frame = Frame::new(header, vec![0; (1 << 20) + 1]).encode();
    again.stream.write_all(&frame[..28]).await.unwrap();
    ends(&mut again).await;
    let mut full = server.open("full", "qemu:///system").await;
    full.stream.write_all(&frame).await.unwrap();
    assert_eq!(full.receive().await.header.serial, 9);
    assert!(one.names().await.is_empty());
}

/// What only those get who may change a domain, whatever it is called.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_with_what_is_secret_are_not_for_the_read_only_socket() {
    let server = Server::start().await;
    server.guest("v1", InstanceKind::VirtualMachine, false).await;
    let mut full = server.open("full", "qemu:///system").await;
    let mut viewer = server.open("ro", "qemu:///system").await;
    let v1 = viewer.domain("v1").await;
    let taken = argument(|w| {
        w.string("<domainsnapshot><name>s1</name></domainsnapshot>").u32(0);
    });
    let snapshot = full.call(185, &[v1.clone(), taken].concat()).await.unwrap();
    // The document of a domain, with secrets and to be migrated; that of a snapshot.
    for (procedure, of, secret, open) in
        [(14, &v1, &[1, 8, 9][..], &[0, 2][..]), (186, &snapshot, &[1], &[0])]
    {
        let with = |flags: u32| {
            let flags = argument(|w| {
                w.u32(flags);
            });
            [of.clone(), flags].concat()
        };
        for flags in secret {
            let refused = viewer.call(procedure, &with(*flags)).await.unwrap_err();
            assert!(refused.0 == Code::OperationDenied as i32 && refused.1.contains("secure"), "{refused:?}");
            full.call(procedure, &with(*flags)).await.unwrap();
        }
        for flags in open {
            viewer.call(procedure, &with(*flags)).await.unwrap();
        }
    }
}
