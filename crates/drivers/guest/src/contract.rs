//! The contract that every [`GuestDriver`] passes, on its real backend. Feature `testing`.
//!
//! It needs a guest whose system has a POSIX shell, `id`, `stty`, `sleep` and `cat` and follows a request to shut down.

use crate::{
    Exec, ExecRequest, ExecStreams, FileKind, FileWrite, GuestDriver, Observed, ResolvedGuest, StopMode,
};
use karst_model::{
    ErrorKind, Result,
    instance::{ExitReason, InstanceKind, RuntimeState},
};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs::File,
    io::{Read, Seek, Write},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

/// A guest and how to get drivers for it.
pub struct Subject {
    /// A guest that does not run; its root is there.
    pub guest: ResolvedGuest,
    /// Makes a driver as after a start of the host process: nothing is remembered but what is on disk and runs.
    pub driver: Box<dyn Fn() -> Arc<dyn GuestDriver> + Send + Sync>,
    /// How long the system inside may take until programs can be run and a request to shut down is followed.
    pub boot: Duration,
    /// Programs can have a terminal, and their streams flow while they run. The QEMU guest agent cannot do either.
    pub streams: bool,
}

/// What a program left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Exit code.
    pub code: i32,
    /// Standard output, or all output of a terminal.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

async fn read_all(fd: OwnedFd) -> String {
    let read = tokio::task::spawn_blocking(move || {
        let (mut out, mut file) = (vec![], File::from(fd));
        // A terminal whose last user went answers EIO; what came before counts.
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = file.read(&mut buffer) {
            out.extend_from_slice(&buffer[..n]);
        }
        String::from_utf8_lossy(&out).into_owned()
    });
    read.await.unwrap()
}

/// Feeds `stdin` and collects everything to the end.
pub async fn collect(exec: Exec, stdin: &[u8]) -> Ran {
    collected(exec, stdin).await.unwrap()
}

/// As [`collect`]; an error where the end of the program was not seen.
async fn collected(exec: Exec, stdin: &[u8]) -> Result<Ran> {
    let work = async {
        match exec.streams {
            ExecStreams::Terminal(master) => {
                let mut feed = File::from(master.try_clone().unwrap());
                feed.write_all(stdin).unwrap();
                drop(feed);
                let (stdout, code) = tokio::join!(read_all(master), exec.control.wait());
                (code, stdout, String::new())
            }
            ExecStreams::Pipes { stdin: to, stdout, stderr } => {
                let bytes = stdin.to_vec();
                // Feeding and reading at once, as clients do: large input must not block on unread output.
                let feed = tokio::task::spawn_blocking(move || drop(File::from(to).write_all(&bytes)));
                let (stdout, stderr, code) =
                    tokio::join!(read_all(stdout), read_all(stderr), exec.control.wait());
                feed.await.unwrap();
                (code, stdout, stderr)
            }
        }
    };
    let (code, stdout, stderr) =
        tokio::time::timeout(Duration::from_secs(300), work).await.expect("the program ends");
    Ok(Ran { code: code?, stdout, stderr })
}

/// A request that runs `command` as root with pipes.
pub fn request(command: &[&str]) -> ExecRequest {
    ExecRequest {
        command: command.iter().map(|s| s.to_string()).collect(),
        environment: Default::default(),
        uid: 0,
        gid: 0,
        cwd: None,
        terminal: None,
        term: None,
    }
}

/// Runs a shell script inside.
pub async fn shell(driver: &dyn GuestDriver, guest: &ResolvedGuest, script: &str) -> Ran {
    let exec = driver.exec(guest.instance, request(&["sh", "-c", script])).await;
    collect(exec.unwrap(), b"").await
}

