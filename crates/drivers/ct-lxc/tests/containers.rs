//! What containers have beyond the contract: limits, isolation, recovery, networks, first boot, and what a start costs.
#![allow(clippy::disallowed_methods)] // tests live in the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, until};
use karst_guest::{
    ExecRequest, FileKind, FileWrite, GuestDriver, ResolvedGuest, StopMode,
    contract::{collect, content, request, shell, until_inside, write_of},
    keeper,
};
use karst_model::{
    ByteSize, ErrorKind,
    instance::{ExitReason, RuntimeState},
    spec::{CpuAllowance, CpuLimit},
};
use std::{
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

const BOOT: Duration = Duration::from_secs(180);
const GRACEFUL: StopMode = StopMode::Graceful { timeout: BOOT };

/// Systemd has started everything: what it starts no longer counts against a limit by surprise.
const SETTLED: &str = "for i in 1 2 3 4; do systemctl is-system-running --wait >/dev/null 2>&1; \
    systemctl is-system-running | grep -qE 'running|degraded' && exit 0; sleep 0.2; done; exit 1";

async fn inside(driver: &dyn GuestDriver, guest: &ResolvedGuest, script: &str) -> String {
    let ran = shell(driver, guest, script).await;
    assert_eq!(ran.code, 0, "{script}: {ran:?}");
    ran.stdout
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_hold_inside_at_start_and_live() {
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let mut guest = place.guest(1);
    guest.limits.memory = Some(ByteSize::mib(128));
    guest.limits.processes = Some(60);
    guest.limits.cpu = Some(CpuLimit::Count { n: 1 });
    guest.limits.cpu_allowance = Some(CpuAllowance::Quota { quota_us: 20_000, period_us: 100_000 });
    driver.start(&guest).await.unwrap();
    until_inside(&driver, &guest, SETTLED, BOOT).await;

    // Memory: more than the limit is killed, less is not.
    let eat = |mib: u32| format!("head -c {mib}M /dev/zero | tail -c {mib}M | wc -c");
    assert_eq!(inside(&driver, &guest, &eat(40)).await.trim(), (40 << 20).to_string());
    let ran = shell(&driver, &guest, &format!("{}; true", eat(200))).await;
    assert_eq!(ran.stdout.trim(), "0", "tail was killed: {ran:?}");
    let metrics = driver.metrics(guest.instance).await.unwrap();
    assert!(metrics.details.is_none());
    let details = driver.sample(guest.instance, true).await.unwrap().details.unwrap();
    for part in ["Active", "Active_anon", "Cached", "Dirty", "MemAvailable", "MemFree", "RSS", "Writeback"] {
        assert!(details.memory.contains_key(part), "{part}: {details:?}");
    }
    assert!(details.oom_kills.is_some() && !details.processors.is_empty(), "{details:?}");
    assert_eq!(metrics.memory_total, Some(128 << 20));
    assert!(metrics.memory_peak.unwrap() > 100 << 20, "{metrics:?}");

    // Processes: refused.
    // Each stays for longer than it takes to start all of them with a fifth of a CPU.
    let ran = shell(&driver, &guest, "for i in $(seq 100); do sleep 20 & done; echo all").await;
    assert!(ran.stderr.contains("fork") || ran.stderr.contains("temporarily"), "{ran:?}");
    assert!(driver.metrics(guest.instance).await.unwrap().processes.unwrap() <= 60);
    until_inside(&driver, &guest, "! pidof sleep >/dev/null 2>&1 || true; true", BOOT).await;

    // CPUs: the number is seen, the quota is measured by the guest's own clock of CPU time.
    assert_eq!(inside(&driver, &guest, "nproc").await, "1\n");
    let used = cpu_of_busy_loop(&driver, &guest).await;
    assert!(used < 0.35, "{used} of a CPU under a quota of 0.2");

    // Live: all of them, and away with them.
    let mut more = guest.clone();
    more.spec_version += 1;
    more.limits = Default::default();
    more.limits.memory = Some(ByteSize::mib(512));
    let applied = driver.update(&more).await.unwrap();
    assert!(applied.pending.is_empty(), "{applied:?}");
    assert_eq!(driver.observe(guest.instance).await.unwrap().applied_spec_version, more.spec_version);
    assert_eq!(inside(&driver, &guest, &eat(200)).await.trim(), (200 << 20).to_string());
    let cpus = std::thread::available_parallelism().unwrap();
    assert_eq!(inside(&driver, &guest, "nproc").await.trim(), cpus.to_string());
    let used = cpu_of_busy_loop(&driver, &guest).await;
    println!("without a quota: {used:.2} of a CPU");

    // A limit below what cannot be reclaimed is refused and nothing changes.
    let hold = driver
        .exec(
            guest.instance,
            request(&["sh", "-c", "head -c 100M /dev/zero | tail -c 100M | (sleep 30; wc -c)"]),
        )
        .await
        .unwrap();
    let busy = || async { driver.metrics(guest.instance).await.unwrap().memory.unwrap() > 100 << 20 };
    let end = Instant::now() + BOOT;
    while !busy().await {
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    more.limits.memory = Some(ByteSize::mib(64));
    let e = driver.update(&more).await.unwrap_err();
    assert_eq!((e.kind, e.field.as_deref()), (ErrorKind::Conflict, Some("limits.memory")), "{e:?}");
    assert_eq!(driver.metrics(guest.instance).await.unwrap().memory_total, Some(512 << 20));
    drop(hold);
    let mut nics = more.clone();
    nics.limits.memory = Some(ByteSize::mib(512));
    nics.nics.clear();
    assert_eq!(driver.update(&nics).await.unwrap().pending, [""; 0]);
    let there = "test -e /sys/class/net/eth0 && echo there || echo gone";
    assert_eq!(inside(&driver, &guest, there).await, "gone\n");
    nics.nics = guest.nics.clone();
    assert_eq!(driver.update(&nics).await.unwrap().pending, [""; 0]);
    assert_eq!(inside(&driver, &guest, there).await, "there\n");
    let port = format!("/sys/class/net/{}/master", guest.nics[0].host_interface);
    assert!(std::path::Path::new(&port).exists(), "it is in its bridge again");
}

/// The share of one CPU that a busy loop got in about a second.
async fn cpu_of_busy_loop(driver: &dyn GuestDriver, guest: &ResolvedGuest) -> f64 {
    let cpu = || async { driver.metrics(guest.instance).await.unwrap().cpu_ns.unwrap() as f64 };
    let (before, start) = (cpu().await, Instant::now());
    let exec = driver
        .exec(guest.instance, request(&["timeout", "1", "sh", "-c", "while :; do :; done"]))
        .await
        .unwrap();
    collect(exec, b"").await;
    (cpu().await - before) / start.elapsed().as_nanos() as f64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paths_never_leave_the_root_running_or_stopped() {
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let guest = place.guest(2);
    let root = guest.root.path.clone();
    // The host's secret, and every way to it that an image can hold.
    let secret = place.dir.path().join("secret");
    std::fs::write(&secret, "host").unwrap();
    let outside = place.dir.path().to_str().unwrap().to_owned();
    let deep = "../".repeat(20);
    symlink(&outside, root.join("abs")).unwrap();
    symlink(format!("{deep}{}", &outside[1..]), root.join("rel")).unwrap();
    symlink("/proc/self/root", root.join("magic")).unwrap();
    symlink("/proc/1/root", root.join("magic1")).unwrap();
    symlink(&secret, root.join("direct")).unwrap();
    let files = driver.files().unwrap();
    let at = Some(root.as_path());
    for running in [false, true] {
        if running {
            driver.start(&guest).await.unwrap();
            until_inside(&driver, &guest, "true", BOOT).await;
        }
        let s = secret.to_str().unwrap();
        for path in [
            "/abs/secret".to_owned(),
            "/rel/secret".to_owned(),
            format!("/magic{s}"),
            format!("/magic1{s}"),
            format!("/{deep}{}", &s[1..]),
            s.to_owned(),
        ] {
            let read = files.open(guest.instance, at, &path).await;
            assert!(read.is_err(), "{path} was read (running: {running})");
            let written = files.write(guest.instance, at, write_of(&path), Some(content(b"evil"))).await;
            assert!(written.is_err(), "{path} was written (running: {running})");
            assert!(files.delete(guest.instance, at, &path).await.is_err(), "{path} was deleted");
        }
        // A last part that is a link: reading shows the link, writing goes to where it points inside.
        let opened = files.open(guest.instance, at, "/direct").await.unwrap();
        assert_eq!((opened.info.kind, opened.target.as_deref()), (FileKind::Symlink, Some(s)));
        let written = files.write(guest.instance, at, write_of("/direct"), Some(content(b"evil"))).await;
        assert!(written.is_err(), "its directory is not there inside");
        // Up and up ends at the root; owners are the guest's own, in both states.
        let up = files.open(guest.instance, at, "/../../etc/passwd").await.unwrap();
        assert_eq!((up.info.uid, up.info.kind), (0, FileKind::File));
        let own = FileWrite { uid: Some(1234), ..write_of("/owned") };
        files.write(guest.instance, at, own, Some(content(b"x"))).await.unwrap();
        let opened = files.open(guest.instance, at, "/owned").await.unwrap();
        assert_eq!((opened.info.uid, opened.info.mode), (1234, 0o644));
        assert_eq!(std::fs::metadata(root.join("owned")).unwrap().uid(), 1234, "unshifted on disk");
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), "host");
    }
    // With the rights of the container's root, not the host's: its /proc gives no more than inside.
    let tunable = "/proc/sys/kernel/core_pattern";
    let before = std::fs::read(tunable).unwrap();
    let e = files.write(guest.instance, at, write_of(tunable), Some(content(b"|/evil"))).await;
    assert!(e.is_err());
    assert_eq!(std::fs::read(tunable).unwrap(), before);
    // Neither FIFO nor device is opened, or waited for.
    inside(&driver, &guest, "mkfifo /fifo").await;
    for path in ["/fifo", "/dev/console"] {
        let e = files.open(guest.instance, at, path).await.unwrap_err();
        assert_eq!(e.kind, ErrorKind::Unsupported, "{path}: {e:?}");
    }
    let w = files.write(guest.instance, at, write_of("/fifo"), Some(content(b"x"))).await;
    assert!(w.is_err());
    // What does not fit leaves what was there, whichever way it would have come in; other names and attributes stay.
    let script = "mkdir /small && mount -t tmpfs -o size=1m none /small && cd /small && echo old > plain && echo old > named && \
                  ln named other && touch bound && mount --bind plain bound";
    inside(&driver, &guest, script).await;
    for path in ["/small/plain", "/small/named", "/small/bound", "/small/new"] {
        let e = files
            .write(guest.instance, at, write_of(path), Some(content(&[b'x'; 2 << 20])))
            .await
            .unwrap_err();
        assert_eq!(e.kind, ErrorKind::Quota, "{path}: {e:?}");
    }
    let all = "cd /small && cat plain named bound && ls -A && stat -c %h named";
    assert_eq!(inside(&driver, &guest, all).await, "old\nold\nold\nbound\nnamed\nother\nplain\n2\n");
    for path in ["/small/named", "/small/bound"] {
        files.write(guest.instance, at, write_of(path), Some(content(b"new\n"))).await.unwrap();
    }
    assert_eq!(inside(&driver, &guest, all).await, "new\nnew\nnew\nbound\nnamed\nother\nplain\n2\n");
    // Nor does one that is given up halfway.
    let (source, mut sink) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut sink, b"half").unwrap();
    let half = files.write(guest.instance, at, write_of("/small/plain"), Some(source.into()));
    assert!(tokio::time::timeout(Duration::from_millis(300), half).await.is_err());
    drop(sink);
    assert_eq!(inside(&driver, &guest, all).await, "new\nnew\nnew\nbound\nnamed\nother\nplain\n2\n");
    // Files of other file systems inside, such as its tmpfs and its /proc.
    files.write(guest.instance, at, write_of("/run/x"), Some(content(b"tmpfs"))).await.unwrap();
    assert_eq!(inside(&driver, &guest, "cat /run/x").await, "tmpfs");
    let opened = files.open(guest.instance, at, "/proc/version").await.unwrap();
    assert!(std::io::read_to_string(std::fs::File::from(opened.content.unwrap())).unwrap().contains("Linux"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_unprivileged_and_programs_that_enter_are_as_confined_as_init() {
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let guest = place.guest(3);
    let started = driver.start(&guest).await.unwrap();
    until_inside(&driver, &guest, SETTLED, BOOT).await;
    let base = guest.ids.base;
    let init = std::fs::metadata(format!("/proc/{}", started.pid.unwrap())).unwrap();
    assert_eq!(init.uid(), base, "init runs as the range's first id");
    let map = inside(&driver, &guest, "cat /proc/self/uid_map").await;
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", &base.to_string(), "65536"]);

    let status =
        |pid: &str| format!("grep -E '^(CapBnd|Seccomp|NoNewPrivs|CapInh|CapAmb)' /proc/{pid}/status");
    let of_init = inside(&driver, &guest, &status("1")).await;
    let of_exec = inside(&driver, &guest, &status("self")).await;
    assert!(of_init.contains("Seccomp:\t2"), "{of_init}");
    let field = |text: &str, key: &str| text.lines().find(|l| l.starts_with(key)).unwrap().to_owned();
    for key in ["CapBnd", "Seccomp:", "NoNewPrivs"] {
        assert_eq!(field(&of_init, key), field(&of_exec, key));
    }
    for capability in [16, 17, 25, 32, 33] {
        let set =
            u64::from_str_radix(field(&of_exec, "CapBnd").split_whitespace().last().unwrap(), 16).unwrap();
        assert_eq!(set & (1 << capability), 0, "capability {capability} is dropped");
    }
    // Same namespaces, same control groups below the limited one, no descriptors of the host, no host's environment.
    let same = "for n in user mnt pid net ipc uts cgroup; do [ $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) ] || echo $n; done";
    assert_eq!(inside(&driver, &guest, same).await, "");
    assert_eq!(
        inside(&driver, &guest, "ls /proc/self/fd | tr '\\n' ' '").await.trim(),
        "0 1 2 3",
        "3 is ls' own"
    );
    let env = inside(&driver, &guest, "env | cut -d= -f1 | sort | tr '\\n' ' '").await;
    assert_eq!(env.trim(), "FROM_CONFIG HOME PATH PWD USER container");
    let r = ExecRequest {
        command: vec!["sh".into(), "-c".into(), "echo hi >/dev/stdout".into()],
        uid: 1000,
        gid: 1000,
        ..request(&[])
    };
    assert_eq!(collect(driver.exec(guest.instance, r).await.unwrap(), b"").await.stdout, "hi\n");
    // Nothing outside can be reached: devices, the host's tunables, forced unmounts, its processes.
    for forbidden in [
        "mknod /x b 8 0 && cat /x",
        "echo 1 >/proc/sys/kernel/panic",
        "echo b >/proc/sysrq-trigger",
        "umount -f /proc/sys",
        "mount -t ext4 /dev/vda /mnt",
    ] {
        assert_ne!(shell(&driver, &guest, forbidden).await.code, 0, "{forbidden}");
    }
    // Its limits' control group is out of its sight, and a secret in the environment is in no argv of the host.
    let mut r = request(&["sleep", "300"]);
    r.environment.insert("TOKEN".into(), "s3cr3t-of-test".into());
    let exec = driver.exec(guest.instance, r).await.unwrap();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let argv = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&argv).contains("s3cr3t-of-test"), "{entry:?}");
    }
    drop(exec);
    // The state directory keeps its secrets to root.
    for entry in std::fs::read_dir(&guest.state_dir).unwrap().flatten() {
        let mode = entry.metadata().unwrap().permissions().mode() & 0o077;
        assert!(mode == 0 || entry.file_type().unwrap().is_dir(), "{entry:?} {mode:o}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_fails_says_why_and_leaves_nothing() {
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let guest = place.guest(4);
    let mut bad = guest.clone();
    bad.nics[0].link = karst_guest::ResolvedLink::Bridge("nosuchbridge0".into());
    let e = driver.start(&bad).await.unwrap_err();
    assert!(e.message.contains("nosuchbridge0"), "{e:?}");
    place.assert_clean();
    let mut bad = guest.clone();
    bad.root.path = place.dir.path().join("nothing");
    assert!(driver.start(&bad).await.is_err());
    // No init in it.
    let empty = place.dir.path().join("empty");
    std::fs::create_dir_all(empty.join("etc")).unwrap();
    bad.root.path = empty;
    let e = driver.start(&bad).await.unwrap_err();
    assert!(e.message.contains("/sbin/init"), "{e:?}");
    place.assert_clean();
    assert_eq!(driver.observe(guest.instance).await.unwrap().state, RuntimeState::Stopped);
    // And the right one starts after all that.
    assert_eq!(driver.start(&guest).await.unwrap().state, RuntimeState::Running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_ends_and_reboots_by_itself() {
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let mut events = driver.events();
    let mut guest = place.guest(5);
    guest.limits.processes = Some(321);
    let first = driver.start(&guest).await.unwrap().pid.unwrap();
    until_inside(&driver, &guest, SETTLED, BOOT).await;
    assert_eq!(inside(&driver, &guest, "hostname; cat /etc/hostname").await, "c5\nc5\n");

    // Network: as configured, seen from inside and in the figures; the counters move.
    assert_eq!(inside(&driver, &guest, "cat /sys/class/net/eth0/mtu").await, "1400\n");
    inside(&driver, &guest, "ip addr add 10.99.5.2/24 dev eth0; ip link set eth0 up").await;
    let eth0 = driver.metrics(guest.instance).await.unwrap().interfaces.remove("eth0").unwrap();
    assert_eq!((eth0.mac.as_str(), eth0.mtu, eth0.up), ("00:16:3e:00:00:05", 1400, true));
    assert_eq!(eth0.host_name, guest.nics[0].host_interface);
    assert!(eth0.addresses.contains(&("10.99.5.2".parse().unwrap(), 24, "global".into())), "{eth0:?}");
    let master = std::fs::read_link(format!("/sys/class/net/{}/master", eth0.host_name)).unwrap();
    assert_eq!(master.file_name().unwrap().to_str().unwrap(), place.bridge);
    // What is kept of it follows what changes; counters move where nothing does.
    inside(&driver, &guest, "ip addr add 10.99.5.3/24 dev eth0; ip link set eth0 mtu 1300").await;
    let before = driver.metrics(guest.instance).await.unwrap();
    assert_eq!((before.interfaces["eth0"].mtu, before.interfaces["eth0"].mac.as_str()), (1300, &*eth0.mac));
    let other = ("10.99.5.3".parse().unwrap(), 24, "global".into());
    assert!(before.interfaces["eth0"].addresses.contains(&other), "{before:?}");
    inside(&driver, &guest, "bash -c 'echo x > /dev/udp/127.0.0.1/9'; seq 100000 | wc -l").await;
    let after = driver.metrics(guest.instance).await.unwrap();
    let bytes = |m: &karst_guest::Metrics| m.interfaces["lo"].counters[0];
    assert!(bytes(&after) > bytes(&before) && after.cpu_ns > before.cpu_ns, "{before:?} {after:?}");

    // A reboot from inside is the same start: no event, the limit still there, a new init.
    shell(&driver, &guest, "systemctl reboot").await;
    let end = Instant::now() + BOOT;
    loop {
        let o = driver.observe(guest.instance).await.unwrap();
        if o.state == RuntimeState::Running && o.pid != Some(first) {
            assert_eq!(o.generation, guest.generation);
            break;
        }
        assert_ne!(o.state, RuntimeState::Stopped);
        assert!(Instant::now() < end, "no reboot");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(events.try_recv().is_err());
    until_inside(&driver, &guest, SETTLED, BOOT).await;
    let cgroups = karst_host::cgroup::Cgroups::detect().unwrap();
    let limit = cgroups
        .dirs(&format!("karst-{}/{}", place.daemon_id, guest.instance))
        .iter()
        .find_map(|d| std::fs::read_to_string(d.join("pids.max")).ok());
    assert_eq!(limit.as_deref(), Some("321\n"));
    assert!(
        driver.metrics(guest.instance).await.unwrap().interfaces.contains_key("eth0"),
        "the new namespace"
    );

    // A shutdown from inside is told as one.
    shell(&driver, &guest, "systemctl poweroff").await;
    let event = tokio::time::timeout(BOOT, events.recv()).await.unwrap().unwrap();
    assert_eq!((event.state, event.exit), (RuntimeState::Stopped, Some(ExitReason::Shutdown)));
    place.assert_clean();
    for _ in 0..2 {
        let e = driver.metrics(guest.instance).await.unwrap_err();
        assert!(e.is(ErrorKind::NotFound), "{e:?}");
    }

    // A killed init is a crash; a graceful stop right after the start is not lost.
    guest.generation = guest.generation.next();
    let pid = driver.start(&guest).await.unwrap().pid.unwrap();
    assert!(driver.metrics(guest.instance).await.unwrap().cpu_ns.is_some(), "a start is known at once");
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let event = tokio::time::timeout(BOOT, events.recv()).await.unwrap().unwrap();
    assert!(matches!(event.exit, Some(ExitReason::Crashed { .. })), "{event:?}");
    guest.generation = guest.generation.next();
    driver.start(&guest).await.unwrap();
    let stopped = driver.stop(guest.instance, GRACEFUL).await.unwrap();
    assert_eq!(stopped.exit, Some(ExitReason::Shutdown));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keepers_death_is_seen_and_nothing_runs_on() {
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let mut events = driver.events();
    let mut guest = place.guest(6);
    let started = driver.start(&guest).await.unwrap();
    until_inside(&driver, &guest, "true", BOOT).await;
    keeper::end_keeper(&guest.state_dir).unwrap();
    let event = tokio::time::timeout(BOOT, events.recv()).await.unwrap().unwrap();
    assert_eq!(event.state, RuntimeState::Stopped);
    assert!(
        matches!(&event.exit, Some(ExitReason::Crashed { detail }) if detail.contains("keeper")),
        "{event:?}"
    );
    let init = format!("/proc/{}/stat", started.pid.unwrap());
    until("init's end", || {
        std::fs::read_to_string(&init)
            .map_or(true, |s| s.rsplit_once(')').unwrap().1.trim_start().starts_with('Z'))
    })
    .await;
    place.assert_clean();
    guest.generation = guest.generation.next();
    assert_eq!(driver.start(&guest).await.unwrap().state, RuntimeState::Running);
}

fn tell(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// One whose keeper hangs holds up neither the others nor a new driver; it is shown as what it is, reached, and ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_does_not_answer_concerns_its_guest_alone() {
    use rustix::process::Signal;
    let Some(place) = Place::new() else { return };
    let first = place.driver();
    let (hung, well) = (place.guest(8), place.guest(9));
    for guest in [&hung, &well] {
        first.start(guest).await.unwrap();
        until_inside(&first, guest, "true", BOOT).await;
    }
    drop(first);
    let keeper = keeper::read_status(&hung.state_dir).unwrap().keeper_pid;
    tell(keeper, Signal::STOP);

    let driver = place.driver();
    let mut events = driver.events();
    let mut adopted = driver.adopt().await.unwrap();
    adopted.sort_by_key(|o| o.instance != hung.instance);
    let seen: Vec<_> = adopted.iter().map(|o| (o.instance, o.state)).collect();
    assert_eq!(seen, [(hung.instance, RuntimeState::Running), (well.instance, RuntimeState::Running)]);
    assert!(adopted[0].pid.is_some() && adopted[0].started_at.is_some(), "{:?}", adopted[0]);
    let warned = |driver: &karst_ct_lxc::LxcDriver| {
        driver.warnings().iter().any(|w| w.contains(&hung.instance.to_string()))
    };
    assert!(warned(&driver), "{:?}", driver.warnings());
    // What needs no keeper goes on.
    assert_eq!(inside(&driver, &hung, "echo reached").await, "reached\n");
    driver.pause(hung.instance).await.unwrap();
    assert_eq!(driver.observe(hung.instance).await.unwrap().state, RuntimeState::Paused);
    driver.resume(hung.instance).await.unwrap();
    assert!(driver.metrics(hung.instance).await.unwrap().memory.is_some());

    // It answers again: all is as before, and its end is seen.
    tell(keeper, Signal::CONT);
    until("an answer of the keeper", || !warned(&driver)).await;
    assert_eq!(driver.observe(hung.instance).await.unwrap().state, RuntimeState::Running);
    drop(driver.console(hung.instance, false).await.unwrap());

    // It hangs again, and nobody has noticed yet: the guest ends with it.
    tell(keeper, Signal::STOP);
    let stopped = driver.stop(hung.instance, StopMode::Force).await.unwrap();
    assert_eq!(stopped.state, RuntimeState::Stopped);
    let mut event = tokio::time::timeout(BOOT, events.recv()).await.unwrap().unwrap();
    while event.state == RuntimeState::Running {
        // Of the time in which it answered.
        event = tokio::time::timeout(BOOT, events.recv()).await.unwrap().unwrap();
    }
    assert_eq!((event.instance, event.state), (hung.instance, RuntimeState::Stopped));
    driver.destroy(hung.instance).await.unwrap();
    assert!(!warned(&driver));
    assert_eq!(inside(&driver, &well, "echo well").await, "well\n");

    // And the other one, whose keeper is known to hang.
    tell(keeper::read_status(&well.state_dir).unwrap().keeper_pid, Signal::STOP);
    drop(driver);
    let driver = place.driver();
    assert_eq!(driver.adopt().await.unwrap().len(), 1);
    assert_eq!(driver.stop(well.instance, StopMode::Force).await.unwrap().state, RuntimeState::Stopped);
    driver.destroy(well.instance).await.unwrap();
    place.assert_clean();
    // Nor has liblxc left anything.
    assert_eq!(karst_ct_lxc::locks::kept(&place.guests), Vec::<String>::new());
}

/// Not a test by itself: the process that [`adopted_after_the_starter_was_killed`] kills. Starts the guest that the
/// environment names, and waits to be killed.
#[tokio::test]
async fn starter() {
    let Ok(options) = std::env::var("KARST_TEST_STARTER") else {
        return;
    };
    let (dir, rest) = options.split_once('|').unwrap();
    let parts: Vec<&str> = rest.split('|').collect();
    let driver = karst_ct_lxc::LxcDriver::new(karst_ct_lxc::LxcOptions {
        daemon_id: parts[0].into(),
        guests_dir: dir.into(),
    });
    let mut guest = common::bare_guest(parts[0], Path::new(dir), 7);
    guest.instance = parts[1].parse().unwrap();
    guest.state_dir = Path::new(dir).join(parts[1]);
    guest.root.path = parts[2].into();
    guest.nics[0].link = karst_guest::ResolvedLink::Bridge(parts[3].into());
    driver.unwrap().start(&guest).await.unwrap();
    println!("STARTED");
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adopted_after_the_starter_was_killed() {
    let Some(place) = Place::new() else { return };
    let guest = place.guest(7);
    let options = [
        place.guests.to_str().unwrap(),
        &place.daemon_id,
        &guest.instance.to_string(),
        guest.root.path.to_str().unwrap(),
        &place.bridge,
    ]
    .join("|");
    let mut starter = Command::new(std::env::current_exe().unwrap())
        .args(["starter", "--exact", "--nocapture"])
        .env("KARST_TEST_STARTER", options)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(starter.stdout.take().unwrap()));
    assert!(lines.any(|l| l.unwrap().contains("STARTED")));
    starter.kill().unwrap();
    starter.wait().unwrap();

    let driver = place.driver();
    let mut events = driver.events();
    let adopted = driver.adopt().await.unwrap();
    assert_eq!(adopted.len(), 1);
    assert_eq!((adopted[0].instance, adopted[0].state), (guest.instance, RuntimeState::Running));
    until_inside(&driver, &guest, SETTLED, BOOT).await;
    // The console answers: a line to the login prompt comes back.
    let console = driver.console(guest.instance, false).await.unwrap();
    let mut console = std::os::unix::net::UnixStream::from(console);
    console.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut seen = String::new();
    let end = Instant::now() + BOOT;
    while !seen.contains("login:") {
        assert!(Instant::now() < end, "{seen:?}");
        let mut buffer = [0; 1024];
        std::io::Write::write_all(&mut console, b"\r").unwrap();
        if let Ok(n) = std::io::Read::read(&mut console, &mut buffer) {
            seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    }
    driver.stop(guest.instance, GRACEFUL).await.unwrap();
    assert_eq!(events.recv().await.unwrap().exit, Some(ExitReason::Shutdown));
    place.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cloud_init_gets_its_seed_only_where_it_is_installed() {
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let mut guest = place.guest(8);
    guest.cloud_init.instance_id = "i-1".into();
    guest.cloud_init.user_data = Some("#cloud-config\nruncmd: [true]\n".into());
    let seed = guest.root.path.join("var/lib/cloud/seed/nocloud-net");
    driver.start(&guest).await.unwrap();
    driver.stop(guest.instance, StopMode::Force).await.unwrap();
    assert!(!seed.exists());
    std::fs::write(guest.root.path.join("usr/bin/cloud-init"), "").unwrap();
    guest.cloud_init.instance_id = "i-2".into();
    guest.generation = guest.generation.next();
    driver.start(&guest).await.unwrap();
    driver.stop(guest.instance, StopMode::Force).await.unwrap();
    let meta = std::fs::read_to_string(seed.join("meta-data")).unwrap();
    assert_eq!(meta, "{\"instance-id\":\"i-2\",\"local-hostname\":\"c8\"}\n");
    assert_eq!(std::fs::read_to_string(seed.join("user-data")).unwrap(), guest.cloud_init.user_data.unwrap());
    assert_eq!(std::fs::metadata(seed.join("user-data")).unwrap().permissions().mode() & 0o777, 0o600);
}
