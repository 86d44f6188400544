//! A crowd: two hundred clients at once on several simulated hosts, each with a guest of its own, and one that sends garbage
//! all the while. Nobody else notices: each sees what it did, in order, and who listens is told all of it and nothing else.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::support::{Client, Server, argument};
use karst_agent::simulated::{SimulatedAgent, SimulatedOptions};
use karst_engine::{
    Agents, Context, Engine, EngineConfig,
    compute::create::{CreateInstance, InstanceSource},
};
use karst_env::RealEnv;
use karst_frontend_libvirt::{
    Front, Surface,
    frame::{Frame, Header, Kind, REMOTE, Status},
    serve,
    xdr::Reader,
};
use karst_model::{NodeId, access::Principal, instance::InstanceKind};
use karst_store::{SqliteStore, Store};
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream},
    sync::Barrier,
};
use uuid::Uuid;

const HOSTS: usize = 4;
const CLIENTS: usize = 200;
/// Connections that the one with garbage leaves open in the middle of a frame.
const HELD: usize = 64;

/// A server over several hosts; the hosts, in their order.
async fn several_hosts() -> (Server, Vec<Arc<SimulatedAgent>>) {
    let env = RealEnv::shared();
    let store: Arc<dyn Store> = Arc::new(SqliteStore::memory(env.clone()).unwrap());
    let agents = Agents::default();
    let (mut nodes, mut hosts) = (vec![], vec![]);
    for n in 1..=HOSTS {
        let name = format!("host{n}");
        let options = SimulatedOptions {
            name: name.clone(),
            address_after: Duration::from_millis(20),
            ..SimulatedOptions::default()
        };
        let host = SimulatedAgent::new(env.clone(), options);
        let node = NodeId(Uuid::from_u128(n as u128));
        agents.insert(node, host.clone());
        nodes.push((node, name));
        hosts.push(host);
    }
    let engine =
        Engine::open(EngineConfig { env, store, agents, nodes, daemon_id: "abc123".into() }).await.unwrap();
    engine.bootstrap().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let front = Front::new(engine.clone());
    let listener = UnixListener::bind(dir.path().join("full")).unwrap();
    let tasks = vec![tokio::spawn(serve(front.clone(), Surface::Full, listener))];
    (Server { engine, front, host: hosts[0].clone(), dir, tasks }, hosts)
}

async fn guest(server: &Server, name: String, host: String) {
    let request = CreateInstance {
        name: Some(name),
        kind: InstanceKind::VirtualMachine,
        description: String::new(),
        ephemeral: false,
        config: Default::default(),
        devices: Default::default(),
        profiles: None,
        source: InstanceSource::None,
        start: false,
        target: Some(host),
        vmid: None,
    };
    let admin = Context::new(Principal::system());
    let (_, operation) = server.engine.instance_create(&admin, "default", request).await.unwrap();
    assert_eq!(operation.ended().await.error, None);
}

fn frame(procedure: i32, kind: Kind, serial: u32, payload: Vec<u8>) -> Vec<u8> {
    let header = Header { program: REMOTE, version: 1, procedure, kind, serial, status: Status::Ok };
    Frame::new(header, payload).encode()
}

/// What no client sends: no frames, frames of nothing, half of what is announced, calls before the connection is open, calls
/// whose inside is no call's, streams that nobody opened, and questions whose answers nobody reads.
fn garbage() -> Vec<Vec<u8>> {
    let domains = argument(|w| {
        w.i32(1).u32(0);
    });
    let open = argument(|w| {
        w.optional(Some("qemu:///system")).u32(0);
    });
    let asks = (2..200).flat_map(|serial| frame(273, Kind::Call, serial, domains.clone()));
    let announced = [&(32u32 << 20).to_be_bytes()[..], &frame(273, Kind::Call, 1, vec![])[4..]].concat();
    let mut all = vec![
        vec![0; 200],
        vec![0xff; 200],
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        vec![0, 0, 0, 27],
        vec![0x02, 0, 0, 1, 0, 0, 0, 0],
        announced,
        frame(9, Kind::Call, 1, vec![0xff; 64]),
        [frame(1, Kind::Call, 1, open.clone()), frame(23, Kind::Call, 2, vec![0xff; 16])].concat(),
        [frame(1, Kind::Call, 1, open.clone()), frame(208, Kind::Stream, 7, vec![7; 4096])].concat(),
        [frame(1, Kind::Call, 1, open.clone()), frame(9999, Kind::Call, 2, vec![])].concat(),
        [frame(1, Kind::Call, 1, open.clone()), frame(1, Kind::Reply, 1, vec![])].concat(),
        frame(1, Kind::Call, 1, open).into_iter().chain(asks).collect(),
    ];
    all.extend((1..=250u8).step_by(25).map(|byte| vec![byte; 300]));
    all
}