/// Waits until a script inside succeeds; one that was ended with the agent that ran it is tried again.
pub async fn until_inside(driver: &dyn GuestDriver, guest: &ResolvedGuest, script: &str, within: Duration) {
    let end = Instant::now() + within;
    loop {
        let last = match driver.exec(guest.instance, request(&["sh", "-c", script])).await {
            Ok(exec) => match collected(exec, b"").await {
                Ok(ran) if ran.code == 0 => return,
                other => format!("{other:?}"),
            },
            Err(e) => format!("{e:?}"),
        };
        assert!(Instant::now() < end, "not within {within:?}: {script}: {last}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The whole contract, in one life of the guest after another.
///
/// # Panics
/// When the driver breaks it.
pub async fn run(subject: Subject) {
    let guest = &subject.guest;
    let id = guest.instance;
    let driver = (subject.driver)();
    let driver = driver.as_ref();
    let mut events = driver.events();
    assert_eq!(driver.kind(), guest.kind);

    // Nothing there yet: questions are answered, mutations are fine or say so.
    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Stopped);
    assert_eq!(driver.stop(id, StopMode::Force).await.unwrap().state, RuntimeState::Stopped);
    let e = driver.exec(id, request(&["true"])).await.err().unwrap();
    assert!(e.is(ErrorKind::NotFound), "{e:?}");
    assert!(driver.pause(id).await.is_err() && driver.metrics(id).await.is_err());

    // Start, and start again.
    let started = driver.start(guest).await.unwrap();
    assert_eq!((started.state, started.generation), (RuntimeState::Running, guest.generation));
    assert!(started.pid.is_some() && started.started_at.is_some());
    assert_eq!(started.applied_spec_version, guest.spec_version);
    assert_eq!(started.domain_id, Some(guest.domain_id));
    let again = driver.start(guest).await.unwrap();
    assert_eq!((again.pid, again.started_at), (started.pid, started.started_at), "the same life");
    let mut newer = guest.clone();
    newer.generation = guest.generation.next();
    assert!(driver.start(&newer).await.unwrap_err().is(ErrorKind::Conflict));
    assert_eq!(driver.destroy(id).await.unwrap_err().kind, ErrorKind::Conflict);
    until_inside(driver, guest, "true", subject.boot).await;

    exec(driver, guest).await;
    if subject.streams {
        streams(driver, guest).await;
    }
    files(driver, guest).await;
    quiesce(driver, guest).await;
    let metrics = driver.metrics(id).await.unwrap();
    assert!(metrics.memory.is_some_and(|m| m > 1 << 20), "{metrics:?}");

    // Pause: nothing moves, twice is fine.
    assert_eq!(driver.pause(id).await.unwrap().state, RuntimeState::Paused);
    assert_eq!(driver.pause(id).await.unwrap().state, RuntimeState::Paused);
    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Paused);
    let e = driver.exec(id, request(&["true"])).await.err().unwrap();
    assert!(e.is(ErrorKind::Conflict), "{e:?}");
    assert_eq!(driver.resume(id).await.unwrap().state, RuntimeState::Running);
    assert_eq!(driver.resume(id).await.unwrap().state, RuntimeState::Running);
    assert_eq!(shell(driver, guest, "echo on").await.stdout, "on\n");

    // Another driver, as after a restart: finds it, and everything works.
    let second = (subject.driver)();
    let adopted = second.adopt().await.unwrap();
    let mine: Vec<&Observed> = adopted.iter().filter(|o| o.instance == id).collect();
    assert_eq!(mine.len(), 1);
    assert_eq!((mine[0].state, mine[0].pid), (RuntimeState::Running, started.pid));
    assert_eq!(mine[0].applied_spec_version, guest.spec_version);
    assert_eq!(shell(second.as_ref(), guest, "echo still").await.stdout, "still\n");
    let mut events_of_second = second.events();

    // Console: one at a time.
    let console = second.console(id, false).await.unwrap();
    let e = second.console(id, false).await.unwrap_err();
    assert!(e.is(ErrorKind::Conflict), "{e:?}");
    let forced = second.console(id, true).await.unwrap();
    // The one before ends, whatever the system said on it meanwhile.
    let ended = tokio::time::timeout(Duration::from_secs(60), read_all(console)).await;
    assert!(ended.is_ok(), "the attachment before ends");
    drop(forced);

    // Graceful stop, with a word to both drivers that watch.
    let mode = StopMode::Graceful { timeout: Duration::from_secs(120) };
    let stopped = second.stop(id, mode).await.unwrap();
    assert_eq!((stopped.state, stopped.exit), (RuntimeState::Stopped, Some(ExitReason::Shutdown)));
    assert_eq!(stopped.generation, guest.generation);
    for events in [&mut events, &mut events_of_second] {
        let event = tokio::time::timeout(Duration::from_secs(60), events.recv()).await.unwrap().unwrap();
        assert_eq!((event.instance, event.state), (id, RuntimeState::Stopped));
    }
    let log = second.console_log(id, 1 << 20, false).await.unwrap();
    assert!(!log.is_empty(), "systems say something on their console");
    assert_eq!(second.console_log(id, 10, true).await.unwrap().len(), 10);
    assert!(second.console_log(id, 10, false).await.unwrap().is_empty());
    assert!(second.adopt().await.unwrap().iter().all(|o| o.instance != id));

    // A stop that nobody waits for any more.
    let started = match second.start(&newer).await {
        // The first driver removes the control group of the keeper that ended just now, which a host with one driver does under
        // the guest's lock.
        Err(e) if e.context.as_ref().is_some_and(|c| c.contains("entering")) => second.start(&newer).await,
        other => other,
    };
    let started = started.unwrap();
    assert_eq!((started.state, started.generation), (RuntimeState::Running, newer.generation));
    left_alone(second.as_ref(), guest, started.pid.unwrap()).await;

    // Force; also while it is frozen.
    newer.generation = newer.generation.next();
    let started = second.start(&newer).await.unwrap();
    assert_eq!((started.state, started.generation), (RuntimeState::Running, newer.generation));
    second.pause(id).await.unwrap();
    let stopped = second.stop(id, StopMode::Force).await.unwrap();
    assert_eq!((stopped.state, stopped.exit), (RuntimeState::Stopped, Some(ExitReason::Forced)));
    assert_eq!(second.stop(id, StopMode::Force).await.unwrap().state, RuntimeState::Stopped);
    assert_eq!(driver.observe(id).await.unwrap().exit, Some(ExitReason::Forced), "both know");

    // Nothing left, and once more.
    second.destroy(id).await.unwrap();
    second.destroy(id).await.unwrap();
    assert!(!guest.state_dir.exists());
    assert_eq!(second.observe(id).await.unwrap().state, RuntimeState::Stopped);
}

/// A guest runs on when whoever asked it to shut down goes away before it does, and ends as one that nobody asked.
async fn left_alone(driver: &dyn GuestDriver, guest: &ResolvedGuest, pid: u32) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    if guest.kind == InstanceKind::Container {
        // Its init would follow at once; the system of a machine is not there yet to do so.
        kill_process(pid, Signal::STOP).unwrap();
    }
    let mode = StopMode::Graceful { timeout: Duration::from_secs(600) };
    tokio::select! {
        biased;
        stopped = driver.stop(guest.instance, mode) => panic!("it does not follow: {stopped:?}"),
        _ = until_state(driver, guest, RuntimeState::Stopping) => {}
    }
    until_state(driver, guest, RuntimeState::Running).await;
    kill_process(pid, Signal::KILL).unwrap();
    let ended = until_state(driver, guest, RuntimeState::Stopped).await;
    assert!(matches!(ended.exit, Some(ExitReason::Crashed { .. })), "{ended:?}");
}

