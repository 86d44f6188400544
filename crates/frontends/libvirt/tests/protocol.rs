//! The protocol over real sockets: an engine on an in-memory store and a simulated host, and a client that speaks frames.
#![allow(clippy::disallowed_methods)] // a test tool

use karst_agent::simulated::{SimulatedAgent, SimulatedOptions};
use karst_engine::{
    Agents, Context, Engine, EngineConfig,
    compute::create::{CreateInstance, InstanceSource},
};
use karst_env::RealEnv;
use karst_frontend_libvirt::{
    Front, Surface,
    error::Code,
    frame::{Frame, Header, KEEPALIVE, Kind, REMOTE, Status},
    names::NAMES,
    serve,
    table::{Demand, PROCEDURES},
    xdr::{Reader, Writer},
};
use karst_model::{NodeId, access::Principal, instance::InstanceKind};
use karst_store::{SqliteStore, Store};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(30);

struct Server {
    engine: Engine,
    dir: tempfile::TempDir,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        self.engine.close();
    }
}

impl Server {
    async fn start() -> Self {
        let env = RealEnv::shared();
        let store: Arc<dyn Store> = Arc::new(SqliteStore::memory(env.clone()).unwrap());
        let options = SimulatedOptions { address_after: Duration::from_millis(20), ..Default::default() };
        let agents = Agents::default();
        let node = NodeId(Uuid::from_u128(7));
        agents.insert(node, SimulatedAgent::new(env.clone(), options));
        let engine = Engine::open(EngineConfig {
            env,
            store,
            agents,
            nodes: vec![(node, "host1".into())],
            daemon_id: "abc123".into(),
        })
        .await
        .unwrap();
        engine.bootstrap().await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let front = Arc::new(Front { engine: engine.clone() });
        let tasks = [(Surface::Full, "full"), (Surface::ReadOnly, "ro")]
            .map(|(surface, name)| {
                let listener = UnixListener::bind(dir.path().join(name)).unwrap();
                tokio::spawn(serve(front.clone(), surface, listener))
            })
            .into();
        Self { engine, dir, tasks }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn guest(&self, name: &str, kind: InstanceKind, start: bool) {
        let request = CreateInstance {
            name: Some(name.into()),
            kind,
            description: String::new(),
            ephemeral: false,
            config: Default::default(),
            devices: Default::default(),
            profiles: None,
            source: InstanceSource::None,
            start,
            target: None,
        };
        let admin = Context::new(Principal::system());
        let (_, operation) = self.engine.instance_create(&admin, "default", request).await.unwrap();
        assert_eq!(operation.ended().await.error, None);
    }

    /// A connection that is open.
    async fn open(&self, socket: &str, uri: &str) -> Client {
        let mut client = self.connect(socket).await;
        client
            .call(
                1,
                &argument(|w| {
                    w.optional(Some(uri)).u32(0);
                }),
            )
            .await
            .unwrap();
        client
    }

    async fn connect(&self, socket: &str) -> Client {
        Client { stream: UnixStream::connect(self.path(socket)).await.unwrap(), serial: 0 }
    }
}

fn argument(write: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut w = Writer::new();
    write(&mut w);
    w.finish()
}

struct Client {
    stream: UnixStream,
    serial: u32,
}

/// Number and text of an error.
type Refused = (i32, String);

impl Client {
    async fn send(&mut self, procedure: i32, payload: &[u8]) -> u32 {
        self.serial += 1;
        let header = Header {
            program: REMOTE,
            version: 1,
            procedure,
            kind: Kind::Call,
            serial: self.serial,
            status: Status::Ok,
        };
        self.stream.write_all(&Frame::new(header, payload.to_vec()).encode()).await.unwrap();
        self.serial
    }

    async fn receive(&mut self) -> Frame {
        tokio::time::timeout(PATIENCE, Frame::read(&mut self.stream)).await.unwrap().unwrap().unwrap()
    }

    async fn call(&mut self, procedure: i32, payload: &[u8]) -> Result<Vec<u8>, Refused> {
        let serial = self.send(procedure, payload).await;
        loop {
            let frame = self.receive().await;
            if frame.header.kind != Kind::Reply {
                continue;
            }
            assert_eq!((frame.header.serial, frame.header.procedure), (serial, procedure));
            if frame.header.status == Status::Ok {
                return Ok(frame.payload.to_vec());
            }
            let mut r = Reader::new(&frame.payload);
            let (code, _) = (r.i32().unwrap(), r.i32().unwrap());
            return Err((code, r.option(|r| r.string()).unwrap().unwrap()));
        }
    }

    /// Names of all domains.
    async fn names(&mut self) -> Vec<String> {
        let payload = self
            .call(
                273,
                &argument(|w| {
                    w.i32(1).u32(0);
                }),
            )
            .await
            .unwrap();
        let mut r = Reader::new(&payload);
        let domains = r.array(1000, |r| Ok((r.string()?, r.uuid()?, r.i32()?))).unwrap();
        assert_eq!(r.u32().unwrap() as usize, domains.len());
        domains.into_iter().map(|d| d.0).collect()
    }

    /// `remote_nonnull_domain` of a name.
    async fn domain(&mut self, name: &str) -> Vec<u8> {
        self.call(
            23,
            &argument(|w| {
                w.string(name);
            }),
        )
        .await
        .unwrap()
    }

    async fn state(&mut self, domain: &[u8]) -> (i32, i32) {
        let payload = self.call(212, &[domain, &[0; 4]].concat()).await.unwrap();
        let mut r = Reader::new(&payload);
        (r.i32().unwrap(), r.i32().unwrap())
    }
}

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
    for (procedure, state, events) in [(9, (1, 1), 2), (34, (3, 1), 3), (28, (1, 1), 4), (12, (5, 2), 5)] {
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
        told.push(r.i32().unwrap());
        assert_eq!(told.last(), Some(&events));
    }
    let refused = client.call(12, &v1).await.unwrap_err();
    let text = "Requested operation is not valid: domain is not running";
    assert_eq!(refused, (Code::OperationInvalid as i32, text.into()));
    listener.call(317, &registered).await.unwrap();
    assert_eq!(listener.call(317, &registered).await.unwrap_err().0, Code::InvalidArg as i32);
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
    let revision = server.engine.inner().inventory.read().revision;
    for number in (1..=NAMES.len() as i32).filter(|n| *n != 2) {
        let demand = PROCEDURES.iter().find(|p| p.number == number).map(|p| p.demand);
        // Its domain, then what flags, texts and numbers most procedures take: enough for those that exist.
        for tail in [&[][..], &[0; 4], &[0; 8], &[0, 0, 0, 1], &[0; 16]] {
            let answer = client.call(number, &[&c1, tail].concat()).await;
            match demand {
                Some(Demand::Change) => assert_eq!(answer.unwrap_err().0, Code::OperationDenied as i32),
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
