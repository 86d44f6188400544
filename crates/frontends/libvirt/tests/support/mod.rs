//! A server of the protocol over an engine on an in-memory store and a simulated host, and a client that speaks frames.
#![allow(dead_code, clippy::disallowed_methods)] // a test tool, of which each suite uses a part

use karst_agent::simulated::{SimulatedAgent, SimulatedOptions};
use karst_engine::{
    Agents, Context, Engine, EngineConfig,
    compute::create::{CreateInstance, InstanceSource},
};
use karst_env::RealEnv;
use karst_frontend_libvirt::{
    Front, Surface,
    bounds::Bounds,
    frame::{Frame, Header, Kind, REMOTE, Status},
    serve,
    xdr::{Reader, Writer},
};
use karst_model::{NodeId, access::Principal, instance::InstanceKind};
use karst_store::{Revision, SqliteStore, Store};
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};
use uuid::Uuid;

pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct Server {
    pub engine: Engine,
    pub front: Arc<Front>,
    pub host: Arc<SimulatedAgent>,
    pub dir: tempfile::TempDir,
    pub tasks: Vec<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        self.engine.close();
    }
}

impl Server {
    pub async fn start() -> Self {
        Self::bounded(Bounds::default()).await
    }

    pub async fn bounded(bounds: Bounds) -> Self {
        Self::on(bounds, SimulatedOptions::default()).await
    }

    /// On a host of these properties.
    pub async fn on(bounds: Bounds, options: SimulatedOptions) -> Self {
        let env = RealEnv::shared();
        let store: Arc<dyn Store> = Arc::new(SqliteStore::memory(env.clone()).unwrap());
        let options = SimulatedOptions { address_after: Duration::from_millis(20), ..options };
        let agents = Agents::default();
        let node = NodeId(Uuid::from_u128(7));
        let host = SimulatedAgent::new(env.clone(), options);
        agents.insert(node, host.clone());
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
        let front = Front::bounded(engine.clone(), bounds);
        let tasks = [(Surface::Full, "full"), (Surface::ReadOnly, "ro")]
            .map(|(surface, name)| {
                let listener = UnixListener::bind(dir.path().join(name)).unwrap();
                tokio::spawn(serve(front.clone(), surface, listener))
            })
            .into();
        Self { engine, front, host, dir, tasks }
    }

    /// The revision of the records, once the engine has written down what it finds at its start: the facts of its host, and the
    /// warning that comes of them a second later. From here on the records change when somebody changes them.
    pub async fn settled(&self) -> Revision {
        let end = Instant::now() + PATIENCE;
        loop {
            {
                let records = self.engine.inner().inventory.read();
                if !records.tenancy.warnings.is_empty() {
                    return records.revision;
                }
            }
            assert!(Instant::now() < end, "nothing is recorded of the host");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub async fn guest(&self, name: &str, kind: InstanceKind, start: bool) {
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
            vmid: None,
        };
        let admin = Context::new(Principal::system());
        let (_, operation) = self.engine.instance_create(&admin, "default", request).await.unwrap();
        assert_eq!(operation.ended().await.error, None);
    }

    /// A connection that is open.
    pub async fn open(&self, socket: &str, uri: &str) -> Client {
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

    pub async fn connect(&self, socket: &str) -> Client {
        Client { stream: UnixStream::connect(self.path(socket)).await.unwrap(), serial: 0 }
    }
}

pub fn argument(write: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut w = Writer::new();
    write(&mut w);
    w.finish()
}

pub struct Client {
    pub stream: UnixStream,
    pub serial: u32,
}

/// Number and text of an error.
pub type Refused = (i32, String);

impl Client {
    pub async fn send(&mut self, procedure: i32, payload: &[u8]) -> u32 {
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

    pub async fn receive(&mut self) -> Frame {
        tokio::time::timeout(PATIENCE, Frame::read(&mut self.stream)).await.unwrap().unwrap().unwrap()
    }

    pub async fn call(&mut self, procedure: i32, payload: &[u8]) -> Result<Vec<u8>, Refused> {
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
    pub async fn names(&mut self) -> Vec<String> {
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
    pub async fn domain(&mut self, name: &str) -> Vec<u8> {
        self.call(
            23,
            &argument(|w| {
                w.string(name);
            }),
        )
        .await
        .unwrap()
    }

    pub async fn state(&mut self, domain: &[u8]) -> (i32, i32) {
        let payload = self.call(212, &[domain, &[0; 4]].concat()).await.unwrap();
        let mut r = Reader::new(&payload);
        (r.i32().unwrap(), r.i32().unwrap())
    }
}