async fn until_state(driver: &dyn GuestDriver, guest: &ResolvedGuest, state: RuntimeState) -> Observed {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let now = driver.observe(guest.instance).await.unwrap();
        if now.state == state {
            return now;
        }
        assert!(Instant::now() < end, "not {state:?}: {now:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The part about programs, terminals and files, for a guest that runs.
///
/// # Panics
/// When the driver breaks it.
pub async fn inside(driver: &dyn GuestDriver, guest: &ResolvedGuest) {
    exec(driver, guest).await;
    streams(driver, guest).await;
    files(driver, guest).await;
}

async fn exec(driver: &dyn GuestDriver, guest: &ResolvedGuest) {
    let id = guest.instance;
    let ran = shell(driver, guest, "echo out; echo err >&2; exit 7").await;
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (7, "out\n", "err\n"));
    assert_eq!(shell(driver, guest, "kill -9 $$").await.code, 137);
    assert_eq!(collect(driver.exec(id, request(&["/nonexistent"])).await.unwrap(), b"").await.code, 127);
    assert_eq!(collect(driver.exec(id, request(&["nonexistent"])).await.unwrap(), b"").await.code, 127);
    assert_eq!(collect(driver.exec(id, request(&["/etc/passwd"])).await.unwrap(), b"").await.code, 126);
    assert!(driver.exec(id, request(&[])).await.is_err());

    // Standard input to its end, more than any pipe holds; binary safe.
    let input: Vec<u8> = (0..300_000u32).map(|i| b'a' + (i % 26) as u8).collect();
    let ran = collect(driver.exec(id, request(&["cat"])).await.unwrap(), &input).await;
    assert_eq!((ran.code, ran.stdout.len()), (0, input.len()));
    assert_eq!(ran.stdout.as_bytes(), input);

    // Who, where, with what.
    let mut r = request(&["sh", "-c", "id -u; id -g; pwd; echo \"$A\"; echo $0 \"$1\"", "zero", "a b;c"]);
    (r.uid, r.gid, r.cwd) = (33, 34, Some("/tmp".into()));
    r.environment.insert("A".into(), "x y\nz".into());
    let ran = collect(driver.exec(id, r).await.unwrap(), b"").await;
    assert_eq!(ran.stdout, "33\n34\n/tmp\nx y\nz\nzero a b;c\n", "{ran:?}");
    let mut r = request(&["true"]);
    r.cwd = Some("/nonexistent".into());
    let e = driver.exec(id, r).await.err().unwrap();
    assert_eq!((e.kind, e.field.as_deref()), (ErrorKind::Invalid, Some("cwd")));

    // Signals reach the program; dropping the control ends it.
    let exec = driver.exec(id, request(&["sleep", "1000"])).await.unwrap();
    exec.control.signal(15).await.unwrap();
    assert_eq!(exec.control.wait().await.unwrap(), 143);
    assert_eq!(exec.control.wait().await.unwrap(), 143, "asked twice");
    let exec = driver
        .exec(id, request(&["sh", "-c", "exec -a marked-by-contract sleep 987 || exec sleep 987"]))
        .await
        .unwrap();
    drop(exec);
    until_inside(
        driver,
        guest,
        "for p in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$p 2>/dev/null | grep -q '^[^ ]*sleep 987' && exit 1; done; true",
        Duration::from_secs(120),
    )
    .await;
}

async fn streams(driver: &dyn GuestDriver, guest: &ResolvedGuest) {
    let id = guest.instance;
    // A terminal: of the size, controlling, resizable, interruptible by its own key.
    let mut r = request(&["sh", "-c", "stty size; tty; read x; stty size; echo got $x; sleep 1000"]);
    (r.terminal, r.term) = (Some((91, 33)), Some("xterm".into()));
    let exec = driver.exec(id, r).await.unwrap();
    let ExecStreams::Terminal(master) = &exec.streams else { panic!("a terminal was asked for") };
    let mut terminal = File::from(master.try_clone().unwrap());
    let mut seen = String::new();
    expect(&mut terminal, &mut seen, "/dev/").await;
    assert!(seen.contains("33 91"), "{seen}");
    exec.control.resize(101, 44).await.unwrap();
    terminal.write_all(b"word\n").unwrap();
    expect(&mut terminal, &mut seen, "got word").await;
    assert!(seen.contains("44 101"), "{seen}");
    // More than once: a shell that is just making its child may take the key for itself and then wait for the child.
    let ended = async {
        loop {
            terminal.write_all(b"\x03").unwrap();
            tokio::select! {
                code = exec.control.wait() => break code.unwrap(),
                () = tokio::time::sleep(Duration::from_millis(200)) => {}
            }
        }
    };
    let code = tokio::time::timeout(Duration::from_secs(120), ended).await;
    assert_eq!(code.expect("the key interrupts"), 130);
    drop(terminal);

    let exec = driver
        .exec(id, request(&["sh", "-c", "trap 'exit 5' USR1; echo up; while :; do sleep 0.05; done"]))
        .await
        .unwrap();
    let ExecStreams::Pipes { stdout, .. } = &exec.streams else { panic!("pipes were asked for") };
    let mut out = File::from(stdout.try_clone().unwrap());
    expect(&mut out, &mut String::new(), "up").await;
    exec.control.signal(10).await.unwrap();
    assert_eq!(collect(exec, b"").await.code, 5);
}

/// Reads until `what` was seen.
async fn expect(from: &mut File, seen: &mut String, what: &str) {
    let end = Instant::now() + Duration::from_secs(120);
    while !seen.contains(what) {
        assert!(Instant::now() < end, "{what:?} not in {seen:?}");
        let mut copy = from.try_clone().unwrap();
        let read = tokio::task::spawn_blocking(move || {
            let mut buffer = [0; 1024];
            copy.read(&mut buffer).map(|n| buffer[..n].to_vec())
        });
        let read = tokio::time::timeout(Duration::from_secs(120), read).await;
        seen.push_str(&String::from_utf8_lossy(&read.expect("output in time").unwrap().unwrap()));
    }
}

async fn quiesce(driver: &dyn GuestDriver, guest: &ResolvedGuest) {
    let Some(quiesce) = driver.quiesce() else { return };
    let id = guest.instance;
    assert!(quiesce.freeze(id, Duration::from_secs(100)).await.unwrap() > 0);
    // A call that is repeated after a crash begins anew.
    assert!(quiesce.freeze(id, Duration::from_secs(100)).await.unwrap() > 0);
    let files = driver.files().unwrap();
    let e = files.write(id, None, write_of("/root/frozen"), Some(content(b"x"))).await.unwrap_err();
    assert!(e.is(ErrorKind::Unavailable), "{e:?}");
    // Reading and running go on, writing waits.
    let writer = driver.exec(id, request(&["sh", "-c", "echo x >/root/frozen"])).await.unwrap();
    until_inside(
        driver,
        guest,
        "for s in /proc/[0-9]*/stat; do read -r p n state rest <$s && [ \"$n $state\" = '(sh) D' ] && exit 0; done; exit 1",
        Duration::from_secs(300),
    )
    .await;
    assert!(quiesce.thaw(id).await.unwrap() > 0);
    assert_eq!(collect(writer, b"").await.code, 0);
    assert_eq!(quiesce.thaw(id).await.unwrap(), 0, "nothing is frozen");
    // By itself, and whoever froze learns of it.
    quiesce.freeze(id, Duration::from_secs(1)).await.unwrap();
    assert_eq!(shell(driver, guest, "rm /root/frozen").await.code, 0);
    assert_eq!(quiesce.thaw(id).await.unwrap_err().kind, ErrorKind::Conflict);
    assert!(quiesce.freeze(id, Duration::ZERO).await.unwrap_err().is(ErrorKind::Invalid));
}

/// A descriptor with this content.
pub fn content(text: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text).unwrap();
    file.rewind().unwrap();
    file.into()
}

