//! What the wire does with peers that break its rules, and what a client makes of a host process that dies.
#![allow(clippy::disallowed_methods)] // the real world's clock is what these tests are about

#[path = "../../testkit/src/backends.rs"]
mod backends;

use karst_agent::{
    AgentEvent, CallContext, Client, Executor, Fault, Fence, GuestRef, GuestStop, HostAgent, ServerOptions,
    SimulatedAgent, SimulatedOptions, serve,
    wire::{Frame, FrameReader, FromHost, HEADER, MAX_FRAME, Outcome, ToHost},
};
use karst_env::{EnvExt, RealEnv, SharedEnv};
use karst_model::{
    ErrorKind, InstanceId, NodeId, PoolId, SagaId, guest::StopMode, instance::Generation, spec::PoolSpec,
    storage::PoolKind,
};
use proptest::prelude::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::{
    io::IoSlice,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

const LONG: Duration = Duration::from_secs(20);

struct Host {
    env: SharedEnv,
    agent: Arc<SimulatedAgent>,
    path: PathBuf,
    options: ServerOptions,
    /// A runtime of its own: ending it ends the listener and every connection, as the death of a process does.
    serving: Option<tokio::runtime::Runtime>,
    _dir: tempfile::TempDir,
}

impl Host {
    fn new(options: ServerOptions) -> Self {
        let env = RealEnv::shared();
        let dir = tempfile::tempdir().unwrap();
        let mut host = Self {
            agent: SimulatedAgent::new(env.clone(), SimulatedOptions::default()),
            env,
            path: dir.path().join("host.sock"),
            options,
            serving: None,
            _dir: dir,
        };
        host.start();
        host
    }

    fn start(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let entered = runtime.enter();
        let listener = UnixListener::bind(&self.path).unwrap();
        drop(entered);
        let (agent, guard) = (self.agent.clone(), self.agent.guard());
        runtime.spawn(serve(self.env.clone(), listener, agent, guard, self.options.clone()));
        self.serving = Some(runtime);
    }

    fn die(&mut self) {
        self.serving.take().into_iter().for_each(|r| r.shutdown_background());
        let _ = std::fs::remove_file(&self.path);
        self.agent.crash();
    }

    async fn client(&self) -> Arc<dyn HostAgent> {
        Arc::new(Client::connect(self.env.clone(), &self.path, None).await.unwrap().agent())
    }

    /// A connection without a client: the hello is done.
    async fn raw(&self) -> (Arc<UnixStream>, FrameReader) {
        let stream = Arc::new(UnixStream::connect(&self.path).await.unwrap());
        let hello = ToHost::Hello { versions: (1, 9), executor: None };
        Frame::new(&hello, vec![]).unwrap().send(&stream).await.unwrap();
        let mut reader = FrameReader::new(stream.clone(), true);
        let (welcome, _) = reader.next::<FromHost>().await.unwrap().unwrap();
        assert_eq!(welcome, FromHost::Welcome { version: 1 });
        (stream, reader)
    }

    async fn still_answers(&self) {
        self.client().await.host_facts(&CallContext::read(LONG), ()).await.unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.serving.take().into_iter().for_each(|r| r.shutdown_background());
    }
}

const NODE: NodeId = NodeId(uuid::Uuid::nil());

fn me(epoch: u64) -> Option<Executor> {
    Some(Executor { node: NODE, epoch })
}

fn change(epoch: u64) -> CallContext {
    let fence = Fence { saga: SagaId(uuid::Uuid::nil()), executor: NODE, epoch, step: 0 };
    CallContext::mutate(LONG, fence)
}

fn pool() -> PoolSpec {
    PoolSpec::own(PoolId(uuid::Uuid::from_u128(7)), PoolKind::Dir)
}

fn request(id: u64, call: serde_json::Value) -> ToHost {
    ToHost::Request { id, context: CallContext::read(LONG), call }
}

/// The connection ends without another frame; within a bound.
async fn ends(env: &SharedEnv, mut reader: FrameReader) {
    let end = env.timeout(LONG, reader.next::<FromHost>()).await.expect("the connection was to end");
    assert!(!matches!(end, Ok(Some(_))), "{end:?}");
}

fn header(length: u32, fds: u8) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4] = fds;
    header
}

