//! The host's side against the real agent, served in this process, and against hostile ones; no virtual machine.

use super::*;
use async_trait::async_trait;
use karst_guest::{
    Applied, DiskFormat, Exec, ExecRequest, ExecStreams, GuestDriver, GuestFiles, Metrics, Observed,
    ResolvedGuest, StopMode,
    contract::{collect, content, request, write_of},
    samples,
};
use karst_guest_agent::{
    agent::{Port, serve},
    message::{Hello, Reply, Started, Welcome, Wire},
    wire::{Decoded, Decoder, Frame, NONCE, VERSION, WINDOW, channel, kind},
};
use karst_model::{ErrorKind, InstanceId, instance::InstanceKind};
use std::{
    fs::File,
    io::{Read, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    time::Instant,
};

/// A guest of one test: the agent serves in threads of this process until it ends.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// `None`, having said why, where it cannot be: programs change their user.
    fn new() -> Option<Self> {
        if !crate::backends::root() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(crate::launch::LINK)).unwrap();
        std::thread::spawn(move || {
            // What is written to /root and /tmp stays here; threads of this one see the same.
            // SAFETY: plain calls.
            unsafe {
                assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0);
                let none = null::<libc::c_char>();
                assert_eq!(
                    libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, null()),
                    0
                );
                for place in [c"/root", c"/mnt"] {
                    let kind = c"tmpfs".as_ptr();
                    assert_eq!(libc::mount(kind, place.as_ptr(), kind, 0, null()), 0);
                }
            }
            serve(Port::Socket(listener))
        });
        Some(Self { dir })
    }

    fn inside(&self) -> Arc<Inside> {
        let inside = Inside::new(self.dir.path().to_owned(), "v1".into());
        inside.port("karst", true);
        Arc::new(inside)
    }
}

fn null<T>() -> *const T {
    std::ptr::null()
}

/// As much of a driver as goes through the agent.
struct Driver(Arc<Inside>);

fn other<T>() -> Result<T> {
    Err(Error::unsupported("not of the agent"))
}

#[async_trait]
impl GuestDriver for Driver {
    fn kind(&self) -> InstanceKind {
        InstanceKind::VirtualMachine
    }
    async fn start(&self, _: &ResolvedGuest) -> Result<Observed> {
        other()
    }
    async fn stop(&self, _: InstanceId, _: StopMode) -> Result<Observed> {
        other()
    }
    async fn pause(&self, _: InstanceId) -> Result<Observed> {
        other()
    }
    async fn resume(&self, _: InstanceId) -> Result<Observed> {
        other()
    }
    async fn update(&self, _: &ResolvedGuest) -> Result<Applied> {
        other()
    }
    async fn observe(&self, _: InstanceId) -> Result<Observed> {
        other()
    }
    async fn adopt(&self) -> Result<Vec<Observed>> {
        other()
    }
    async fn destroy(&self, _: InstanceId) -> Result<()> {
        other()
    }
    async fn sample(&self, _: InstanceId, _: bool) -> Result<Metrics> {
        other()
    }
    async fn exec(&self, _: InstanceId, request: ExecRequest) -> Result<Exec> {
        self.0.exec(&BTreeMap::new(), request).await
    }
    async fn console(&self, _: InstanceId, _: bool) -> Result<OwnedFd> {
        other()
    }
    async fn console_log(&self, _: InstanceId, _: usize, _: bool) -> Result<Vec<u8>> {
        other()
    }
    fn files(&self) -> Option<&dyn GuestFiles> {
        Some(self)
    }
    fn events(&self) -> tokio::sync::mpsc::Receiver<Observed> {
        tokio::sync::mpsc::channel(1).1
    }
}

#[async_trait]
impl GuestFiles for Driver {
    async fn open(&self, _: InstanceId, _: Option<&Path>, path: &str) -> Result<OpenedFile> {
        self.0.open(path).await
    }
    async fn write(
        &self,
        _: InstanceId,
        _: Option<&Path>,
        request: FileWrite,
        content: Option<OwnedFd>,
    ) -> Result<()> {
        self.0.write(request, content).await
    }
    async fn delete(&self, _: InstanceId, _: Option<&Path>, path: &str) -> Result<()> {
        self.0.delete(path).await
    }
}

