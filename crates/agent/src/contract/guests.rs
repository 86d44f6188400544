//! Guests of one kind, from their image to their end.

use super::*;
use karst_model::{
    SessionId, SnapshotId,
    device::{ParentLink, RoutedLink},
    display::{DisplayGuard, DisplayPassword},
    guest::{
        AskedBy, ExecRequest, FileKind, FileWrite, GuestWish, MonitorAnswer, MonitorEvent, Observed, StopMode,
    },
    instance::{ExitReason, RuntimeState},
};
use std::net::Ipv4Addr;

struct Guest<'a> {
    s: &'a Subject,
    spec: GuestSpec,
    root: VolumeRef,
}

impl Guest<'_> {
    fn at(&self) -> GuestRef {
        GuestRef { instance: self.spec.instance, generation: self.spec.generation }
    }

    async fn stop(&self, mode: StopMode) -> Observed {
        let request = GuestStop { guest: self.at(), mode };
        self.s.agent.guest_stop(&self.s.change(), request).await.unwrap()
    }

    fn request(&self, command: &[&str]) -> ExecStart {
        ExecStart {
            instance: self.spec.instance,
            request: ExecRequest {
                command: command.iter().map(|s| (*s).to_owned()).collect(),
                environment: Default::default(),
                uid: 0,
                gid: 0,
                cwd: None,
                terminal: None,
                term: None,
            },
        }
    }

    async fn exec(&self, command: &[&str]) -> Result<(SessionId, Vec<OwnedFd>)> {
        self.s.agent.entry_expected(&self.s.read(), ()).await?;
        let started = self.s.agent.exec_start(&self.s.read(), self.request(command)).await?;
        Ok((started.value, started.fds))
    }

    /// Exit code, standard output, standard error.
    async fn output(&self, command: &[&str], input: &[u8]) -> (i32, String, String) {
        let (session, fds) = self.exec(command).await.unwrap();
        let [stdin, stdout, stderr]: [OwnedFd; 3] = fds.try_into().expect("three descriptors");
        let feed = write_all(stdin, input.to_vec());
        let (_, stdout, stderr) = tokio::join!(feed, read_all(stdout), read_all(stderr));
        let code = self.s.agent.session_wait(&self.s.read(), session).await.unwrap();
        let again = self.s.agent.session_wait(&self.s.read(), session).await.expect("until it is closed");
        assert_eq!(code, again);
        self.s.agent.session_close(&self.s.read(), session).await.unwrap();
        let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
        (code, text(stdout), text(stderr))
    }

    fn file(&self, path: &str) -> FileRef {
        FileRef { instance: self.spec.instance, kind: self.spec.kind, root: self.root, path: path.into() }
    }
}

pub(super) async fn all(s: &Subject, kind: InstanceKind, source: &ImageSource) {
    let agent = &s.agent;
    let pool = s.pool().await;
    let (image, _) = s.image(source).await;
    let volume = s.volume(pool, kind, Some(image));
    let mut root = VolumeRef { pool, volume: volume.id };
    agent.volume_create(&s.change(), volume.clone()).await.unwrap();
    agent.volume_create(&s.change(), volume).await.expect("twice is once");
    let network = s.network();
    agent.network_ensure(&s.change(), network.clone()).await.unwrap();
    let mut events = agent.events().await.unwrap();
    let mut guest = Guest { s, spec: s.guest(kind, root, network.id), root };

    eprintln!("contract: {kind}: refused starts");
    Box::pin(refused_starts(&guest)).await;
    eprintln!("contract: {kind}: start");
    Box::pin(start(&guest)).await;
    let seen = s.until("the start as an event", s.boot, async || match events.try_recv() {
        Ok(AgentEvent::Guest { observed }) if observed.instance == guest.spec.instance => Some(observed),
        _ => None,
    });
    assert!(matches!(seen.await.state, RuntimeState::Running | RuntimeState::Starting));
    eprintln!("contract: {kind}: metrics and address");
    Box::pin(metrics(&guest)).await;
    eprintln!("contract: {kind}: exec");
    Box::pin(exec(&guest)).await;
    eprintln!("contract: {kind}: files");
    Box::pin(files(&guest)).await;
    eprintln!("contract: {kind}: kept output, console");
    Box::pin(outputs(&guest)).await;
    Box::pin(console(&guest)).await;
    eprintln!("contract: {kind}: pause, update");
    Box::pin(machine_only(&guest)).await;
    Box::pin(pause_and_update(&guest)).await;
    if kind == InstanceKind::VirtualMachine {
        eprintln!("contract: {kind}: threads");
        Box::pin(threads::of_a_machine(s, &guest.spec)).await;
        eprintln!("contract: {kind}: checkpoints and backups of its disk");
        Box::pin(checkpoints::of_a_root(s, &guest.spec, root)).await;
        eprintln!("contract: {kind}: its memory in files");
        Box::pin(memory::of_a_machine(s, &guest.spec)).await;
        eprintln!("contract: {kind}: copies of its disk");
        root = Box::pin(copies::of_a_root(s, &guest.spec, root)).await;
        guest.root = root;
        (guest.spec.root.pool, guest.spec.root.volume) = (root.pool, root.volume);
        s.until("exec from the copy", s.boot, async || guest.exec(&["true"]).await.ok()).await;
        eprintln!("contract: {kind}: layers of its disk");
        Box::pin(layers::of_a_root(s, &guest.spec, root)).await;
        s.until("exec from what is left", s.boot, async || guest.exec(&["true"]).await.ok()).await;
    }

    eprintln!("contract: {kind}: stop");
    refused(agent.guest_destroy(&s.change(), guest.spec.instance).await, ErrorKind::Conflict);
    refused(agent.volume_delete(&s.change(), root).await, ErrorKind::Conflict);
    let session = guest.exec(&["sleep", "1000"]).await.unwrap().0;
    let observed = guest.stop(StopMode::Force).await;
    assert_eq!((observed.state, observed.pid), (RuntimeState::Stopped, None));
    assert_eq!(observed.exit, Some(ExitReason::Forced));
    let code = agent.session_wait(&s.read(), session).await;
    assert!(code.is_err() || code.is_ok_and(|c| c != 0), "its exec ended with it");
    agent.session_close(&s.read(), session).await.unwrap();
    assert_eq!(guest.stop(StopMode::Force).await.state, RuntimeState::Stopped, "twice is once");
    s.until("the end as an event", s.boot, async || match events.try_recv() {
        Ok(AgentEvent::Guest { observed })
            if observed.instance == guest.spec.instance && observed.state == RuntimeState::Stopped =>
        {
            Some(())
        }
        _ => None,
    })
    .await;
    refused(guest.exec(&["true"]).await, ErrorKind::Conflict);

    if kind == InstanceKind::VirtualMachine {
        eprintln!("contract: {kind}: what it is beside its disk, for another");
        Box::pin(state_travels(&guest)).await;
        copies::after_the_end(s, guest.spec.instance, root, false).await;
    }
    eprintln!("contract: {kind}: start again, stop gracefully");
    let older = guest.at();
    guest.spec.generation = guest.spec.generation.next();
    Box::pin(start(&guest)).await;
    let stop = GuestStop { guest: older, mode: StopMode::Force };
    refused(agent.guest_stop(&s.change(), stop).await, ErrorKind::Conflict);
    s.until("exec", s.boot, async || guest.exec(&["true"]).await.ok()).await;
    let observed = guest.stop(StopMode::Graceful { timeout: s.boot }).await;
    assert_eq!((observed.state, observed.exit), (RuntimeState::Stopped, Some(ExitReason::Shutdown)));
    if kind == InstanceKind::VirtualMachine {
        eprintln!("contract: {kind}: a copy that its end breaks off");
        copies::after_the_end(s, guest.spec.instance, root, true).await;
        guest.spec.generation = guest.spec.generation.next();
        agent.guest_start(&s.change(), guest.spec.clone()).await.unwrap();
        Box::pin(copies::broken_off(s, &guest.spec, root)).await;
        eprintln!("contract: {kind}: memory that its end breaks off, and a start from a file");
        guest.spec.generation = guest.spec.generation.next();
        Box::pin(memory::over_an_end(s, &mut guest.spec)).await;
        eprintln!("contract: {kind}: a backup that its end breaks off");
        guest.spec.generation = guest.spec.generation.next();
        agent.guest_start(&s.change(), guest.spec.clone()).await.unwrap();
        Box::pin(checkpoints::broken_off(s, &guest.spec, root)).await;
    }

    eprintln!("contract: {kind}: destroy");
    agent.guest_destroy(&s.change(), guest.spec.instance).await.unwrap();
    agent.guest_destroy(&s.change(), guest.spec.instance).await.expect("twice is once");
    let gone = agent.guest_history(&s.read(), guest.spec.instance).await.unwrap();
    assert_eq!(gone, karst_model::history::empty(), "it goes with the guest");
    let known = agent.guest_observe_all(&s.read(), ()).await.unwrap();
    assert!(known.iter().all(|o| o.instance != guest.spec.instance));
    agent.volume_delete(&s.change(), root).await.unwrap();
    agent.network_remove(&s.change(), network.id).await.unwrap();
    agent.image_delete(&s.change(), image).await.unwrap();
    agent.pool_remove(&s.change(), pool).await.unwrap();
    if root.pool != pool {
        agent.pool_remove(&s.change(), root.pool).await.unwrap();
    }
    let check = s.until("ended sessions", s.boot, async || {
        let check = agent.self_check(&s.read(), ()).await.unwrap();
        (check.sessions == 0).then_some(check)
    });
    let check = check.await;
    assert!(check.leaks.is_empty(), "{check:?}");
}