async fn send_fds(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) {
    stream.writable().await.unwrap();
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test]
async fn hellos() {
    let host = Host::new(ServerOptions::default());
    host.agent.guard().introduce(me(8).unwrap()).unwrap();
    let try_hello = async |versions, executor| {
        let stream = Arc::new(UnixStream::connect(&host.path).await.unwrap());
        let hello = ToHost::Hello { versions, executor };
        Frame::new(&hello, vec![]).unwrap().send(&stream).await.unwrap();
        FrameReader::new(stream, true).next::<FromHost>().await.unwrap().unwrap().0
    };
    assert_eq!(try_hello((1, 1), me(8)).await, FromHost::Welcome { version: 1 });
    assert_eq!(try_hello((0, 7), None).await, FromHost::Welcome { version: 1 });
    for (versions, executor, kind) in [
        ((2, 9), None, ErrorKind::Unsupported),
        ((0, 0), None, ErrorKind::Unsupported),
        ((1, 1), me(7), ErrorKind::Conflict),
    ] {
        match try_hello(versions, executor).await {
            FromHost::Refused { error } => assert_eq!(error.kind, kind, "{error:?}"),
            other => panic!("{other:?}"),
        }
    }
    let refused = Client::connect(host.env.clone(), &host.path, me(3)).await.err().unwrap();
    assert_eq!(refused.kind, ErrorKind::Conflict, "at once, not after a time");
    assert_eq!(host.agent.guard().highest(NODE), 8);
}

#[tokio::test]
async fn calls_that_the_host_does_not_know_are_answered() {
    let host = Host::new(ServerOptions::default());
    let (stream, mut reader) = host.raw().await;
    for (id, call) in [
        serde_json::json!({"call": "run_shell", "request": "rm -rf /"}),
        serde_json::json!({"call": "volume_delete", "request": {"pool": "../../etc", "volume": "/etc/passwd"}}),
        serde_json::json!({"call": "guest_destroy", "request": "../x"}),
        serde_json::json!(null),
        serde_json::json!([1, 2, 3]),
    ]
    .into_iter()
    .enumerate()
    {
        let id = id as u64;
        Frame::new(&request(id, call), vec![]).unwrap().send(&stream).await.unwrap();
        let (answer, fds) = reader.next::<FromHost>().await.unwrap().unwrap();
        assert!(fds.is_empty());
        match answer {
            FromHost::Response { id: of, outcome: Outcome::Error(e) } => {
                assert_eq!((of, e.kind), (id, ErrorKind::Unsupported));
            }
            other => panic!("{other:?}"),
        }
    }
    let facts = serde_json::json!({"call": "host_facts", "request": null});
    Frame::new(&request(99, facts), vec![]).unwrap().send(&stream).await.unwrap();
    let (answer, _) = reader.next::<FromHost>().await.unwrap().unwrap();
    assert!(matches!(answer, FromHost::Response { id: 99, outcome: Outcome::Result(_) }));
}