/// Sends it until the others are through; how many connections that were.
async fn noise(server: Arc<Server>, over: Arc<AtomicBool>) -> usize {
    let garbage = garbage();
    let mut held = vec![];
    let mut sent = 0;
    while !over.load(Ordering::Relaxed) || sent < garbage.len() {
        let mut bad = UnixStream::connect(server.path("full")).await.unwrap();
        // Cut off in the middle of it, which is the server's right.
        let _ = bad.write_all(&garbage[sent % garbage.len()]).await;
        sent += 1;
        if held.len() == HELD {
            held.remove(0);
        }
        held.push(bad);
        // The others are to have a processor, too.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    sent
}

/// What it is told of domains until each has come and gone: names with the events, in their order.
async fn heard(mut listener: Client) -> HashMap<String, Vec<(i32, i32)>> {
    let mut told: HashMap<String, Vec<(i32, i32)>> = HashMap::new();
    for _ in 0..2 * CLIENTS {
        let frame = listener.receive().await;
        assert_eq!((frame.header.kind, frame.header.procedure), (Kind::Message, 318));
        let mut r = Reader::new(&frame.payload);
        r.i32().unwrap();
        let name = r.string().unwrap();
        r.uuid().unwrap();
        r.i32().unwrap();
        told.entry(name).or_default().push((r.i32().unwrap(), r.i32().unwrap()));
    }
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_clients_and_one_that_sends_garbage() {
    let (server, hosts) = several_hosts().await;
    for n in 0..CLIENTS {
        guest(&server, format!("g{n}"), format!("host{}", n % HOSTS + 1)).await;
    }
    let server = Arc::new(server);
    let mut listener = server.open("full", "qemu:///system").await;
    let registered = argument(|w| {
        w.i32(0).u32(0);
    });
    listener.call(316, &registered).await.unwrap();
    let listener = tokio::spawn(heard(listener));
    let over = Arc::new(AtomicBool::new(false));
    let noise = tokio::spawn(noise(server.clone(), over.clone()));
    // All are connected before the first of them asks.
    let together = Arc::new(Barrier::new(CLIENTS));
    let clients = (0..CLIENTS).map(|n| {
        let (server, together) = (server.clone(), together.clone());
        tokio::spawn(async move {
            let mut client = server.open("full", "qemu:///system").await;
            together.wait().await;
            assert_eq!(client.names().await.len(), CLIENTS);
            let own = client.domain(&format!("g{n}")).await;
            assert_eq!(client.state(&own).await.0, 5);
            client.call(9, &own).await.unwrap();
            assert_eq!(client.state(&own).await, (1, 1));
            // Another's guest is there, whatever its owner does to it meanwhile.
            client.domain(&format!("g{}", (n + 1) % CLIENTS)).await;
            client.call(12, &own).await.unwrap();
            assert_eq!(client.state(&own).await, (5, 2));
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    over.store(true, Ordering::Relaxed);
    let sent = noise.await.unwrap();
    assert!(sent >= garbage().len(), "{sent}");
    let told = listener.await.unwrap();
    assert_eq!(told.len(), CLIENTS);
    for (name, events) in told {
        assert_eq!(events, [(2, 0), (5, 1)], "{name}");
    }
    // Each was started once, where it is.
    for host in &hosts {
        assert_eq!(host.count("guest_start"), (CLIENTS / HOSTS) as u64);
    }
    // And who comes after that finds all as it was.
    let mut after = server.open("full", "qemu:///system").await;
    assert_eq!(after.names().await.len(), CLIENTS);
}
