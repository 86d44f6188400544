//! The real keeper under its client: what it starts, keeps, reports, and how everything ends with it.
#![allow(clippy::disallowed_methods)] // tests live in the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

use karst_guest::keeper::{self, Console, End, Exit, Requested, Spec, State};
use karst_model::ErrorKind;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::{
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::Command,
    sync::{
        Arc, Once,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// The keeper lies where `cargo build` puts it; a test run alone does not build another package's program.
fn built() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let built = Command::new(env!("CARGO")).args(["build", "-q", "-p", "karst-keeper"]).status().unwrap();
        assert!(built.success());
    });
}

fn spec(argv: &[&str]) -> Spec {
    Spec {
        daemon: "test01".into(),
        instance: "6c0f7f0e-0000-4000-8000-000000000001".into(),
        generation: (1, 4),
        program: argv[0].into(),
        argv: argv.iter().map(|a| a.into()).collect(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into())],
        ..Spec::default()
    }
}

fn sh(script: &str) -> Spec {
    spec(&["/bin/sh", "-c", script])
}

/// Waits for a condition, at most 10 s.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// No keeper is there. A process that another test is just starting has the lock of who looked still, until it executes its
/// program.
fn until_gone(dir: &Path) {
    until("the keeper's end", || !keeper::is_alive(dir));
}

/// Runs (a zombie does not: nobody may reap it on this host).
fn runs(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|s| !s.rsplit_once(')').unwrap().1.trim_start().starts_with(['Z', 'X']))
}

/// Kills the keeper of a test that fails.
struct Guard(tempfile::TempDir);

impl Guard {
    fn new() -> Self {
        built();
        Guard(tempfile::tempdir().unwrap())
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = keeper::end_keeper(self.path());
    }
}

#[tokio::test]
async fn runs_reports_and_writes_down_the_end() {
    let dir = Guard::new();
    let k = keeper::launch(dir.path(), &sh("echo out; echo err >&2; read x < gate; exit 7"), vec![]).await;
    // The working directory is `/`: no such file, so it ends by itself with the shell's own code.
    let end = k.unwrap().wait_exit().await.unwrap();
    let End::Exited(s) = &end else { panic!("{end:?}") };
    assert_eq!((s.state, s.requested), (State::Exited, Requested::Nobody));
    assert!(matches!(s.exit, Some(Exit::Code(_))), "{s:?}");
    assert!(s.output.contains("out\n") && s.output.contains("err\n"), "{}", s.output);
    assert_eq!((s.daemon.as_str(), s.generation), ("test01", (1, 4)));
    // And again, from the file, when the keeper is gone.
    keeper::wait_gone(dir.path()).await.unwrap();
    until_gone(dir.path());
    let (again, e) =
        (keeper::read_status(dir.path()).unwrap(), keeper::connect(dir.path()).await.unwrap_err());
    assert_eq!(&again, s);
    assert!(e.is(ErrorKind::NotFound));
}

#[tokio::test]
async fn a_program_that_cannot_be_executed_is_named_and_leaves_nothing() {
    let dir = Guard::new();
    let e = keeper::launch(dir.path(), &spec(&["/nonexistent/x"]), vec![]).await.unwrap_err();
    let context = e.context.unwrap();
    assert!(context.contains("executing the program") && context.contains("No such file"), "{context}");
    keeper::wait_gone(dir.path()).await.unwrap();
    let s = keeper::read_status(dir.path()).unwrap();
    assert_eq!(s.state, State::Failed);
    until("the keeper's end", || !runs(s.keeper_pid));
}