async fn refused_starts(guest: &Guest<'_>) {
    let (s, agent) = (guest.s, &guest.s.agent);
    let mut spec = guest.spec.clone();
    spec.root.volume = VolumeId(s.env.uuid());
    refused(agent.guest_start(&s.change(), spec).await, ErrorKind::NotFound);
    let mut spec = guest.spec.clone();
    // What names the host is its policy's to grant.
    let ungranted = ParentLink { parent: "karst-no-such".into(), vlan: None, mode: Default::default() };
    let routed = RoutedLink {
        parent: None,
        addresses: vec!["203.0.113.9".parse().unwrap()],
        host: (Ipv4Addr::new(169, 254, 0, 1), "fe80::1".parse().unwrap()),
        gateways: (true, true),
    };
    for link in [
        NicLink::Bridge(ungranted.parent.clone()),
        NicLink::Macvlan(ungranted.clone()),
        NicLink::Physical(ungranted),
        NicLink::Routed { link: routed, routes: vec![] },
    ] {
        spec.nics[0].link = link;
        refused(agent.guest_start(&s.change(), spec.clone()).await, ErrorKind::Forbidden);
    }
    spec.nics[0].link = NicLink::Network(NetworkId(s.env.uuid()));
    refused(agent.guest_start(&s.change(), spec).await, ErrorKind::NotFound);
    let mut spec = guest.spec.clone();
    spec.nics[0].host_interface = "eth0".into();
    refused(agent.guest_start(&s.change(), spec).await, ErrorKind::Invalid);
    let known = agent.guest_observe_all(&s.read(), ()).await.unwrap();
    assert!(known.iter().all(|o| o.instance != guest.spec.instance || o.pid.is_none()));
}

async fn start(guest: &Guest<'_>) {
    let (s, agent) = (guest.s, &guest.s.agent);
    let observed = agent.guest_start(&s.change(), guest.spec.clone()).await.unwrap();
    assert_eq!((observed.instance, observed.generation), (guest.spec.instance, guest.spec.generation));
    assert_eq!(observed.state, RuntimeState::Running);
    assert!(observed.pid.is_some() && observed.started_at.is_some());
    let again = agent.guest_start(&s.change(), guest.spec.clone()).await.expect("twice is once");
    assert_eq!(again.pid, observed.pid, "the same start");
    let mut newer = guest.spec.clone();
    newer.generation = newer.generation.next();
    let never_made = GuestRef { instance: newer.instance, generation: newer.generation };
    refused(agent.guest_start(&s.change(), newer).await, ErrorKind::Conflict);
    // As the undo of that start does: what it did not start it does not end.
    let undo = GuestStop { guest: never_made, mode: StopMode::Force };
    refused(agent.guest_stop(&s.change(), undo).await, ErrorKind::NotFound);
    let mut older = guest.spec.clone();
    older.generation.n -= 1;
    refused(agent.guest_start(&s.change(), older).await, ErrorKind::Conflict);
    let known = agent.guest_observe_all(&s.read(), ()).await.unwrap();
    let known = known.into_iter().find(|o| o.instance == guest.spec.instance).unwrap();
    assert_eq!((known.pid, known.state), (observed.pid, RuntimeState::Running));
}