#[test]
fn messages_of_the_host_are_read_in_any_order_and_answers_stay_text() {
    let read = |text: &str| serde_json::from_str::<FromHost>(text);
    let text = r#"{"outcome":{"result":[1,{"a":null}]},"later":{"x":1},"id":7,"type":"response"}"#;
    match read(text).unwrap() {
        FromHost::Response { id: 7, outcome: Outcome::Result(value) } => {
            assert_eq!(value.get(), r#"[1,{"a":null}]"#);
        }
        other => panic!("{other:?}"),
    }
    let welcome = FromHost::Welcome { version: 1 };
    assert_eq!(read(&serde_json::to_string(&welcome).unwrap()).unwrap(), welcome);
    for wrong in [r#"{"type":"response","id":7}"#, r#"{"type":"other"}"#, r#"{"version":1}"#, "[]"] {
        assert!(read(wrong).is_err(), "{wrong}");
    }
}

#[tokio::test]
async fn what_breaks_the_rules_ends_its_connection_only() {
    let host = Host::new(ServerOptions::default());
    let (good, mut answers) = host.raw().await;
    let frame = |m: &ToHost| {
        let mut bytes = header(0, 0).to_vec();
        serde_json::to_writer(&mut bytes, m).unwrap();
        let length = (bytes.len() - HEADER) as u32;
        bytes[..HEADER].copy_from_slice(&header(length, 0));
        bytes
    };
    let facts = serde_json::json!({"call": "host_facts", "request": null});
    let hang = serde_json::json!({"call": "pool_usage", "request": uuid::Uuid::nil()});
    host.agent.inject("pool_usage", Fault::HangBefore);
    let mut reserved = frame(&ToHost::Subscribe);
    reserved[6] = 1;
    let bad: Vec<Vec<u8>> = vec![
        header(MAX_FRAME as u32 + 1, 0).to_vec(),
        header(u32::MAX, 0).to_vec(),
        header(4, 1).iter().copied().chain(*b"null").collect(),
        header(4, 0).iter().copied().chain(*b"null").collect(),
        header(0, 0).to_vec(),
        header(3, 0).iter().copied().chain([0xff, 0xfe, 0xfd]).collect(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        reserved,
        frame(&ToHost::Hello { versions: (1, 1), executor: None }),
        [frame(&ToHost::Subscribe), frame(&ToHost::Subscribe)].concat(),
        [frame(&request(5, hang.clone())), frame(&request(5, hang))].concat(),
    ];
    for bytes in bad {
        let (stream, reader) = host.raw().await;
        stream.writable().await.unwrap();
        assert_eq!(stream.try_write(&bytes).unwrap(), bytes.len());
        ends(&host.env, reader).await;
    }
    // A request in place of the hello.
    let stream = Arc::new(UnixStream::connect(&host.path).await.unwrap());
    Frame::new(&request(0, facts.clone()), vec![]).unwrap().send(&stream).await.unwrap();
    ends(&host.env, FrameReader::new(stream, true)).await;
    // The connection beside them never noticed.
    Frame::new(&request(1, facts), vec![]).unwrap().send(&good).await.unwrap();
    let (answer, _) = answers.next::<FromHost>().await.unwrap().unwrap();
    assert!(matches!(answer, FromHost::Response { id: 1, outcome: Outcome::Result(_) }));
}

#[tokio::test]
async fn the_host_takes_no_descriptors() {
    let host = Host::new(ServerOptions::default());
    let facts = request(0, serde_json::json!({"call": "host_facts", "request": null}));
    let body = serde_json::to_vec(&facts).unwrap();
    let before = open_fds();
    for (said, count, with_body) in
        [(0, 1, false), (1, 1, false), (4, 4, false), (0, 60, false), (0, 3, true)]
    {
        let (stream, reader) = host.raw().await;
        let fds: Vec<OwnedFd> =
            (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect();
        let head = header(body.len() as u32, said);
        if with_body {
            stream.writable().await.unwrap();
            stream.try_write(&head).unwrap();
            send_fds(&stream, &body, &fds).await;
        } else {
            send_fds(&stream, &[&head[..], &body].concat(), &fds).await;
        }
        drop(fds);
        ends(&host.env, reader).await;
    }
    host.still_answers().await;
    // Other tests of this program have some, too, as long as they run.
    let deadline = host.env.monotonic() + 15 * LONG;
    while open_fds() > before {
        assert!(host.env.monotonic() < deadline, "descriptors leaked: {} after {before}", open_fds());
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_client_checks_what_comes_with_an_answer() {
    let env = RealEnv::shared();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("host.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let lying = tokio::spawn(async move {
        for (said, count) in [(1, 2), (2, 1), (0, 1), (1, 0), (5, 4)] {
            let (stream, _) = listener.accept().await.unwrap();
            let stream = Arc::new(stream);
            let mut reader = FrameReader::new(stream.clone(), false);
            reader.next::<ToHost>().await.unwrap().unwrap();
            Frame::new(&FromHost::Welcome { version: 1 }, vec![]).unwrap().send(&stream).await.unwrap();
            let id = loop {
                if let (ToHost::Request { id, .. }, _) = reader.next().await.unwrap().unwrap() {
                    break id;
                }
            };
            let outcome = Outcome::Result(serde_json::value::to_raw_value(&()).unwrap());
            let body = serde_json::to_vec(&FromHost::Response { id, outcome }).unwrap();
            let bytes = [&header(body.len() as u32, said)[..], &body].concat();
            let fds: Vec<OwnedFd> =
                (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect();
            if fds.is_empty() {
                stream.try_write(&bytes).unwrap();
            } else {
                send_fds(&stream, &bytes, &fds).await;
            }
            // It hangs up by itself.
            assert!(!matches!(reader.next::<ToHost>().await, Ok(Some(_))));
        }
    });
    let client = Client::connect(env.clone(), &path, None).await.unwrap().agent();
    for _ in 0..5 {
        let e = client.host_facts(&CallContext::read(LONG), ()).await.unwrap_err();
        assert_eq!(e.kind, ErrorKind::Unavailable, "{e:?}");
    }
    lying.await.unwrap();
}

#[tokio::test]
async fn leaving_a_call_cancels_it_on_the_host() {
    let host = Host::new(ServerOptions::default());
    let client = host.client().await;
    host.agent.inject("pool_ensure", Fault::HangAfter);
    let context = change(1);
    let call = client.pool_ensure(&context, pool());
    // Left when the host is at it.
    let at_it = async {
        while host.agent.faults_left() > 0 {
            host.env.sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        answer = call => panic!("{answer:?}"),
        () = at_it => {}
    }
    // The host dropped it: a higher epoch, which waits for lower ones, passes.
    client.pool_ensure(&change(2), pool()).await.unwrap();
    // The deadline is kept on the host too.
    host.agent.inject("pool_remove", Fault::HangBefore);
    let mut short = change(2);
    short.deadline = Duration::from_secs(1);
    let e = client.pool_remove(&short, pool().id).await.unwrap_err();
    assert_eq!(e.kind, ErrorKind::Timeout, "{e:?}");
    client.pool_usage(&CallContext::read(LONG), pool().id).await.expect("it had no effect");
}

#[tokio::test]
async fn bounds_hold() {
    let host = Host::new(ServerOptions { max_in_flight: 4, max_connections: 3, ..ServerOptions::default() });
    let (stream, mut reader) = host.raw().await;
    for id in 0..6 {
        host.agent.inject("host_facts", Fault::HangBefore);
        let facts = serde_json::json!({"call": "host_facts", "request": null});
        Frame::new(&request(id, facts), vec![]).unwrap().send(&stream).await.unwrap();
    }
    for _ in 0..2 {
        match reader.next::<FromHost>().await.unwrap().unwrap().0 {
            FromHost::Response { id: 4 | 5, outcome: Outcome::Error(e) } => {
                assert_eq!(e.kind, ErrorKind::Unavailable)
            }
            other => panic!("{other:?}"),
        }
    }
    let _two = (host.raw().await, host.raw().await);
    let mut fourth = UnixStream::connect(&host.path).await.unwrap();
    let end = host.env.timeout(LONG, fourth.read_u8()).await.unwrap();
    assert!(end.is_err(), "no room");
}

/// More than a host takes of one kind of call, and all of them for long.
#[tokio::test]
async fn what_takes_long_holds_up_nothing_that_must_get_through() {
    const MANY: usize = 300;
    let host = Host::new(ServerOptions::default());
    let client = host.client().await;
    let stop = |n: u128, mode: StopMode| GuestStop {
        guest: GuestRef { instance: InstanceId(uuid::Uuid::from_u128(n)), generation: Generation::default() },
        mode,
    };
    for _ in 0..MANY {
        host.agent.inject("guest_stop", Fault::HangBefore);
    }
    let mut held = vec![];
    for n in 0..MANY {
        let (client, stop) = (client.clone(), stop(n as u128, StopMode::Graceful { timeout: LONG }));
        held.push(tokio::spawn(async move { client.guest_stop(&change(1), stop).await.map(drop) }));
    }
    // As many wait as there are guests to wait for.
    let all = async {
        while host.agent.faults_left() > 0 {
            host.env.sleep(Duration::from_millis(5)).await;
        }
    };
    host.env.timeout(LONG / 2, all).await.expect("guests that shut down slowly wait for each other");
    for n in 0..MANY {
        host.agent.inject("pool_flush", Fault::HangBefore);
        host.agent.inject("guest_start", Fault::HangBefore);
        let (flushing, starting) = (client.clone(), client.clone());
        held.push(tokio::spawn(
            async move { flushing.pool_flush(&CallContext::read(LONG), pool().id).await },
        ));
        let spec = guest(n as u128, uuid::Uuid::from_u128(1));
        held.push(tokio::spawn(async move { starting.guest_start(&change(1), spec).await.map(drop) }));
    }
    let all_places = async {
        while host.agent.count("pool_flush") < 192 || host.agent.count("guest_start") < 192 {
            host.env.sleep(Duration::from_millis(5)).await;
        }
    };
    host.env.timeout(LONG / 2, all_places).await.expect("they take their places");
    let urgent = async {
        client.guest_observe_all(&CallContext::read(LONG), ()).await.unwrap();
        // Whether it ever ran: it is answered.
        client.guest_stop(&change(1), stop(7, StopMode::Force)).await
    };
    let answer = host.env.timeout(LONG / 2, urgent).await.expect("a forced stop waits for what takes long");
    assert!(!answer.is_err_and(|e| e.is(ErrorKind::Timeout)));
    held.iter().for_each(|call| call.abort());
}

#[tokio::test]
async fn only_the_users_that_may_connect() {
    // Root always may, so the refusal is seen from a process that is not.
    if !backends::root() {
        return;
    }
    use std::os::unix::{fs::PermissionsExt, process::CommandExt};
    let host = Host::new(ServerOptions { uids: vec![54_321], ..ServerOptions::default() });
    std::fs::set_permissions(host.path.parent().unwrap(), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&host.path, PermissionsExt::from_mode(0o777)).unwrap();
    let attempt = async |uid: u32, path: &Path| {
        let script = "import socket,sys,struct\ns=socket.socket(socket.AF_UNIX)\ns.settimeout(20)\ns.connect(sys.argv[1])\n\
            b=b'{\"type\":\"hello\",\"versions\":[1,1],\"executor\":null}'\n\
            try:\n s.sendall(struct.pack('<II',len(b),0)+b)\n r=s.recv(100)\nexcept OSError: r=b''\nsys.exit(0 if r else 3)";
        let mut command = std::process::Command::new("python3");
        command.args(["-c", script]).arg(path).uid(uid).gid(uid);
        tokio::task::spawn_blocking(move || command.status().unwrap().code()).await.unwrap()
    };
    assert_eq!(attempt(54_321, &host.path).await, Some(0));
    assert_eq!(attempt(54_322, &host.path).await, Some(3));
}

#[tokio::test]
async fn a_host_process_that_dies_comes_back() {
    let mut host = Host::new(ServerOptions::default());
    let client = host.client().await;
    let mut events = client.events().await.unwrap();
    client.pool_ensure(&change(1), pool()).await.unwrap();
    host.agent.inject("pool_usage", Fault::HangBefore);
    let in_flight = tokio::spawn({
        let client = client.clone();
        async move { client.pool_usage(&CallContext::read(LONG), pool().id).await }
    });
    while host.agent.count("pool_usage") == 0 {
        tokio::task::yield_now().await;
    }
    host.die();
    let e = in_flight.await.unwrap().unwrap_err();
    assert_eq!(e.kind, ErrorKind::Unavailable, "{e:?}");
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.host_facts(&CallContext::read(LONG), ()).await }
    });
    host.start();
    waiting.await.unwrap().expect("later calls wait for it");
    assert!(client.pool_usage(&CallContext::read(LONG), pool().id).await.is_ok(), "as it was");
    let lost = host.env.timeout(LONG, async {
        while events.recv().await.expect("the subscription lives on") != AgentEvent::Lost {}
    });
    lost.await.unwrap();
}

#[tokio::test]
async fn a_host_that_stays_away_is_unavailable_in_time() {
    let env = RealEnv::shared();
    let client = Client::start(env.clone(), "/nonexistent/host.sock", None).agent();
    let began = env.monotonic();
    let context = CallContext::read(Duration::from_millis(200));
    let e = client.host_facts(&context, ()).await.unwrap_err();
    assert_eq!(e.kind, ErrorKind::Unavailable, "{e:?}");
    assert!(env.monotonic() - began < LONG);
}

fn guest(n: u128, volume: uuid::Uuid) -> karst_model::spec::GuestSpec {
    serde_json::from_value(serde_json::json!({
        "instance": uuid::Uuid::from_u128(n), "kind": "container", "generation": {"incarnation": 1, "n": 1},
        "spec_version": 1, "hostname": "c1", "domain_id": 1, "machine": null,
        "limits": {"cpu": null, "cpu_allowance": null, "memory": null, "processes": null},
        "root": {"device": uuid::Uuid::from_u128(3), "name": "root", "slot": "scsi0", "pool": pool().id,
                 "volume": volume},
        "nics": [], "cloud_init": {"instance_id": "x"},
    }))
    .unwrap()
}

#[tokio::test]
async fn sessions_end_with_their_connection() {
    let host = Host::new(ServerOptions::default());
    let client = host.client().await;
    let volume: karst_model::spec::VolumeSpec = serde_json::from_value(serde_json::json!({
        "id": uuid::Uuid::from_u128(1), "pool": pool().id, "content": "filesystem", "size": null,
        "source": {"kind": "empty"},
    }))
    .unwrap();
    client.pool_ensure(&change(1), pool()).await.unwrap();
    client.volume_create(&change(1), volume).await.unwrap();
    let spec = guest(2, uuid::Uuid::from_u128(1));
    let instance = spec.instance;
    client.guest_start(&change(1), spec).await.unwrap();
    let request = serde_json::from_value(serde_json::json!({"instance": instance, "request": {
        "command": ["cat"], "environment": {}, "uid": 0, "gid": 0, "cwd": null, "terminal": null, "term": null,
    }}))
    .unwrap();
    let exec = client.exec_start(&CallContext::read(LONG), request).await.unwrap();
    assert_eq!(exec.fds.len(), 3);
    drop(client);
    let watching = host.client().await;
    let gone = async {
        while watching.self_check(&CallContext::read(LONG), ()).await.unwrap().sessions > 0 {
            tokio::task::yield_now().await;
        }
    };
    host.env.timeout(LONG, gone).await.expect("the session was to end");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever bytes come, after a hello or instead of one: the connection ends or answers, the host goes on.
    #[test]
    fn garbage(hello in any::<bool>(), chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..6)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let host = Host::new(ServerOptions::default());
            let mut stream = UnixStream::connect(&host.path).await.unwrap();
            if hello {
                let mut bytes = header(46, 0).to_vec();
                bytes.extend(br#"{"type":"hello","versions":[1,1],"executor":null}"#);
                stream.write_all(&bytes).await.unwrap();
            }
            for chunk in chunks {
                if stream.write_all(&chunk).await.is_err() {
                    break;
                }
            }
            let _ = stream.shutdown().await;
            let mut rest = vec![];
            host.env.timeout(LONG, stream.read_to_end(&mut rest)).await.expect("it ends").ok();
            host.still_answers().await;
        });
    }

    /// A good frame that is cut anywhere, or whose body is damaged anywhere.
    #[test]
    fn damaged_frames(cut in 0usize..150, flip in prop::option::of((0usize..150, 1u8..))) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let host = Host::new(ServerOptions::default());
            let (stream, mut reader) = host.raw().await;
            let body = serde_json::to_vec(&request(1, serde_json::json!({"call": "host_facts", "request": null}))).unwrap();
            let mut bytes = [&header(body.len() as u32, 0)[..], &body].concat();
            if let Some((at, with)) = flip {
                let at = at % bytes.len();
                bytes[at] ^= with;
            }
            bytes.truncate(cut.max(1));
            stream.writable().await.unwrap();
            stream.try_write(&bytes).unwrap();
            rustix::net::shutdown(&*stream, rustix::net::Shutdown::Write).unwrap();
            let end = async { while let Ok(Some(_)) = reader.next::<FromHost>().await {} };
            host.env.timeout(LONG, end).await.expect("it ends");
            host.still_answers().await;
        });
    }
}