#[test]
fn waiting_for_a_keeper_that_is_stuck_holds_no_thread() {
    let dir = tempfile::tempdir().unwrap();
    let stuck = std::fs::File::create(dir.path().join(karst_keeper::files::LOCK)).unwrap();
    rustix::fs::flock(&stuck, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async move {
        let path = dir.path().to_owned();
        let waiting = tokio::spawn(async move { keeper::wait_gone(&path).await });
        for _ in 0..20 {
            let other =
                tokio::time::timeout(Duration::from_secs(60), tokio::task::spawn_blocking(|| ())).await;
            other.expect("the thread that all share waits for the keeper").unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(!waiting.is_finished(), "it is there still");
        drop(stuck);
        waiting.await.unwrap().unwrap();
    });
}

#[tokio::test]
async fn one_keeper_a_guest_and_a_start_right_after_the_end() {
    let dir = Guard::new();
    let k = keeper::launch(dir.path(), &sh("exec sleep 1000"), vec![]).await.unwrap();
    let e = keeper::launch(dir.path(), &sh("true"), vec![]).await.unwrap_err();
    assert!(e.is(ErrorKind::Conflict), "{e:?}");
    assert_eq!(k.status().await.unwrap().state, State::Running, "the first one is unharmed");
    for _ in 0..5 {
        let k = keeper::connect(dir.path()).await.unwrap().0;
        k.kill().await.unwrap();
        let End::Exited(s) = k.wait_exit().await.unwrap() else { panic!() };
        assert_eq!((s.exit, s.requested), (Some(Exit::Signal(9)), Requested::Force));
        keeper::launch(dir.path(), &sh("exec sleep 1000"), vec![]).await.unwrap();
    }
}

#[tokio::test]
async fn who_looks_at_a_guest_does_not_keep_it_from_starting() {
    built();
    let guests = tempfile::tempdir().unwrap();
    for n in 0..100 {
        let dir = guests.path().join(n.to_string());
        std::fs::create_dir(&dir).unwrap();
        // As an earlier start leaves it that died before its first status.
        std::fs::write(dir.join("keeper.lock"), "").unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let looking = std::thread::spawn({
            let (dir, over) = (dir.clone(), over.clone());
            move || {
                while !over.load(Ordering::Relaxed) {
                    keeper::is_alive(&dir);
                }
            }
        });
        let launched = keeper::launch(&dir, &sh("exec sleep 1000"), vec![]).await;
        over.store(true, Ordering::Relaxed);
        looking.join().unwrap();
        match launched {
            Ok(k) => k.kill().await.unwrap(),
            Err(e) => panic!("start {n}: {e:?}"),
        }
        keeper::wait_gone(&dir).await.unwrap();
    }
}

#[tokio::test]
async fn the_main_process_gets_exactly_what_was_specified() {
    let dir = Guard::new();
    let file = std::fs::File::open("/etc/hostname").unwrap();
    let mut s =
        sh("ls /proc/self/fd; echo env=$(env | sort | grep -v -e ^PWD -e ^_ -e ^SHLVL | tr '\\n' ' '); \
        grep -E '^(Uid|Groups|CapBnd|CapEff|NoNewPrivs|SigIgn|SigBlk)' /proc/self/status; ulimit -n; umask");
    s.fds = vec![10];
    s.env.push(("A".into(), "b c".into()));
    s.rlimits = vec![(libc::RLIMIT_NOFILE, 321, 654)];
    s.no_new_privs = true;
    let root = backends::root();
    if root {
        s.user = Some((4711, 4712, vec![4713]));
        s.clear_capabilities = true;
    }
    let k = keeper::launch(dir.path(), &s, vec![OwnedFd::from(file)]).await.unwrap();
    let End::Exited(s) = k.wait_exit().await.unwrap() else { panic!() };
    let out = s.output;
    // `ls` has opened the directory as 3; its standard streams and the handed-on 10 are all else.
    let fds: Vec<_> = out.lines().take_while(|l| l.parse::<u32>().is_ok()).collect();
    assert_eq!(fds, ["0", "1", "10", "2", "3"], "{out}");
    assert!(out.contains("env=A=b c PATH=/usr/bin:/bin\n"), "{out}");
    assert!(out.contains("NoNewPrivs:\t1") && out.contains("\n321\n") && out.contains("0022"), "{out}");
    assert!(out.contains("SigBlk:\t0000000000000000"), "{out}");
    if root {
        assert!(out.contains("Uid:\t4711\t4711\t4711\t4711") && out.contains("Groups:\t4713 \n"), "{out}");
        assert!(
            out.contains("CapBnd:\t0000000000000000") && out.contains("CapEff:\t0000000000000000"),
            "{out}"
        );
    }
}

#[tokio::test]
async fn a_helper_is_root_of_its_user_namespace_and_nobody_on_the_host() {
    if !backends::root() {
        return;
    }
    let dir = Guard::new();
    let file = std::fs::File::open("/etc/hostname").unwrap();
    let mut s = sh(
        "ls /proc/self/fd; id -u; id -g; tr -s ' ' </proc/self/uid_map; touch /etc/made 2>/dev/null || echo closed; \
        grep -E '^(Groups|NoNewPrivs)' /proc/self/status; sleep 1000",
    );
    // A number that the namespaces' own descriptors may have when they come.
    s.fds = vec![10];
    (s.mount_namespace, s.user_namespace) = (true, true);
    s.user = Some((0, 0, vec![]));
    s.no_new_privs = true;
    let mounts = karst_host::mountns::new_namespace(|| Ok(())).unwrap();
    let ids = karst_host::mountns::user_namespace(3_000_000, 65_536).unwrap();
    let k = keeper::launch(dir.path(), &s, vec![mounts, ids, OwnedFd::from(file)]).await.unwrap();
    let pid = k.status().await.unwrap().pid.unwrap();
    let status = || std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status().contains("Uid:\t3000000\t3000000\t3000000\t3000000"), "{}", status());
    assert!(status().contains("Groups:\t \n"), "{}", status());
    let own = std::fs::read_link("/proc/self/ns/user").unwrap();
    assert_ne!(std::fs::read_link(format!("/proc/{pid}/ns/user")).unwrap(), own);
    // That is its last program, be it a child of the shell or in its place: what it says is whole.
    let waits = || std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let sleeps =
        |child: &str| std::fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|c| c == "sleep\n");
    until("its last program", || sleeps(&pid.to_string()) || waits().split_whitespace().any(sleeps));
    k.kill().await.unwrap();
    let End::Exited(s) = k.wait_exit().await.unwrap() else { panic!() };
    let said: Vec<_> = s.output.lines().collect();
    let wanted = ["0", "1", "10", "2", "3", "0", "0", " 0 3000000 65536", "closed"];
    assert_eq!(said[..9], wanted, "{}", s.output);
    assert!(s.output.contains("NoNewPrivs:\t1"), "{}", s.output);
    assert!(!Path::new("/etc/made").exists());
}