/// What programs print is kept by name, read and deleted.
async fn outputs(guest: &Guest<'_>) {
    let (s, agent, instance) = (guest.s, &guest.s.agent, guest.spec.instance);
    assert!(agent.exec_outputs(&s.read(), instance).await.unwrap().is_empty());
    let of = |n: u128, stream| ExecOutput { instance, operation: uuid::Uuid::from_u128(n).into(), stream };
    let keep = async |output: ExecOutput, text: Vec<u8>| {
        let kept = agent.exec_output_keep(&s.read(), output).await.unwrap();
        let [sink]: [OwnedFd; 1] = kept.fds.try_into().expect("one descriptor");
        write_all(sink, text).await;
        assert_eq!(agent.session_wait(&s.read(), kept.value).await.unwrap(), 0);
        agent.session_close(&s.read(), kept.value).await.unwrap();
    };
    let text = async |output: ExecOutput| {
        let opened = agent.exec_output_open(&s.read(), output).await.unwrap();
        let [file]: [OwnedFd; 1] = opened.fds.try_into().expect("one descriptor");
        read_all(file).await
    };
    let (out, err) = (of(1, OutputStream::Stdout), of(1, OutputStream::Stderr));
    keep(out, b"said\n".to_vec()).await;
    keep(err, vec![]).await;
    let mut all = agent.exec_outputs(&s.read(), instance).await.unwrap();
    all.sort();
    assert_eq!(all, [out, err]);
    assert_eq!((text(out).await, text(err).await), (b"said\n".to_vec(), vec![]));
    // The beginning of what is too long.
    keep(out, vec![b'x'; OUTPUT_BYTES as usize + 7]).await;
    assert_eq!(text(out).await.len() as u64, OUTPUT_BYTES);
    agent.exec_output_delete(&s.read(), out).await.unwrap();
    refused(agent.exec_output_delete(&s.read(), out).await, ErrorKind::NotFound);
    refused(agent.exec_output_open(&s.read(), out).await, ErrorKind::NotFound);
    // So many and no more.
    for n in 0..OUTPUTS as u128 {
        keep(of(n + 10, OutputStream::Stdout), vec![]).await;
    }
    assert_eq!(agent.exec_outputs(&s.read(), instance).await.unwrap().len(), OUTPUTS);
    let nobody = ExecOutput { instance: uuid::Uuid::nil().into(), ..out };
    refused(agent.exec_output_keep(&s.read(), nobody).await, ErrorKind::NotFound);
    refused(agent.exec_outputs(&s.read(), nobody.instance).await, ErrorKind::NotFound);
}

async fn metrics(guest: &Guest<'_>) {
    let (s, agent, id) = (guest.s, &guest.s.agent, guest.spec.instance);
    let first = s.until("metrics", s.boot, async || {
        let all = agent.guest_metrics(&s.read(), vec![]).await.unwrap();
        all.into_iter().find(|(i, m)| *i == id && m.cpu_ns.is_some())
    });
    let first = first.await.1;
    assert!(first.memory.is_some_and(|m| m > 0), "{first:?}");
    s.until("an address on eth0", s.boot, async || {
        let all = agent.guest_metrics(&s.read(), vec![id]).await.unwrap();
        let (_, metrics) = all.into_iter().next()?;
        let nic = metrics.interfaces.into_values().find(|i| i.mac == guest.spec.nics[0].mac)?;
        nic.addresses
            .iter()
            .any(|(a, _, _)| {
                s.ipv4.contains(&match a {
                    std::net::IpAddr::V4(a) => *a,
                    std::net::IpAddr::V6(_) => return false,
                })
            })
            .then_some(())
    })
    .await;
    let later = agent.guest_metrics(&s.read(), vec![id]).await.unwrap();
    assert!(later[0].1.cpu_ns >= first.cpu_ns);
    assert!(later[0].1.sampled_at >= first.sampled_at && first.sampled_at.is_some());
    // Details come only where they are asked for, and of the same guests.
    assert!(later[0].1.details.is_none(), "{later:?}");
    let detailed = agent.guest_details(&s.read(), vec![id]).await.unwrap();
    assert_eq!((detailed.len(), detailed[0].0), (1, id));
    let details = detailed[0].1.details.as_ref().expect("details");
    assert!(details.processors.iter().any(|p| p.modes.contains_key("user")), "{details:?}");
    assert!(details.memory.get("MemFree").is_some_and(|bytes| *bytes > 0), "{details:?}");
    assert!(agent.guest_details(&s.read(), vec![]).await.unwrap().iter().any(|(i, _)| *i == id));
    // What samples have said is kept, from the second one on, in all resolutions; traffic from the second that has any: a
    // machine's is told by the agent inside.
    let kept = s.until("a history", s.boot, async || {
        agent.guest_metrics(&s.read(), vec![id]).await.unwrap();
        let all = agent.guest_history(&s.read(), id).await.unwrap();
        let full = |p: &karst_model::history::Point| p.cpu.is_some() && p.received.is_some();
        all.iter().all(|series| series.points.last().is_some_and(full)).then_some(all)
    });
    let kept = kept.await;
    let shown: Vec<_> = kept.iter().map(|series| (series.seconds, series.kept)).collect();
    assert_eq!(shown, karst_model::history::PERIODS.map(|p| (p.seconds, p.kept)));
    let now = kept[0].points.last().unwrap();
    assert!(now.memory.is_some_and(|m| m > 0) && now.received.is_some() && now.measured_ms > 0, "{now:?}");
    assert!(kept.iter().all(|s| s.points.iter().all(|p| p.time % i64::from(s.seconds) == 0)), "{kept:?}");
    let nobody = InstanceId(uuid::Uuid::from_u128(99));
    assert_eq!(agent.guest_history(&s.read(), nobody).await.unwrap(), karst_model::history::empty());
    let leases = agent.network_leases(&s.read(), guest.spec.nics[0].network().unwrap()).await.unwrap();
    assert!(leases.iter().any(|l| l.mac == guest.spec.nics[0].mac), "{leases:?}");
    let state = agent.network_state(&s.read(), guest.spec.nics[0].network().unwrap()).await.unwrap();
    assert!(state.ports.contains(&guest.spec.nics[0].host_interface), "{state:?}");
}