/// Simulated hosts are cheap enough for the tests of schedulers.
#[tokio::test]
async fn a_thousand_hosts_of_fifty_guests() {
    let env = RealEnv::shared();
    let began = env.monotonic();
    let mut hosts = vec![];
    for n in 0..1000 {
        let options = SimulatedOptions { name: format!("host{n}"), ..SimulatedOptions::default() };
        let host = SimulatedAgent::new(env.clone(), options);
        host.pool_ensure(&change(1), pool()).await.unwrap();
        for g in 0..50u128 {
            let volume = uuid::Uuid::from_u128(g + 1);
            let spec: karst_model::spec::VolumeSpec = karst_model::spec::VolumeSpec {
                id: volume.into(),
                pool: pool().id,
                content: karst_model::storage::VolumeContent::Filesystem,
                size: None,
                source: karst_model::spec::VolumeSource::Empty,
            };
            host.volume_create(&change(1), spec).await.unwrap();
            host.guest_start(&change(1), guest(g, volume)).await.unwrap();
        }
        hosts.push(host);
    }
    let context = CallContext::read(LONG);
    for host in &hosts {
        assert_eq!(host.guest_metrics(&context, vec![]).await.unwrap().len(), 50);
    }
    let took = env.monotonic() - began;
    eprintln!("1000 hosts, 50 guests each, simulated: {took:?}");
    assert!(took < Duration::from_secs(600), "{took:?}");
}