#[tokio::test]
async fn killing_the_keeper_ends_the_guest_and_is_told() {
    let dir = Guard::new();
    let k = keeper::launch(dir.path(), &sh("exec sleep 1000"), vec![]).await.unwrap();
    let s = k.status().await.unwrap();
    let waiting = tokio::spawn({
        let k = k.clone();
        async move { k.wait_exit().await }
    });
    // It watches: kill only then, so that the connection's end is what tells it.
    until("watching", || !waiting.is_finished());
    keeper::end_keeper(dir.path()).unwrap();
    let end = waiting.await.unwrap().unwrap();
    assert!(matches!(&end, End::KeeperLost(Some(l)) if l.pid == s.pid), "{end:?}");
    until("the guest's end", || !runs(s.pid.unwrap()));
    until_gone(dir.path());
    assert!(matches!(k.wait_exit().await.unwrap(), End::KeeperLost(_)), "also asked later");
}

#[tokio::test]
async fn it_leaves_its_caller_and_reaps_what_daemonizes_below() {
    let dir = Guard::new();
    let script = "(setsid sh -c 'echo $$ > \"$0\"/orphan; exec sleep 1000' \"$0\" &) ; (true &) ; read x";
    let mut s = spec(&["/bin/sh", "-c", script, dir.path().to_str().unwrap()]);
    s.console = Console::Pty;
    let k = keeper::launch(dir.path(), &s, vec![]).await.unwrap();
    let status = k.status().await.unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", status.keeper_pid)).unwrap();
    let f: Vec<u32> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .skip(1)
        .take(3)
        .map(|x| x.parse().unwrap())
        .collect();
    assert_ne!(f[0], std::process::id(), "not our child");
    assert_ne!(f[2], status.keeper_pid, "no session leader");
    // From /proc: the session's leader may be outside of this PID namespace, which getsid(2) tells as 0.
    let ours = std::fs::read_to_string("/proc/self/stat").unwrap();
    let session = ours.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap();
    assert_ne!(f[2].to_string(), session, "not our session");
    let orphan = dir.path().join("orphan");
    let read = || std::fs::read_to_string(&orphan).ok().and_then(|s| s.trim().parse::<u32>().ok());
    until("the orphan", || read().is_some());
    let orphan = read().unwrap();
    assert!(runs(orphan));
    k.kill().await.unwrap();
    k.wait_exit().await.unwrap();
    // Reaped, not only dead: no zombie.
    assert!(!Path::new(&format!("/proc/{orphan}")).exists());
    assert!(!Path::new(&format!("/proc/{}", status.pid.unwrap())).exists());
}