async fn exec(guest: &Guest<'_>) {
    let (s, agent) = (guest.s, &guest.s.agent);
    s.until("exec", s.boot, async || guest.exec(&["true"]).await.ok()).await;
    assert_eq!(guest.output(&["true"], b"").await, (0, String::new(), String::new()));
    assert_eq!(guest.output(&["false"], b"").await.0, 1);
    assert_eq!(guest.output(&["sh", "-c", "exit 7"], b"").await.0, 7);
    assert_eq!(guest.output(&["echo", "a  b"], b"").await.1, "a  b\n");
    let (code, out, err) = guest.output(&["sh", "-c", "echo out; echo err >&2; exit 3"], b"").await;
    assert_eq!((code, out.as_str(), err.as_str()), (3, "out\n", "err\n"));
    let (code, _, _) = guest.output(&["karst-no-such-program"], b"").await;
    assert_eq!(code, 127);
    let long = "0123456789abcdef".repeat(20_000);
    assert_eq!(guest.output(&["cat"], long.as_bytes()).await.1, long, "{} bytes through stdin", long.len());
    refused(guest.exec(&[]).await, ErrorKind::Invalid);

    // A signal.
    let (session, _fds) = guest.exec(&["sleep", "1000"]).await.unwrap();
    let context = s.read();
    s.stays_away(agent.session_wait(&context, session)).await;
    let signal = SessionSignal { session, signal: 15 };
    agent.session_signal(&s.read(), signal).await.unwrap();
    assert_eq!(agent.session_wait(&s.read(), session).await.unwrap(), 128 + 15);
    agent.session_close(&s.read(), session).await.unwrap();
    refused(agent.session_wait(&s.read(), session).await, ErrorKind::NotFound);

    // A deadline ends a wait, and the session goes on.
    let (session, _fds) = guest.exec(&["sleep", "1000"]).await.unwrap();
    let mut short = s.read();
    short.deadline = Duration::from_millis(50);
    refused(agent.session_wait(&short, session).await, ErrorKind::Timeout);
    agent.session_signal(&s.read(), SessionSignal { session, signal: 9 }).await.unwrap();
    assert_eq!(agent.session_wait(&s.read(), session).await.unwrap(), 128 + 9);
    agent.session_close(&s.read(), session).await.unwrap();

    // Closing ends the program; environment, user, directory.
    let (session, fds) = guest.exec(&["cat"]).await.unwrap();
    agent.session_close(&s.read(), session).await.unwrap();
    let [_stdin, stdout, _stderr]: [OwnedFd; 3] = fds.try_into().unwrap();
    assert_eq!(read_all(stdout).await, b"");
    let mut request = guest.request(&["sh", "-c", "pwd; id -u; printenv KARST_TEST"]);
    request.request.cwd = Some("/tmp".into());
    request.request.uid = 1000;
    request.request.gid = 1000;
    request.request.environment.insert("KARST_TEST".into(), "a=b c".into());
    let started = agent.exec_start(&s.read(), request).await.unwrap();
    let [stdin, stdout, stderr]: [OwnedFd; 3] = started.fds.try_into().unwrap();
    drop(stdin);
    assert_eq!(String::from_utf8_lossy(&read_all(stdout).await), "/tmp\n1000\na=b c\n");
    drop(stderr);
    assert_eq!(agent.session_wait(&s.read(), started.value).await.unwrap(), 0);
    agent.session_close(&s.read(), started.value).await.unwrap();

    // A terminal of some size, and another while the program pauses: for longer where the change came too late.
    let shortest = if guest.spec.kind == InstanceKind::Container { 2 } else { 4 };
    for pause in [shortest, 8, 16, 32] {
        let script = format!("stty size; sleep {pause}; stty size; exit 5");
        let mut request = guest.request(&["sh", "-c", &script]);
        request.request.terminal = Some((81, 25));
        request.request.term = Some("xterm".into());
        let started = agent.exec_start(&s.read(), request).await.unwrap();
        let terminal = one(started.fds);
        let resize = SessionResize { session: started.value, columns: 120, rows: 40 };
        let output = async {
            let output = read_all(terminal).await;
            String::from_utf8_lossy(&output).into_owned()
        };
        let resized = async {
            s.env.sleep(Duration::from_millis(120)).await;
            agent.session_resize(&s.read(), resize).await
        };
        let (output, resized) = tokio::join!(output, resized);
        assert_eq!(agent.session_wait(&s.read(), started.value).await.unwrap(), 5);
        agent.session_close(&s.read(), started.value).await.unwrap();
        if resized.is_ok() && output.contains("40 120\r\n") {
            break;
        }
        assert!(pause < 32, "{output:?}, {resized:?}");
    }

    // Several at a time.
    let many = (0..8).map(|n| async move {
        let script = format!("exit {n}");
        guest.output(&["sh", "-c", script.as_str()], b"").await.0
    });
    assert_eq!(futures::future::join_all(many).await, (0..8).collect::<Vec<_>>());
}