fn guest(state_dir: PathBuf) -> ResolvedGuest {
    let root = samples::disk("root", "virtio0", "/nonexistent", DiskFormat::Raw);
    ResolvedGuest { state_dir, ..samples::guest(InstanceKind::VirtualMachine, root) }
}

async fn shell(inside: &Inside, script: &str) -> karst_guest::contract::Ran {
    let exec = inside.exec(&BTreeMap::new(), request(&["sh", "-c", script])).await.unwrap();
    collect(exec, b"").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_terminals_and_files_keep_the_contract() {
    let Some(place) = Place::new() else { return };
    let driver = Driver(place.inside());
    karst_guest::contract::inside(&driver, &guest(place.dir.path().to_owned())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn input_flows_while_output_does_and_a_stalled_program_holds_nobody_up() {
    let Some(place) = Place::new() else { return };
    let inside = place.inside();
    // Writes without end, and nobody reads it.
    let stalled = inside.exec(&BTreeMap::new(), request(&["yes", "stalled"])).await.unwrap();
    // Never reads, and much is written to it.
    let deaf = inside.exec(&BTreeMap::new(), request(&["sleep", "1000"])).await.unwrap();
    let ExecStreams::Pipes { stdin, .. } = &deaf.streams else { panic!() };
    let mut stdin = File::from(stdin.try_clone().unwrap());
    let fed = std::thread::spawn(move || stdin.write_all(&vec![b'x'; 4 << 20]));

    let cat = inside.exec(&BTreeMap::new(), request(&["cat"])).await.unwrap();
    let ExecStreams::Pipes { stdin, stdout, stderr } = cat.streams else { panic!() };
    let control = cat.control;
    let echoed = tokio::task::spawn_blocking(move || {
        let (mut to, mut from) = (File::from(stdin), File::from(stdout));
        for n in 0..50 {
            let line = format!("line {n}\n");
            to.write_all(line.as_bytes()).unwrap();
            let mut back = vec![0; line.len()];
            from.read_exact(&mut back).unwrap();
            assert_eq!(back, line.as_bytes());
        }
        drop(to);
        assert_eq!(from.read(&mut [0; 1]).unwrap(), 0);
        drop(stderr);
    });
    echoed.await.unwrap();
    assert_eq!(control.wait().await.unwrap(), 0);
    assert_eq!(shell(&inside, "echo on").await.stdout, "on\n");

    // Far more than all windows, in order and whole.
    let ran = shell(&inside, "i=0; while [ $i -lt 200000 ]; do echo $i; i=$((i+1)); done").await;
    assert!(ran.stdout.lines().enumerate().all(|(n, l)| l == n.to_string()));
    assert_eq!(ran.stdout.lines().count(), 200_000);

    drop((stalled, deaf));
    assert!(fed.join().unwrap().is_err(), "who feeds a program that is gone learns it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_ends_with_the_host_and_the_next_one_is_understood() {
    let Some(place) = Place::new() else { return };
    let socket = place.dir.path().join(crate::launch::LINK);
    let inside = place.inside();
    let r = request(&["sh", "-c", "(sleep 4242 & exec sleep 4242); sleep 4242"]);
    let exec = inside.exec(&BTreeMap::new(), r).await.unwrap();
    let count = "n=0; for p in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$p 2>/dev/null | grep -q '^sleep 4242' && n=$((n+1)); done; echo $n";
    let until = async |inside: &Inside, what: &str| {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            let n = shell(inside, count).await.stdout;
            if n.trim() == what {
                return;
            }
            assert!(Instant::now() < end, "{n} programs are left");
        }
    };
    until(&inside, "2").await;
    // The connection goes, as when the host's process is killed.
    inside.port("karst", false);
    let e = exec.control.wait().await.unwrap_err();
    assert!(e.is(ErrorKind::Unavailable), "{e:?}");

    // Somebody leaves in the middle of a frame, others speak nonsense.
    let open = Frame::new(kind::OPEN, 1, Request::Info(Nothing {}).encoded()).encode();
    let hello = Frame::new(kind::HELLO, 0, ([9u8; NONCE], (VERSION, VERSION)).encoded()).encode();
    for bytes in [
        [&hello[..], &open[..open.len() / 2]].concat(),
        hello[..7].to_vec(),
        vec![7; 300_000],
        [&hello[..], &Frame::new(kind::OPEN, 1, vec![99, 1, 2]).encode()].concat(),
        [&hello[..], &Frame::data(5, channel::IN, b"nobody's").encode()].concat(),
    ] {
        let mut s = UnixStream::connect(&socket).unwrap();
        s.write_all(&bytes).unwrap();
    }
    let after = place.inside();
    until(&after, "0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lets_go_of_a_guest_leaves_its_agent_to_the_next() {
    let Some(place) = Place::new() else { return };
    let inside = place.inside();
    assert_eq!(shell(&inside, "echo one").await.stdout, "one\n");
    // At once: its connection is not given back yet for want of use, and the agent serves one at a time.
    drop(inside);
    assert_eq!(shell(&place.inside(), "echo two").await.stdout, "two\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_that_is_left_is_hung_up_on() {
    let Some(place) = Place::new() else { return };
    let inside = place.inside();
    let (mark, up) = (place.dir.path().join("mark"), place.dir.path().join("up"));
    let script = format!(
        "trap 'echo hung > {}; exit' HUP; echo > {}; while :; do sleep 0.05; done",
        mark.display(),
        up.display()
    );
    let mut r = request(&["sh", "-c", &script]);
    r.terminal = Some((80, 24));
    let exec = inside.exec(&BTreeMap::new(), r).await.unwrap();
    let appears = async |file: &std::path::Path| {
        let end = Instant::now() + Duration::from_secs(60);
        while !file.exists() {
            assert!(Instant::now() < end, "{}", file.display());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // The trap is set.
    appears(&up).await;
    drop(exec);
    appears(&mark).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_files_many_names_and_refusals() {
    let Some(place) = Place::new() else { return };
    let inside = place.inside();
    let data: Vec<u8> = (0..3_000_001u32).map(|i| (i % 251) as u8).collect();
    inside.write(write_of("/mnt/large"), Some(content(&data))).await.unwrap();
    let opened = inside.open("/mnt/large").await.unwrap();
    assert_eq!((opened.info.size, opened.info.mode, opened.info.uid), (3_000_001, 0o644, 0));
    let back = opened.content.unwrap();
    let back = tokio::task::spawn_blocking(move || {
        let mut all = vec![];
        File::from(back).read_to_end(&mut all).unwrap();
        all
    });
    assert!(back.await.unwrap() == data);

    let made = shell(&inside, "mkdir /mnt/many; cd /mnt/many; i=0; while [ $i -lt 3000 ]; do : >a-name-that-is-rather-long-$i; i=$((i+1)); done; mkfifo /mnt/pipe; mkdir /mnt/small; mount -t tmpfs -o size=64k t /mnt/small").await;
    assert_eq!(made.code, 0, "{made:?}");
    assert_eq!(inside.open("/mnt/many").await.unwrap().entries.len(), 3000);
    let kind = |r: Result<()>| r.unwrap_err().kind;
    assert_eq!(kind(inside.open("/mnt/pipe").await.map(drop)), ErrorKind::Unsupported);
    assert_eq!(kind(inside.open("/mnt/nothing").await.map(drop)), ErrorKind::NotFound);
    assert_eq!(kind(inside.write(write_of("/mnt/pipe"), Some(content(b"x"))).await), ErrorKind::Unsupported);
    assert_eq!(kind(inside.write(write_of("/mnt/many"), Some(content(b"x"))).await), ErrorKind::Invalid);
    assert_eq!(kind(inside.write(write_of("/mnt/no/x"), Some(content(b"x"))).await), ErrorKind::NotFound);
    assert_eq!(kind(inside.write(write_of("/mnt/small/x"), Some(content(&data))).await), ErrorKind::Quota);
    let link = FileWrite {
        kind: karst_guest::FileKind::Symlink,
        target: Some("x".into()),
        ..write_of("/mnt/large")
    };
    assert_eq!(kind(inside.write(link, None).await), ErrorKind::Conflict);
    assert_eq!(kind(inside.delete("/mnt/many").await), ErrorKind::Conflict);
    let e = inside.exec(&BTreeMap::new(), request(&["x".repeat(70_000).as_str()])).await.err().unwrap();
    assert!(e.is(ErrorKind::TooLarge), "{e}");
}

#[test]
fn clients_that_send_nothing_more_hold_no_thread() {
    let Some(place) = Place::new() else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let inside = place.inside();
        let writes = crate::exec::stalled::Writes::begin(3, |n, source| {
            let (inside, path) = (inside.clone(), format!("/mnt/stalled{n}"));
            async move { inside.write(write_of(&path), Some(source)).await }
        });
        writes.hold_no_thread().await;
        for n in 0..3 {
            assert_eq!(shell(&inside, &format!("cat /mnt/stalled{n}")).await.stdout, "some and the rest");
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_sends_nothing_more_learns_of_the_guests_end() {
    let Some(place) = Place::new() else { return };
    let inside = place.inside();
    let (source, client) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    rustix::io::write(&client, b"some").unwrap();
    let writing = {
        let inside = inside.clone();
        tokio::spawn(async move { inside.write(write_of("/mnt/lost"), Some(source)).await })
    };
    crate::exec::stalled::taken(&client).await;
    inside.port("karst", false);
    let outcome = tokio::time::timeout(Duration::from_secs(30), writing).await.expect("the client waits");
    assert!(outcome.unwrap().unwrap_err().is(ErrorKind::Unavailable));
    drop(client);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_system_and_its_interfaces() {
    let Some(place) = Place::new() else { return };
    let inside = place.inside();
    let (figures, system) = inside.system().await;
    let (figures, system) = (figures.unwrap(), system.unwrap());
    assert!(!figures.processors.is_empty() && !figures.memory_parts.is_empty(), "{figures:?}");
    assert!(
        figures.processes > 0 && system.agent == AgentKind::Karst && !system.kernel.is_empty(),
        "{system:?}"
    );
    let interfaces = inside.interfaces(|_| Some("tap0".into())).await;
    let lo = &interfaces["lo"];
    assert!(lo.loopback && lo.host_name == "tap0", "{lo:?}");
    // Setting the time to what it is changes nothing.
    inside.set_time().await.unwrap();
    // So much at once, and not more.
    let many: Vec<_> = futures::future::join_all(
        (0..70).map(async |_| inside.exec(&BTreeMap::new(), request(&["sleep", "100"])).await),
    )
    .await;
    let refused = many
        .iter()
        .filter_map(|r| r.as_ref().err())
        .inspect(|e| assert!(e.is(ErrorKind::Unavailable), "{e}"))
        .count();
    assert_eq!(refused, 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_is_over_leaves_its_place_to_others() {
    let Some(place) = Place::new() else { return };
    let inside = place.inside();
    // Each leaves something behind that holds its output open.
    for n in 0..65 {
        let exec = inside.exec(&BTreeMap::new(), request(&["sh", "-c", "sleep 30 & exit 0"])).await;
        let exec = exec.unwrap_or_else(|e| panic!("{n}: {e:?}"));
        assert_eq!(exec.control.wait().await.unwrap(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_program_leaves_in_the_background_may_go_on_to_write() {
    let Some(place) = Place::new() else { return };
    let inside = place.inside();
    let script = "(sleep 1; echo nobody hears; echo it goes on >/mnt/after) & exit 0";
    let exec = inside.exec(&BTreeMap::new(), request(&["sh", "-c", script])).await.unwrap();
    assert_eq!(exec.control.wait().await.unwrap(), 0);
    drop(exec);
    let end = std::time::Instant::now() + Duration::from_secs(30);
    while shell(&inside, "cat /mnt/after 2>/dev/null; true").await.stdout.trim() != "it goes on" {
        assert!(std::time::Instant::now() < end, "its next word ended it");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A guest that answers the handshake, and then `bytes` to the first request; whatever it says to the handshake comes of
/// `welcome`.
fn hostile(
    welcome: impl Fn(Hello) -> Vec<u8> + Send + 'static,
    bytes: Vec<u8>,
) -> (tempfile::TempDir, Arc<Inside>) {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join(crate::launch::LINK)).unwrap();
    std::thread::spawn(move || {
        for s in listener.incoming() {
            let Ok(mut s) = s else { return };
            let mut decoder = Decoder::default();
            let mut buffer = [0; 65536];
            while let Ok(n @ 1..) = s.read(&mut buffer) {
                let mut frames = vec![];
                decoder.push(&buffer[..n], |d| frames.push(d));
                for f in frames {
                    let Decoded::Frame(f) = f else { continue };
                    // The host may leave meanwhile.
                    let _ = match f.kind {
                        kind::HELLO => s.write_all(&welcome(Hello::decoded(&f.payload).unwrap())),
                        kind::OPEN => s.write_all(&bytes),
                        _ => Ok(()),
                    };
                }
            }
        }
    });
    let inside = Inside::new(dir.path().to_owned(), "v1".into());
    inside.port("karst", true);
    (dir, Arc::new(inside))
}

fn welcome((nonce, _): Hello) -> Vec<u8> {
    Frame::new(kind::WELCOME, 0, Welcome { nonce, version: VERSION, program: "x".into() }.encoded()).encode()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_guest_loses_its_connection_and_is_left_alone_for_a_while() {
    let started = Frame::new(kind::REPLY, 1, Reply(Ok(Started { pid: 1 })).encoded()).encode();
    // More than the window and what the pipe that nobody reads takes, for which credit is given again.
    let flood: Vec<u8> = (0..2 * WINDOW / 1000 + 100)
        .flat_map(|_| Frame::data(1, channel::OUT, &[b'x'; 1000]).encode())
        .collect();
    for (what, bytes) in [
        ("no frame", b"\x05ab\0".to_vec()),
        ("not opened", Frame::new(kind::REPLY, 7, vec![0]).encode()),
        ("two answers", [started.clone(), started.clone(), started.clone()].concat()),
        ("no answer", Frame::new(kind::REPLY, 1, vec![9, 9]).encode()),
        ("without credit", [started.clone(), flood].concat()),
        (
            "after the end",
            [
                started.clone(),
                Frame::eof(1, channel::OUT).encode(),
                Frame::data(1, channel::OUT, b"x").encode(),
            ]
            .concat(),
        ),
        ("unknown channel", [started.clone(), Frame::data(1, 9, b"x").encode()].concat()),
        ("channel of input", [started.clone(), Frame::data(1, channel::IN, b"x").encode()].concat()),
        ("credit for nothing", [started.clone(), Frame::credit(1, channel::IN, 1).encode()].concat()),
        ("cut", [started.clone(), Frame::new(kind::CREDIT, 1, vec![0, 1]).encode()].concat()),
        ("no end", [started.clone(), Frame::new(kind::END, 1, vec![]).encode()].concat()),
    ] {
        let (_dir, inside) = hostile(welcome, bytes);
        let failed = async {
            match inside.exec(&BTreeMap::new(), request(&["true"])).await {
                Err(e) => e,
                // Nobody reads, as it may be: it is the connection that ends.
                Ok(exec) => exec.control.wait().await.unwrap_err(),
            }
        };
        let e = tokio::time::timeout(Duration::from_secs(20), failed)
            .await
            .unwrap_or_else(|_| panic!("{what}: hangs"));
        assert!(e.is(ErrorKind::Unavailable), "{what}: {e:?}");
        let e = inside.exec(&BTreeMap::new(), request(&["true"])).await.err().unwrap();
        assert!(e.context.as_deref().is_some_and(|c| c.contains("left alone")), "{what}: {e:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_are_none() {
    let leftovers = |hello: Hello| {
        let mut bytes = vec![0xff; 70_000];
        bytes.push(0);
        bytes.extend(Frame::data(1, channel::OUT, b"somebody else's").encode());
        let other = Welcome { nonce: [1; NONCE], version: VERSION, program: String::new() };
        bytes.extend(Frame::new(kind::WELCOME, 0, other.encoded()).encode());
        bytes.extend(Frame::new(kind::READY, 0, vec![]).encode());
        bytes.extend(welcome(hello));
        bytes
    };
    let refused = Reply::<Nothing>(Err(message::Refused {
        code: 8,
        field: "a b\u{7}c=".into(),
        text: "no\n\u{1b}[31mroom".into(),
    }));
    let answer = Frame::new(kind::REPLY, 1, refused.encoded()).encode();
    let (_dir, inside) = hostile(leftovers, answer);
    let e = inside.exec(&BTreeMap::new(), request(&["true"])).await.err().unwrap();
    assert!(e.is(ErrorKind::Unavailable) && e.message.contains("room"), "{e:?}");
    assert!(!e.message.contains(['\n', '\u{1b}']) && e.field.as_deref() == Some("abc"), "{e:?}");

    let (_dir, inside) = hostile(|_| vec![b'x'; 5 << 20], vec![]);
    let e = inside.exec(&BTreeMap::new(), request(&["true"])).await.err().unwrap();
    assert!(e.context.is_some_and(|c| c.contains("handshake")));
    let none = |(nonce, _): Hello| {
        Frame::new(kind::WELCOME, 0, Welcome { nonce, version: 0, program: String::new() }.encoded()).encode()
    };
    let (_dir, inside) = hostile(none, vec![]);
    let e = inside.exec(&BTreeMap::new(), request(&["true"])).await.err().unwrap();
    assert!(e.is(ErrorKind::Unsupported) && e.message.contains("restart"), "{e:?}");
    // An agent that starts again knows nothing of what was open; that is no offence.
    let (_dir, inside) = hostile(welcome, Frame::new(kind::READY, 0, vec![]).encode());
    for _ in 0..2 {
        let e = inside.exec(&BTreeMap::new(), request(&["true"])).await.err().unwrap();
        assert!(e.is(ErrorKind::Unavailable) && e.message.contains("does not answer"), "{e:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn samples_leave_a_silent_guest_alone_until_it_answers() {
    // It answers the handshake at all times, and requests when it may.
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join(crate::launch::LINK)).unwrap();
    let may = Arc::new(AtomicBool::new(false));
    let answers = may.clone();
    std::thread::spawn(move || {
        for s in listener.incoming() {
            let Ok(mut s) = s else { return };
            let mut decoder = Decoder::default();
            let mut buffer = [0; 65536];
            while let Ok(n @ 1..) = s.read(&mut buffer) {
                let mut frames = vec![];
                decoder.push(&buffer[..n], |d| frames.push(d));
                for f in frames {
                    let Decoded::Frame(f) = f else { continue };
                    let reply = match f.kind {
                        kind::HELLO => welcome(Hello::decoded(&f.payload).unwrap()),
                        kind::OPEN if answers.load(Ordering::SeqCst) => {
                            let reply = match Request::decoded(&f.payload).unwrap() {
                                Request::Interfaces(_) => {
                                    let lo = message::Interface { name: "lo".into(), ..Default::default() };
                                    Reply(Ok(message::Interfaces { list: vec![lo] })).encoded()
                                }
                                Request::Figures(_) => Reply(Ok(Figures::default())).encoded(),
                                _ => Reply(Ok(Info { os: "x".into(), ..Default::default() })).encoded(),
                            };
                            Frame::new(kind::REPLY, f.stream, reply).encode()
                        }
                        _ => continue,
                    };
                    // The host may leave meanwhile.
                    let _ = s.write_all(&reply);
                }
            }
        }
    });
    let inside = Arc::new(Inside::new(dir.path().to_owned(), "v1".into()));
    inside.port("karst", true);
    let sample = async || {
        let began = Instant::now();
        let (interfaces, (_, system)) = tokio::join!(inside.interfaces(|_| None), inside.system());
        (interfaces.len(), system.is_some(), began.elapsed())
    };
    let (interfaces, system, took) = sample().await;
    assert!((interfaces, system) == (0, false) && took >= FIGURES, "{took:?}");
    let began = Instant::now();
    for _ in 0..100 {
        sample().await;
    }
    assert!(began.elapsed() < FIGURES * 50, "each waited: {:?}", began.elapsed());
    may.store(true, Ordering::SeqCst);
    let began = Instant::now();
    loop {
        let (interfaces, system, _) = sample().await;
        if (interfaces, system) == (1, true) {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "it is left alone for good");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // One that begins anew is asked at once; where a thread stands still its answer may come too late, once.
    may.store(false, Ordering::SeqCst);
    assert!(sample().await.2 >= FIGURES);
    let anew = async || {
        may.store(false, Ordering::SeqCst);
        sample().await;
        may.store(true, Ordering::SeqCst);
        inside.port("karst", false);
        inside.port("karst", true);
        sample().await.0 == 1
    };
    assert!(anew().await || anew().await || anew().await, "it is left alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_are_mounted_in_their_order_whenever_the_port_opens() {
    // It is not ready for the first that is asked for, and cannot mount the second at all.
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join(crate::launch::LINK)).unwrap();
    let (asked, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut times = 0;
        for s in listener.incoming() {
            let Ok(mut s) = s else { return };
            let mut decoder = Decoder::default();
            let mut buffer = [0; 65536];
            while let Ok(n @ 1..) = s.read(&mut buffer) {
                let mut frames = vec![];
                decoder.push(&buffer[..n], |d| frames.push(d));
                for f in frames {
                    let Decoded::Frame(f) = f else { continue };
                    let reply = match f.kind {
                        kind::HELLO => welcome(Hello::decoded(&f.payload).unwrap()),
                        kind::OPEN => {
                            // The third is shared in another way.
                            let m = match Request::decoded(&f.payload) {
                                Ok(Request::Mount(m)) if m.tag != "third" => m,
                                Ok(Request::MountVirtiofs(m)) if m.tag == "third" => m,
                                _ => continue,
                            };
                            times += 1;
                            let refused = |code| {
                                Err(message::Refused { code, field: String::new(), text: "no".into() })
                            };
                            let answer = match m.tag.as_str() {
                                _ if times == 1 => refused(message::refusal::BUSY),
                                "second" => refused(message::refusal::UNSUPPORTED),
                                _ => Ok(Nothing {}),
                            };
                            let _ = asked.send(m);
                            Frame::new(kind::REPLY, f.stream, Reply(answer).encoded()).encode()
                        }
                        _ => continue,
                    };
                    // The host may leave meanwhile.
                    let _ = s.write_all(&reply);
                }
            }
        }
    });
    let mount = |tag: &str| SharedDirectory {
        mount: message::Mount { tag: tag.into(), path: format!("/mnt/{tag}"), readonly: false },
        virtiofs: tag == "third",
    };
    let wanted = ["first", "second", "third"].map(mount);
    let inside = Inside::new(dir.path().to_owned(), "v1".into()).with_directories(wanted.to_vec());
    let next = || heard.recv_timeout(Duration::from_secs(60)).unwrap().tag;
    inside.port("karst", true);
    // Again until it can, and what cannot be is no hindrance for the rest.
    assert_eq!([next(), next(), next(), next()], ["first", "first", "second", "third"]);
    // Told once more nothing is done; an agent that begins anew is asked anew.
    inside.port("karst", true);
    inside.port("karst", false);
    inside.port("karst", true);
    assert_eq!([next(), next(), next()], ["first", "second", "third"]);
    assert!(heard.try_recv().is_err());
}

#[test]
fn which_agent_answers() {
    let inside = Inside::new("/nonexistent".into(), "v1".into());
    assert_eq!(inside.kind(), None);
    inside.port("agent", true);
    inside.port("loader-incus", true);
    assert_eq!(inside.kind(), Some(AgentKind::Qemu));
    inside.ports(&json!([{"label": "karst", "frontend-open": true}, {"label": 7}, 8]));
    assert_eq!(inside.kind(), Some(AgentKind::Karst));
    inside.port("karst", false);
    assert_eq!(inside.kind(), Some(AgentKind::Qemu));
}

#[test]
fn interfaces_of_a_guest_are_matched_by_mac_and_bounded() {
    let v = json!([
        {"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1", "prefix": 8}], "hardware-address": "00:00:00:00:00:00"},
        {"name": "enp0s8\u{7}", "hardware-address": "10:66:6A:00:00:01",
         "ip-addresses": [{"ip-address": "10.1.2.3", "prefix": 24}, {"ip-address": "fe80::1", "prefix": 64}, {"ip-address": "junk"}],
         "statistics": {"rx-bytes": 5, "tx-packets": 6}},
        7,
    ]);
    let got = interfaces_of_qemu(&v, |mac| (mac == "10:66:6a:00:00:01").then(|| "no-such-tap".into()));
    assert!(got["lo"].loopback);
    let e = &got["enp0s8"];
    assert_eq!((e.host_name.as_str(), e.counters), ("no-such-tap", [5, 0, 0, 6]));
    assert_eq!(e.addresses.iter().map(|a| a.2.as_str()).collect::<Vec<_>>(), ["global", "link"]);
    let many = Value::Array((0..5000).map(|i| json!({"name": format!("e{i}")})).collect());
    assert_eq!(interfaces_of_qemu(&many, |_| None).len(), MOST);
}