#[tokio::test]
async fn the_console_is_logged_relayed_and_taken_over() {
    for socket in [false, true] {
        let dir = Guard::new();
        let mut s = if socket {
            sh("echo hello >&5; while read x <&5; do echo got $x >&5; done")
        } else {
            sh("exec >&0; echo hello; while read x; do echo got $x; done")
        };
        s.console = if socket { Console::Socket(5) } else { Console::Pty };
        let k = keeper::launch(dir.path(), &s, vec![]).await.unwrap();
        let log = || String::from_utf8(keeper::console_log(dir.path(), 1 << 20).unwrap()).unwrap();
        until("the first line", || log().contains("hello\n"));
        let mut first = UnixStream::from(k.attach(false).await.unwrap());
        first.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        first.write_all(b"a b\n").unwrap();
        let mut got = [0u8; 8];
        first.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"got a b\n");
        let e = k.attach(false).await.unwrap_err();
        assert!(e.is(ErrorKind::Conflict), "{e:?}");
        let mut second = UnixStream::from(k.attach(true).await.unwrap());
        assert_eq!(first.read(&mut got).unwrap(), 0, "the first attachment has ended");
        second.write_all(b"c\n").unwrap();
        let mut got = [0u8; 6];
        second.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        second.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"got c\n");
        drop(second);
        assert_eq!(log(), "hello\ngot a b\ngot c\n");
        assert_eq!(keeper::console_log(dir.path(), 6).unwrap(), b"got c\n");
        match k.resize(132, 43).await {
            Ok(()) => assert!(!socket),
            Err(e) => assert!(socket && e.is(ErrorKind::Unsupported)),
        }
        keeper::clear_console_log(dir.path()).await.unwrap();
        assert_eq!(log(), "");
        k.kill().await.unwrap();
        k.wait_exit().await.unwrap();
        keeper::clear_console_log(dir.path()).await.unwrap();
    }
}

#[tokio::test]
async fn a_flood_on_the_console_never_blocks_the_guest_and_the_log_stays_bounded() {
    let dir = Guard::new();
    let mut s = sh(
        "exec >&0; i=0; while [ $i -lt 40 ]; do head -c 65536 /dev/zero | tr '\\0' x; i=$((i+1)); done; echo END",
    );
    s.console = Console::Pty;
    s.log_size = 64 * 1024;
    let k = keeper::launch(dir.path(), &s, vec![]).await.unwrap();
    // Attached, and never reads: must not hold up anybody.
    let lazy = k.attach(false).await;
    let end = tokio::time::timeout(Duration::from_secs(120), k.wait_exit()).await.unwrap().unwrap();
    assert!(matches!(end, End::Exited(_)));
    drop(lazy);
    let log = keeper::console_log(dir.path(), usize::MAX).unwrap();
    assert!(log.ends_with(b"END\n") && log.len() <= 128 * 1024 + 16 * 1024, "{}", log.len());
    assert!(log.len() >= 64 * 1024);
}

/// A small file system of the test's own, and the keeper on it.
struct SmallDisk(tempfile::TempDir);

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = keeper::end_keeper(self.0.path());
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[tokio::test]
async fn a_console_log_goes_on_after_the_disk_was_full() {
    if !backends::root() {
        return;
    }
    built();
    let directory = tempfile::tempdir().unwrap();
    // Room for few files: the bytes themselves would fit.
    let options = c"size=4m,nr_inodes=64,mode=700";
    if let Err(e) = mount("tmpfs", directory.path(), "tmpfs", MountFlags::empty(), options) {
        return backends::missing(&format!("a small file system cannot be mounted: {e}"));
    }
    let disk = SmallDisk(directory);
    let dir = disk.0.path();
    let flood = "head -c 40000 /dev/zero | tr '\\0' x; echo";
    let mut s =
        sh(&format!("exec >&0; while read x; do case $x in flood) {flood};; esac; echo said $x; done"));
    s.console = Console::Pty;
    s.log_size = 4096;
    let k = keeper::launch(dir, &s, vec![]).await.unwrap();
    let mut console = UnixStream::from(k.attach(false).await.unwrap());
    console.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // The client is told last: what it hears was offered to the log before.
    let mut say = |word: &str| {
        console.write_all(format!("{word}\n").as_bytes()).unwrap();
        let (mut heard, mut part) = (vec![], [0u8; 4096]);
        while !heard.ends_with(format!("said {word}\n").as_bytes()) {
            let n = console.read(&mut part).unwrap();
            assert!(n > 0, "the console has ended");
            heard.extend_from_slice(&part[..n]);
        }
    };
    let kept = || ["console.log", "console.log.1"].map(|f| dir.join(f).metadata().map_or(0, |m| m.len()));
    let log = || String::from_utf8(keeper::console_log(dir, 1 << 20).unwrap()).unwrap();
    // One read of the keeper's may pass the bound.
    let bound = 4096 + 16 * 1024;
    say("flood");
    let full = (0..1000)
        .find_map(|n| std::fs::File::create(dir.join(format!("fill{n}"))).err())
        .expect("the file system is small");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull, "{full}");
    say("flood");
    say("meanwhile");
    assert!(log().ends_with("said meanwhile\n"), "what is there is used");
    assert!(kept().iter().all(|size| *size <= bound), "{:?}", kept());
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("fill") {
            std::fs::remove_file(path).unwrap();
        }
    }
    say("flood");
    say("after");
    assert!(log().ends_with("said after\n"));
    assert!(kept().iter().all(|size| (1..=bound).contains(size)), "{:?}", kept());
    k.kill().await.unwrap();
    k.wait_exit().await.unwrap();
    keeper::wait_gone(dir).await.unwrap();
}