async fn files(guest: &Guest<'_>) {
    let (s, agent) = (guest.s, &guest.s.agent);
    let write = |path: &str, kind| FileWriteRequest {
        file: guest.file(path),
        write: FileWrite {
            path: path.into(),
            kind,
            uid: Some(7),
            gid: Some(8),
            mode: Some(0o640),
            append: false,
            target: None,
        },
    };
    let mut directory = write("/tmp/karst-contract", FileKind::Directory);
    directory.write.mode = Some(0o755);
    let made = agent.file_write(&s.read(), directory).await.unwrap();
    assert_eq!((made.value, made.fds.len()), (None, 0));
    let request = write("/tmp/karst-contract/file", FileKind::File);
    for (append, data) in [(false, b"hello ".to_vec()), (true, b"world".to_vec())] {
        let mut request = request.clone();
        request.write.append = append;
        let writing = agent.file_write(&s.read(), request).await.unwrap();
        let session = writing.value.expect("a session");
        write_all(one(writing.fds), data).await;
        assert_eq!(agent.session_wait(&s.read(), session).await.unwrap(), 0);
        agent.session_close(&s.read(), session).await.unwrap();
    }
    let opened = agent.file_open(&s.read(), guest.file("/tmp/karst-contract/file")).await.unwrap();
    let info = &opened.value.info;
    assert_eq!((info.kind, info.uid, info.gid, info.mode), (FileKind::File, 7, 8, 0o640), "{info:?}");
    assert_eq!(info.size, 11);
    assert_eq!(read_all(one(opened.fds)).await, b"hello world");
    let opened = agent.file_open(&s.read(), guest.file("/tmp/karst-contract")).await.unwrap();
    assert_eq!(
        (opened.value.info.kind, opened.value.entries),
        (FileKind::Directory, vec!["file".to_owned()])
    );
    refused(agent.file_delete(&s.read(), guest.file("/tmp/karst-contract")).await, ErrorKind::Conflict);
    agent.file_delete(&s.read(), guest.file("/tmp/karst-contract/file")).await.unwrap();
    refused(agent.file_delete(&s.read(), guest.file("/tmp/karst-contract/file")).await, ErrorKind::NotFound);
    agent.file_delete(&s.read(), guest.file("/tmp/karst-contract")).await.unwrap();
    refused(agent.file_open(&s.read(), guest.file("/tmp/karst-contract")).await, ErrorKind::NotFound);
    refused(agent.file_open(&s.read(), guest.file("relative")).await, ErrorKind::Invalid);
    // The guest's own name, through whatever links its system has.
    let opened = agent.file_open(&s.read(), guest.file("/etc/os-release")).await.unwrap();
    let kind = opened.value.info.kind;
    assert!(matches!(kind, FileKind::File | FileKind::Symlink), "{kind:?}");
}

/// Somebody is told, once, that a machine has written behind a byte of its root; and nobody of a threshold that was taken away.
async fn thresholds(guest: &Guest<'_>) {
    let (s, agent) = (guest.s, &guest.s.agent);
    let root = guest.spec.root.slot.as_str();
    let to = |slot: &str, bytes| DiskThresholdSet { guest: guest.at(), slot: slot.into(), bytes };
    refused(agent.machine_threshold(&s.read(), to("scsi99", 1)).await, ErrorKind::Invalid);
    refused(agent.machine_threshold(&s.read(), to("../../x", 1)).await, ErrorKind::Invalid);
    refused(agent.machine_threshold(&s.read(), to(root, u64::MAX)).await, ErrorKind::Invalid);
    let mut events = agent.events().await.unwrap();
    let write = ["sh", "-c", "echo written > /karst-threshold; sync; rm -f /karst-threshold; sync"];
    // Nothing is written meanwhile.
    agent.guest_pause(&s.change(), guest.at()).await.unwrap();
    agent.machine_threshold(&s.read(), to(root, 1)).await.unwrap();
    agent.machine_threshold(&s.read(), to(root, 0)).await.unwrap();
    agent.guest_resume(&s.change(), guest.at()).await.unwrap();
    guest.output(&write, b"").await;
    agent.machine_threshold(&s.read(), to(root, 2)).await.unwrap();
    guest.output(&write, b"").await;
    let reached = s.until("a threshold that is reached", s.boot, async || match events.try_recv() {
        Ok(AgentEvent::DiskThreshold { reached }) if reached.instance == guest.spec.instance => Some(reached),
        _ => None,
    });
    let reached = reached.await;
    assert!((reached.slot.as_str(), reached.threshold) == (root, 2) && reached.excess > 0, "{reached:?}");
    guest.output(&write, b"").await;
    while let Ok(event) = events.try_recv() {
        assert!(!matches!(event, AgentEvent::DiskThreshold { .. }), "it is told once: {event:?}");
    }
}

async fn console(guest: &Guest<'_>) {
    let (s, agent) = (guest.s, &guest.s.agent);
    let instance = guest.spec.instance;
    let log = |max, clear| ConsoleLog { instance, max, clear, runner: false };
    let runner = ConsoleLog { runner: true, ..log(64, false) };
    assert!(agent.console_log(&s.read(), runner).await.unwrap().len() <= 64);
    s.until("something on the console", s.boot, async || {
        let log = agent.console_log(&s.read(), log(1 << 20, false)).await.unwrap();
        (!log.is_empty()).then_some(())
    })
    .await;
    assert!(agent.console_log(&s.read(), log(4, false)).await.unwrap().len() <= 4);
    let first = agent.console_attach(&s.read(), ConsoleAttach { instance, force: false }).await.unwrap();
    refused(
        agent.console_attach(&s.read(), ConsoleAttach { instance, force: false }).await,
        ErrorKind::Conflict,
    );
    let second = agent.console_attach(&s.read(), ConsoleAttach { instance, force: true }).await.unwrap();
    read_all(one(first.fds)).await; // its end: the other took over
    let size = SessionResize { session: second.value, columns: 120, rows: 40 };
    let resized = agent.session_resize(&s.read(), size).await;
    match guest.spec.kind {
        InstanceKind::Container => resized.unwrap(),
        // A serial line has no size; the simulation does not care.
        InstanceKind::VirtualMachine => assert!(!resized.is_err_and(|e| e.kind != ErrorKind::Unsupported)),
    }
    agent.session_close(&s.read(), first.value).await.unwrap();
    agent.session_close(&s.read(), second.value).await.unwrap();
    s.until("a console that is free again", s.boot, async || {
        let again = agent.console_attach(&s.read(), ConsoleAttach { instance, force: false }).await.ok()?;
        agent.session_close(&s.read(), again.value).await.unwrap();
        Some(())
    })
    .await;
    agent.console_log(&s.read(), log(1 << 20, true)).await.unwrap();
}