/// A write of a regular file.
pub fn write_of(path: &str) -> FileWrite {
    FileWrite {
        path: path.into(),
        kind: FileKind::File,
        uid: None,
        gid: None,
        mode: None,
        append: false,
        target: None,
    }
}

async fn files(driver: &dyn GuestDriver, guest: &ResolvedGuest) {
    let Some(files) = driver.files() else { return };
    let id = guest.instance;
    let root = Some(guest.root.path.as_path()).filter(|p| p.is_dir());
    let dir =
        FileWrite { kind: FileKind::Directory, mode: Some(0o751), uid: Some(12), ..write_of("/root/made") };
    files.write(id, root, dir.clone(), None).await.unwrap();
    files.write(id, root, dir, None).await.unwrap();
    let mut w = write_of("/root/made/file");
    (w.mode, w.uid, w.gid) = (Some(0o640), Some(1000), Some(1001));
    files.write(id, root, w, Some(content(b"one\n"))).await.unwrap();
    let mut w = write_of("/root/made/file");
    w.append = true;
    files.write(id, root, w, Some(content(b"two\n"))).await.unwrap();
    let ran =
        shell(driver, guest, "cat /root/made/file; stat -c '%u %g %a' /root/made/file /root/made").await;
    assert_eq!(ran.stdout, "one\ntwo\n1000 1001 640\n12 0 751\n", "{ran:?}");
    let opened = files.open(id, root, "/root/made/file").await.unwrap();
    let i = &opened.info;
    assert_eq!((i.kind, i.uid, i.gid, i.mode, i.size), (FileKind::File, 1000, 1001, 0o640, 8));
    assert_eq!(read_all(opened.content.unwrap()).await, "one\ntwo\n");
    let link =
        FileWrite { kind: FileKind::Symlink, target: Some("file".into()), ..write_of("/root/made/link") };
    files.write(id, root, link, None).await.unwrap();
    let opened = files.open(id, root, "/root/made/link").await.unwrap();
    assert_eq!((opened.info.kind, opened.target.as_deref()), (FileKind::Symlink, Some("file")));
    let opened = files.open(id, root, "/root/made").await.unwrap();
    assert_eq!(opened.entries, ["file", "link"]);
    // Overwriting leaves owner and mode, and a link what it is.
    for (path, text) in [("/root/made/file", &b"3"[..]), ("/root/made/link", b"4")] {
        files.write(id, root, write_of(path), Some(content(text))).await.unwrap();
        let ran =
            shell(driver, guest, "cat /root/made/link; stat -c ' %u %a' /root/made/file; ls -A /root/made")
                .await;
        let text = String::from_utf8_lossy(text);
        assert_eq!(ran.stdout, format!("{text} 1000 640\nfile\nlink\n"));
    }
    assert_eq!(files.delete(id, root, "/root/made").await.unwrap_err().kind, ErrorKind::Conflict);
    for path in ["/root/made/link", "/root/made/file", "/root/made"] {
        files.delete(id, root, path).await.unwrap();
    }
    for (result, kind) in [
        (files.delete(id, root, "/root/made").await, ErrorKind::NotFound),
        (files.open(id, root, "/root/made").await.map(drop), ErrorKind::NotFound),
        (files.open(id, root, "relative").await.map(drop), ErrorKind::Invalid),
        (files.delete(id, root, "/").await, ErrorKind::Invalid),
    ] {
        assert_eq!(result.unwrap_err().kind, kind);
    }
}