fn boottime() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

#[tokio::test]
async fn the_deadline_ends_the_guest_also_when_the_keeper_is_stopped() {
    let dir = Guard::new();
    let k = keeper::launch(dir.path(), &sh("exec sleep 1000"), vec![]).await.unwrap();
    k.set_deadline(Some(boottime() + Duration::from_secs(600))).await.unwrap();
    k.set_deadline(None).await.unwrap();
    let at = boottime() + Duration::from_millis(100);
    k.set_deadline(Some(at)).await.unwrap();
    let End::Exited(s) = k.wait_exit().await.unwrap() else { panic!() };
    assert!(boottime() >= at);
    assert_eq!((s.exit, s.requested), (Some(Exit::Signal(9)), Requested::Deadline));

    let k = keeper::launch(dir.path(), &sh("exec sleep 1000"), vec![]).await.unwrap();
    let s = k.status().await.unwrap();
    // Far enough for the keeper to be stopped before.
    k.set_deadline(Some(boottime() + Duration::from_secs(8))).await.unwrap();
    let pid = rustix::process::Pid::from_raw(s.keeper_pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    until("the guest's end", || !runs(s.pid.unwrap()));
    assert!(matches!(k.wait_exit().await.unwrap(), End::KeeperLost(_)));
}

#[tokio::test]
async fn found_again_by_one_that_did_not_start_it() {
    let guests = tempfile::tempdir().unwrap();
    let dir = guests.path().join("one");
    let long = guests.path().join("a-long-name".repeat(15));
    std::fs::create_dir(&dir).unwrap();
    std::fs::create_dir(&long).unwrap();
    built();
    keeper::launch(&dir, &sh("exec sleep 1000"), vec![]).await.unwrap();
    keeper::launch(&long, &sh("true"), vec![]).await.unwrap().wait_exit().await.unwrap();
    let mut found = keeper::find_all(guests.path()).unwrap();
    found.sort_by_key(|f| f.dir.as_os_str().len());
    assert_eq!(found.iter().map(|f| f.alive).collect::<Vec<_>>(), [true, false]);
    let (k, s) = keeper::connect(&found[0].dir).await.unwrap();
    let args = std::fs::read(format!("/proc/{}/cmdline", s.keeper_pid)).unwrap();
    let args: Vec<_> = args.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
    assert_eq!(&args[1..5], ["--daemon", "test01", "--instance", s.instance.as_str()]);
    let pss = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", s.keeper_pid)).unwrap();
    let pss: u64 = pss
        .lines()
        .find_map(|l| l.strip_prefix("Pss:"))
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    println!("keeper PSS: {pss} kB");
    assert!(pss < 1536, "{pss} kB");
    k.signal(libc::SIGTERM).await.unwrap();
    let End::Exited(s) = k.wait_exit().await.unwrap() else { panic!() };
    assert_eq!((s.exit, s.requested), (Some(Exit::Signal(15)), Requested::Nobody));
}

#[tokio::test]
async fn the_record_of_a_guest_that_runs_is_never_taken_for_lost() {
    let guard = Guard::new();
    let dir = guard.0.path();
    let k = keeper::launch(dir, &sh("exec sleep 1000"), vec![]).await.unwrap();
    std::fs::write(dir.join("guest.json"), "").unwrap();
    let e = karst_guest::record::read::<u32>(dir, "guest.json").unwrap_err();
    assert_eq!(e.kind, ErrorKind::Internal, "{e}");
    assert!(dir.join("guest.json").exists());
    k.signal(libc::SIGKILL).await.unwrap();
    k.wait_exit().await.unwrap();
    assert_eq!(karst_guest::record::read::<u32>(dir, "guest.json").unwrap(), None);
}