/// What a container cannot, and a virtual machine as far as it has the hardware.
async fn machine_only(guest: &Guest<'_>) {
    let (s, agent) = (guest.s, &guest.s.agent);
    let instance = guest.spec.instance;
    let keys = |key: &str| KeyPresses { instance, chords: vec![vec![key.to_owned()]] };
    let of_agent = |command: &str| AgentCommand {
        instance,
        command: command.into(),
        arguments: serde_json::json!({}),
        limit: Duration::from_secs(5),
    };
    let monitor = |command: &str| MonitorCommand {
        instance,
        command: command.into(),
        arguments: serde_json::json!({}),
    };
    let guard = |guard: Option<DisplayGuard>| DisplayGuardSet { instance, guard };
    if guest.spec.kind == InstanceKind::Container {
        refused(agent.guest_reset(&s.read(), guest.at()).await, ErrorKind::Unsupported);
        for (wish, by) in [(GuestWish::Reboot, AskedBy::Any), (GuestWish::Shutdown, AskedBy::Agent)] {
            let ask = GuestAsk { guest: guest.at(), wish, by };
            refused(agent.guest_ask(&s.read(), ask).await, ErrorKind::Unsupported);
        }
        refused(agent.guest_keys(&s.read(), keys("a")).await, ErrorKind::Unsupported);
        refused(agent.guest_screenshot(&s.read(), instance).await, ErrorKind::Unsupported);
        refused(agent.machine_interrupt(&s.read(), guest.at()).await, ErrorKind::Unsupported);
        refused(agent.guest_agent(&s.read(), of_agent("guest-ping")).await, ErrorKind::Unsupported);
        refused(agent.machine_monitor(&s.read(), monitor("query-status")).await, ErrorKind::Unsupported);
        let rate = DirtyRateRequest { instance, seconds: 1, mode: Default::default() };
        refused(agent.machine_dirty_rate(&s.read(), rate).await, ErrorKind::Unsupported);
        let threshold = DiskThresholdSet { guest: guest.at(), slot: guest.spec.root.slot.clone(), bytes: 1 };
        refused(agent.machine_threshold(&s.read(), threshold).await, ErrorKind::Unsupported);
        assert!(agent.machine_figures(&s.read(), vec![instance]).await.unwrap().is_empty());
        refused(agent.display_attach(&s.read(), instance).await, ErrorKind::Unsupported);
        refused(agent.display_guard(&s.read(), guard(None)).await, ErrorKind::Unsupported);
        let channel = SpiceChannel { instance, guard: None };
        refused(agent.display_attach_spice(&s.read(), channel).await, ErrorKind::Unsupported);
        let port = PortAttach { instance, port: "second".into(), force: false };
        refused(agent.port_attach(&s.read(), port).await, ErrorKind::Unsupported);
        return;
    }
    agent.guest_keys(&s.read(), keys("shift")).await.unwrap();
    // Nobody has touched its monitor; from the first command on its figures say that somebody did.
    let figures = async || agent.machine_figures(&s.read(), vec![instance]).await.unwrap().pop().unwrap().1;
    let before = figures().await;
    assert!(!before.monitored && before.dirty_rate.is_none());
    let mut events = std::fs::File::from(one(agent.machine_events(&s.read(), ()).await.unwrap().fds));
    let status = agent.machine_monitor(&s.read(), monitor("query-status")).await.unwrap();
    let MonitorAnswer::Returned(status) = status else { panic!("{status:?}") };
    assert_eq!(status["running"], true);
    let unknown = agent.machine_monitor(&s.read(), monitor("query-nonsense")).await.unwrap();
    assert!(matches!(unknown, MonitorAnswer::Refused { class, .. } if class == "CommandNotFound"));
    let mut text = monitor("human-monitor-command");
    text.arguments = serde_json::json!({"command-line": "info status"});
    let text = agent.machine_monitor(&s.read(), text).await.unwrap();
    assert!(
        matches!(text, MonitorAnswer::Returned(t) if t.as_str().unwrap().starts_with("VM status: running"))
    );
    let mut wrong = monitor("query-status");
    wrong.arguments = serde_json::json!([]);
    refused(agent.machine_monitor(&s.read(), wrong).await, ErrorKind::Invalid);
    for command in ["stop", "cont"] {
        agent.machine_monitor(&s.read(), monitor(command)).await.unwrap();
    }
    assert!(figures().await.monitored);
    let patience = s.boot;
    let heard = tokio::task::spawn_blocking(move || {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        rustix::io::ioctl_fionbio(&events, false).unwrap();
        set_socket_timeout(&events, Timeout::Recv, Some(patience)).unwrap();
        let mut text = String::new();
        let mut byte = [0];
        while !(text.contains("\"STOP\"") && text.contains("\"RESUME\"") && text.ends_with('\n')) {
            assert_eq!(std::io::Read::read(&mut events, &mut byte).unwrap(), 1, "{text}");
            text.push(char::from(byte[0]));
        }
        text
    });
    let heard = heard.await.unwrap();
    let first: MonitorEvent = serde_json::from_str(heard.lines().next().unwrap()).unwrap();
    assert_eq!(first.instance, instance);
    thresholds(guest).await;
    let rate = |seconds| DirtyRateRequest { instance, seconds, mode: Default::default() };
    refused(agent.machine_dirty_rate(&s.read(), rate(0)).await, ErrorKind::Invalid);
    agent.machine_dirty_rate(&s.read(), rate(1)).await.unwrap();
    s.until("how fast it writes memory", s.boot, async || {
        figures().await.dirty_rate.filter(|r| r.measured && r.rate.is_some()).map(|_| ())
    })
    .await;
    let figures = agent.machine_figures(&s.read(), vec![instance]).await.unwrap();
    let [(of, figures)] = figures.as_slice() else { panic!("{figures:?}") };
    assert!(*of == instance && !figures.vcpus.is_empty() && figures.user_ns.is_some(), "{figures:?}");
    assert!(figures.disks[&guest.spec.root.slot].read_bytes > 0, "it has booted: {figures:?}");
    assert!(agent.machine_figures(&s.read(), vec![]).await.unwrap().iter().any(|(id, _)| *id == instance));
    let mut wrong = of_agent("guest-ping");
    wrong.arguments = serde_json::json!([]);
    refused(agent.guest_agent(&s.read(), wrong).await, ErrorKind::Invalid);
    agent.guest_agent(&s.read(), of_agent("guest-ping")).await.expect("whichever agent it has");
    refused(agent.guest_agent(&s.read(), of_agent("guest-nonsense")).await, ErrorKind::Unsupported);
    let shot = agent.guest_screenshot(&s.read(), instance).await.unwrap();
    assert!(read_all(one(shot.fds)).await.starts_with(b"\x89PNG\r\n\x1a\n"));
    let display = agent.display_attach(&s.read(), instance).await.unwrap();
    let greeting = tokio::task::spawn_blocking(move || {
        let mut stream = std::fs::File::from(one(display.fds));
        let mut greeting = [0; 12];
        std::io::Read::read_exact(&mut stream, &mut greeting).map(|()| greeting)
    });
    assert!(greeting.await.unwrap().unwrap().starts_with(b"RFB 003."));
    agent.session_close(&s.read(), display.value).await.unwrap();
    // One that asks for a password, which is changed and taken away while it runs.
    let known = |text: &str| DisplayGuard {
        password: DisplayPassword::parse("password", text.into()).unwrap(),
        valid_to: None,
    };
    agent.display_guard(&s.read(), guard(Some(known("one")))).await.unwrap();
    let viewer = DisplayGuarded { instance, guard: known("two") };
    let display = agent.display_attach_guarded(&s.read(), viewer).await.unwrap();
    let greeting = tokio::task::spawn_blocking(move || {
        let mut stream = std::fs::File::from(one(display.fds));
        let mut greeting = [0; 12];
        std::io::Read::read_exact(&mut stream, &mut greeting).map(|()| greeting)
    });
    assert!(greeting.await.unwrap().unwrap().starts_with(b"RFB 003."));
    agent.session_close(&s.read(), display.value).await.unwrap();
    agent.display_guard(&s.read(), guard(None)).await.unwrap();
    spice(guest).await;
    ports(guest).await;
    // What runs keeps no memory over a stop.
    refused(agent.machine_memory_drop(&s.change(), instance).await, ErrorKind::Conflict);
}

/// Ports that lead to who attaches, one at a time; the others, and none, are told apart.
async fn ports(guest: &Guest<'_>) {
    let (s, agent, instance) = (guest.s, &guest.s.agent, guest.spec.instance);
    let attach = |port: &str, force| PortAttach { instance, port: port.into(), force };
    let first = agent.port_attach(&s.read(), attach("second", false)).await.unwrap();
    assert_eq!(first.fds.len(), 1);
    refused(agent.port_attach(&s.read(), attach("second", false)).await, ErrorKind::Conflict);
    let forced = agent.port_attach(&s.read(), attach("second", true)).await.unwrap();
    // Who was there is told.
    let ended = tokio::task::spawn_blocking(move || {
        let mut stream = std::fs::File::from(one(first.fds));
        let mut rest = vec![];
        // However it ends: cut off, or at its end.
        std::io::Read::read_to_end(&mut stream, &mut rest).is_ok_and(|_| rest.is_empty())
    });
    ended.await.unwrap();
    for session in [first.value, forced.value] {
        agent.session_close(&s.read(), session).await.unwrap();
    }
    refused(agent.port_attach(&s.read(), attach("silent", true)).await, ErrorKind::Unsupported);
    refused(agent.port_attach(&s.read(), attach("none", true)).await, ErrorKind::NotFound);
}

/// What a viewer's main channel says first in SPICE: magic, version 2.2, length; connection 0, kind 1, number 0, no capabilities.
const SPICE_LINK: &[u8; 34] = b"REDQ\x02\0\0\0\x02\0\0\0\x12\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\x12\0\0\0";

/// Channels by SPICE, any number; a host whose QEMU has none says what it lacks, and runs the machine without.
async fn spice(guest: &Guest<'_>) {
    let (s, agent, instance) = (guest.s, &guest.s.agent, guest.spec.instance);
    if !agent.host_facts(&s.read(), ()).await.unwrap().spice {
        let channel = SpiceChannel { instance, guard: None };
        let e = agent.display_attach_spice(&s.read(), channel).await.map(drop).unwrap_err();
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("qemu-system-modules-spice"), "{e}");
        return;
    }
    let password = DisplayPassword::parse("password", "three".into()).unwrap();
    let mut open = vec![];
    for guard in [None, None, Some(DisplayGuard { password, valid_to: None })] {
        let channel = SpiceChannel { instance, guard };
        let channel = agent.display_attach_spice(&s.read(), channel).await.unwrap();
        let answered = tokio::task::spawn_blocking(move || {
            let mut stream = std::fs::File::from(one(channel.fds));
            std::io::Write::write_all(&mut stream, SPICE_LINK)?;
            let mut magic = [0; 4];
            std::io::Read::read_exact(&mut stream, &mut magic).map(|()| (magic, stream))
        });
        let (magic, stream) = answered.await.unwrap().unwrap();
        assert_eq!(&magic, b"REDQ");
        open.push((channel.value, stream));
    }
    for (session, stream) in open {
        agent.session_close(&s.read(), session).await.unwrap();
        drop(stream);
    }
    agent.display_guard(&s.read(), DisplayGuardSet { instance, guard: None }).await.unwrap();
}

/// What a machine is beside its disk becomes another's that was never started, and goes with that one.
async fn state_travels(guest: &Guest<'_>) {
    let (s, agent, from) = (guest.s, &guest.s.agent, guest.spec.instance);
    let (to, at) = (InstanceId(s.env.uuid()), SnapshotId(s.env.uuid()));
    let save = MachineStateSave { at: MachineStateRef { instance: from, snapshot: at }, memory: false };
    agent.machine_state_save(&s.change(), save).await.unwrap();
    for (at, to_at) in [(None, None), (Some(at), Some(at)), (None, None)] {
        let copy = MachineStateCopy { from, at, to, to_at };
        agent.machine_state_copy(&s.change(), copy).await.unwrap();
        agent.machine_state_copy(&s.change(), copy).await.expect("twice is once");
    }
    let itself = MachineStateCopy { from, at: None, to: from, to_at: Some(at) };
    refused(agent.machine_state_copy(&s.change(), itself).await, ErrorKind::Invalid);
    let check = agent.self_check(&s.read(), ()).await.unwrap();
    assert_eq!(check.leaks, Vec::<String>::new());
    agent.guest_destroy(&s.change(), to).await.unwrap();
    agent.guest_destroy(&s.change(), to).await.expect("twice is once");
    agent.machine_state_delete(&s.change(), save.at).await.unwrap();
    let check = agent.self_check(&s.read(), ()).await.unwrap();
    assert!(!check.guests.contains(&to) && check.leaks.is_empty(), "{check:?}");
}

/// Of a volume that a paused guest has, snapshots and copies can be taken, and nothing can replace what is in it.
async fn volume_in_use(guest: &Guest<'_>) {
    let (s, agent, volume) = (guest.s, &guest.s.agent, guest.root);
    let snapshot = karst_model::SnapshotId(s.env.uuid());
    let at = VolumeSnapshotRef { pool: volume.pool, volume: volume.volume, snapshot };
    agent.volume_snapshot_create(&s.change(), at).await.unwrap();
    refused(agent.volume_snapshot_restore(&s.change(), at).await, ErrorKind::Conflict);
    let from = VolumeRefresh { volume, from: volume, snapshot: Some(snapshot), full: false };
    refused(agent.volume_refresh(&s.change(), from).await, ErrorKind::Conflict);
    let format = match guest.spec.kind {
        InstanceKind::Container => StreamFormat::Tar,
        InstanceKind::VirtualMachine => StreamFormat::Raw,
    };
    refused(agent.volume_import(&s.change(), VolumeImport { volume, format }).await, ErrorKind::Conflict);
    if guest.spec.kind == InstanceKind::VirtualMachine {
        let staged = s.stage(b"not now").await;
        let write = VolumeWrite { volume, staged, offset: 0, image: false };
        refused(agent.volume_write(&s.change(), write).await, ErrorKind::Conflict);
        agent.backup_delete(&s.change(), staged).await.unwrap();
    }
    agent.volume_snapshot_delete(&s.change(), at).await.unwrap();
}

/// A volume that a container got while it runs is in use on the host until it gave it back.
async fn hot_plugged_volume(guest: &Guest<'_>) {
    let (s, agent) = (guest.s, &guest.s.agent);
    let spec = s.volume(guest.root.pool, InstanceKind::Container, None);
    let volume = VolumeRef { pool: spec.pool, volume: spec.id };
    agent.volume_create(&s.change(), spec).await.unwrap();
    let disk = DiskSpec {
        device: DeviceId(s.env.uuid()),
        name: "data".into(),
        slot: "scsi1".into(),
        source: DiskSource::Volume { pool: volume.pool, volume: volume.volume },
        path: Some("/srv".into()),
        readonly: false,
        recursive: false,
        follow: false,
        shift: false,
        io: Default::default(),
        ejected: false,
        shared: false,
        optional: false,
        pci: None,
        boot_priority: 0,
        format: Default::default(),
        media: None,
        share: Default::default(),
    };
    let with = GuestSpec { disks: vec![disk], ..guest.spec.clone() };
    let applied = agent.guest_update(&s.change(), with).await.unwrap();
    assert!(applied.pending.is_empty(), "{applied:?}");
    refused(agent.volume_delete(&s.change(), volume).await, ErrorKind::Conflict);
    agent.guest_update(&s.change(), guest.spec.clone()).await.unwrap();
    agent.volume_delete(&s.change(), volume).await.expect("it is nobody's any more");
}

async fn pause_and_update(guest: &Guest<'_>) {
    let (s, agent) = (guest.s, &guest.s.agent);
    let quiesce = GuestQuiesce { guest: guest.at(), limit: Duration::from_secs(60) };
    let still = agent.guest_quiesce(&s.change(), quiesce).await.unwrap();
    assert_eq!(still > 0, guest.spec.kind == InstanceKind::VirtualMachine, "{still} file systems");
    agent.guest_pause(&s.change(), guest.at()).await.unwrap();
    agent.guest_quiesce(&s.change(), quiesce).await.expect("twice is once");
    agent.guest_resume(&s.change(), guest.at()).await.unwrap();
    assert_eq!(agent.guest_thaw(&s.change(), guest.at()).await.unwrap(), still);
    assert_eq!(agent.guest_thaw(&s.change(), guest.at()).await.expect("twice is once"), 0);
    for _ in 0..2 {
        let observed = agent.guest_pause(&s.change(), guest.at()).await.unwrap();
        assert_eq!(observed.state, RuntimeState::Paused);
    }
    volume_in_use(guest).await;
    for _ in 0..2 {
        let observed = agent.guest_resume(&s.change(), guest.at()).await.unwrap();
        assert_eq!(observed.state, RuntimeState::Running);
    }
    if guest.spec.kind == InstanceKind::Container {
        hot_plugged_volume(guest).await;
    }
    let mut spec = guest.spec.clone();
    spec.spec_version += 1;
    spec.limits.memory = Some(ByteSize::mib(640));
    let applied = agent.guest_update(&s.change(), spec.clone()).await.unwrap();
    assert_eq!(agent.guest_update(&s.change(), spec.clone()).await.unwrap(), applied, "twice is once");
    match guest.spec.kind {
        InstanceKind::Container => assert!(applied.pending.is_empty(), "{applied:?}"),
        InstanceKind::VirtualMachine => {
            assert!(applied.pending.contains(&"limits.memory".into()), "{applied:?}")
        }
    }
    // A share of the host's memory is what its host makes of it.
    (spec.limits.memory, spec.limits.memory_share) = (None, Some(50));
    spec.spec_version += 1;
    let applied = agent.guest_update(&s.change(), spec.clone()).await.unwrap();
    let waits = applied.pending.contains(&"limits.memory".into());
    assert_eq!(waits, guest.spec.kind == InstanceKind::VirtualMachine, "{applied:?}");
    if !waits {
        let facts = agent.host_facts(&s.read(), ()).await.unwrap();
        let share = spec.limits.memory_on(facts.memory).map(ByteSize::bytes);
        s.until("half of the host's memory", s.boot, async || {
            let all = agent.guest_metrics(&s.read(), vec![spec.instance]).await.unwrap();
            all.into_iter().find(|(_, m)| m.memory_total == share)
        })
        .await;
    }
}
