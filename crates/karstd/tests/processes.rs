//! The processes as the kernel sees them, those of guests too: users, capabilities, sockets, descriptors; killed in every
//! combination; who gets in by the sockets; DIR's lock; the simulation.
#![allow(clippy::disallowed_methods)] // real processes, real time

#[path = "../../testkit/src/backends.rs"]
mod backends;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::MetadataExt, net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

const LONG: Duration = Duration::from_secs(120);
/// An existing user of every Debian without processes that matter here.
const USER: &str = "nobody";

fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LONG;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "{what}: not within {LONG:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What the host may, by the list in its documentation: CHOWN … SETFCAP and MAC_ADMIN; never SYS_MODULE, SYS_RAWIO,
/// SYS_BOOT, SYS_TIME, BPF.
const GRANTED: &[u32] = &[0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 18, 19, 21, 23, 24, 27, 31, 33];

struct Karstd {
    child: Child,
    dir: PathBuf,
    log: Arc<Mutex<Vec<String>>>,
    _base: tempfile::TempDir,
}

fn command_in(dir: &Path, extra: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_karstd"));
    command
        .arg("--dir")
        .arg(dir)
        .args(["--user", USER, "--log-format", "json"])
        .args(extra)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn start_in(dir: &Path, extra: &[&str]) -> Child {
    command_in(dir, extra).spawn().unwrap()
}

impl Karstd {
    /// `None`, said aloud, without root.
    fn start(extra: &[&str]) -> Option<Self> {
        Self::start_as(extra, |_| {})
    }

    /// The same, with something else about its process.
    fn start_as(extra: &[&str], change: impl FnOnce(&mut Command)) -> Option<Self> {
        if extra.is_empty() && !backends::root() {
            return None;
        }
        let base = tempfile::Builder::new().prefix("karstd-").tempdir().unwrap();
        // The control process passes through it.
        fs::set_permissions(base.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        let dir = base.path().join("k");
        let mut command = command_in(&dir, extra);
        change(&mut command);
        let mut child = command.spawn().unwrap();
        let log = Arc::new(Mutex::new(vec![]));
        let (lines, err) = (log.clone(), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(err).lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        });
        Some(Self { child, dir, log, _base: base })
    }

    fn daemons(&self) -> Option<serde_json::Value> {
        serde_json::from_slice(&fs::read(self.dir.join("run/daemons.json")).ok()?).ok()
    }

    fn pid(&self, role: &str) -> Option<u32> {
        if role == "launcher" {
            return Some(self.child.id());
        }
        self.daemons()?["daemons"][role]["pid"].as_u64().map(|p| p as u32)
    }

    /// What control says of itself, when it and the host answer.
    fn status(&self) -> Option<serde_json::Value> {
        let mut stream = UnixStream::connect(self.dir.join("unix.socket")).ok()?;
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
            .write_all(b"GET /1.0/karst/status HTTP/1.1\r\nHost: karst\r\nConnection: close\r\n\r\n")
            .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let answer: serde_json::Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
        Some(answer["metadata"].clone())
    }

    fn healthy(&self) -> serde_json::Value {
        until("an answer of control and host", || self.status().filter(|s| s["host"]["kernel"].is_string()))
    }

    fn stop(&mut self) -> std::process::ExitStatus {
        kill(self.child.id(), libc::SIGTERM);
        until("the end of the launcher", || self.child.try_wait().unwrap())
    }

    fn lines(&self, level: &str) -> Vec<String> {
        let mark = format!("\"level\":\"{level}\"");
        self.log.lock().unwrap().iter().filter(|l| l.contains(&mark)).cloned().collect()
    }
}

impl Drop for Karstd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // What its bootstrap made on this machine.
        let purge =
            Command::new(env!("CARGO_BIN_EXE_karstd")).arg("--dir").arg(&self.dir).arg("purge").output();
        if let Ok(output) = purge
            && !output.status.success()
        {
            eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

fn kill(pid: u32, signal: i32) {
    // SAFETY: a process of this test.
    unsafe { libc::kill(pid as i32, signal) };
}

fn alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
}

fn proc_status(pid: u32) -> BTreeMap<String, String> {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .unwrap()
        .lines()
        .filter_map(|l| l.split_once(":\t").map(|(k, v)| (k.to_owned(), v.trim().to_owned())))
        .collect()
}

/// Lines of the socket tables of its network namespace that belong to this process.
fn sockets(pid: u32, table: &str) -> Vec<String> {
    let inodes: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
        .filter_map(|l| Some(l.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let all = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
    // Where the inode stands; another number, as a process id of netlink, may be the same by chance.
    let column = if table == "packet" { 8 } else { 9 };
    all.lines()
        .skip(1)
        .filter(|l| l.split_whitespace().nth(column).is_some_and(|w| inodes.iter().any(|i| i == w)))
        .map(str::to_owned)
        .collect()
}

/// Its open descriptors and what they lead to.
fn descriptors(pid: u32) -> BTreeMap<u32, String> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|fd| {
            let number = fd.file_name().to_str()?.parse().ok()?;
            Some((number, fs::read_link(fd.path()).ok()?.to_str()?.to_owned()))
        })
        .collect()
}

/// The path at which a `socket:[INODE]` of the process listens; `None` for one that does not, or is no unix socket.
fn listens_at(pid: u32, place: &str) -> Option<String> {
    let inode = place.strip_prefix("socket:[")?.strip_suffix(']')?;
    let all = fs::read_to_string(format!("/proc/{pid}/net/unix")).ok()?;
    // Num RefCount Protocol Flags Type St Inode Path; the flag of one that listens is __SO_ACCEPTCON.
    all.lines().skip(1).find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let accepts = u32::from_str_radix(fields.get(3)?, 16).ok()? & 0x1_0000 != 0;
        (*fields.get(6)? == inode && accepts).then(|| fields.get(7).unwrap_or(&"").to_string())
    })
}

/// Root, with no more than [`GRANTED`], nothing of it for programs of others, and no socket of any network.
fn assert_bounded_root(name: &str, pid: u32) {
    let of = proc_status(pid);
    assert_eq!((of["Uid"].as_str(), of["Gid"].as_str()), ("0\t0\t0\t0", "0\t0\t0\t0"), "{name}");
    let granted: u64 = GRANTED.iter().map(|n| 1u64 << n).sum();
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        let has = u64::from_str_radix(&of[set], 16).unwrap();
        assert_eq!(has & !granted, 0, "{set} of {name}: {has:x}");
    }
    assert_eq!(
        (of["CapInh"].as_str(), of["CapAmb"].as_str()),
        ("0000000000000000", "0000000000000000"),
        "{name}"
    );
    assert_no_network(name, pid);
}

fn assert_no_network(name: &str, pid: u32) {
    for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet", "netlink"] {
        // The host speaks netlink for bridges and nftables; that is no port.
        if table == "netlink" && name == "host" {
            continue;
        }
        assert_eq!(sockets(pid, table), Vec::<String>::new(), "{name} has {table} sockets");
    }
}

fn mode(path: PathBuf) -> (u32, u32, u32) {
    let m = fs::metadata(path).unwrap();
    (m.mode() & 0o7777, m.uid(), m.gid())
}

fn nobody() -> (u32, u32) {
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|l| l.starts_with("nobody:")).unwrap().to_owned();
    let fields: Vec<_> = line.split(':').collect();
    (fields[2].parse().unwrap(), fields[3].parse().unwrap())
}

#[test]
fn each_process_has_its_rights_and_no_more() {
    let Some(mut karstd) = Karstd::start(&[]) else {
        return;
    };
    let status = karstd.healthy();
    let (uid, gid) = nobody();
    let [launcher, host, control] = ["launcher", "host", "control"].map(|r| karstd.pid(r).unwrap());
    assert_eq!(status["pid"], control);

    let of = proc_status(control);
    assert_eq!(of["Uid"], format!("{uid}\t{uid}\t{uid}\t{uid}"));
    assert_eq!(of["Gid"], format!("{gid}\t{gid}\t{gid}\t{gid}"));
    assert_eq!(of.get("Groups").map(String::as_str).unwrap_or_default(), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&of[set], 16), Ok(0), "{set} of control");
    }
    assert_eq!(of["NoNewPrivs"], "1");

    assert_bounded_root("host", host);
    // The launcher is the root that it was started as: it makes sockets, changes users, drops what others may not. It gains
    // nothing and hands nothing on by itself.
    let (of, own) = (proc_status(launcher), proc_status(std::process::id()));
    assert_eq!(of["Uid"], "0\t0\t0\t0");
    for same in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"] {
        assert_eq!(of[same], own[same], "{same} of the launcher");
    }
    let places = descriptors(launcher);
    // Where its log goes is whatever whoever started the test passed on.
    let inherited = |n: &u32| {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{n}")).unwrap_or_default();
        let flags = info.lines().find_map(|l| u32::from_str_radix(l.strip_prefix("flags:")?.trim(), 8).ok());
        *n <= 2 || flags.is_some_and(|flags| flags & libc::O_CLOEXEC as u32 == 0)
    };
    let passed_on: Vec<_> =
        descriptors(std::process::id()).into_iter().filter(|(n, _)| inherited(n)).collect();
    let own = |place: &str| {
        ["/dev/null", "anon_inode:[signalfd]", "/memfd:karstd (deleted)"].contains(&place)
            || place == karstd.dir.join("lock").to_str().unwrap()
            || place.starts_with("pipe:[")
            || passed_on.iter().any(|(_, passed)| passed == place)
            || (place.starts_with("socket:[") && listens_at(launcher, place).is_some())
    };
    let strange: Vec<_> = places.values().filter(|p| !own(p)).collect();
    assert!(strange.is_empty(), "the launcher holds {strange:?}");
    let mut listening: Vec<_> = places.values().filter_map(|p| listens_at(launcher, p)).collect();
    listening.sort();
    let at = |name: &str| karstd.dir.join(name).to_str().unwrap().to_owned();
    assert_eq!(
        listening,
        [at("libvirt-sock"), at("libvirt-sock-ro"), at("run/host.sock"), at("unix.socket")],
        "what the launcher keeps open for the daemons, and nothing else"
    );

    for (name, pid) in [("launcher", launcher), ("host", host), ("control", control)] {
        for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet"] {
            assert_eq!(sockets(pid, table), Vec::<String>::new(), "{name} has {table} sockets");
        }
        // Those for what blocks end when they have had nothing to do for a while.
        until("its threads are few", || {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
            (threads <= if name == "launcher" { 1 } else { 8 }).then_some(())
        });
    }
    let listens = |pid: u32| -> Vec<String> {
        let mut all: Vec<_> = descriptors(pid).values().filter_map(|p| listens_at(pid, p)).collect();
        all.sort();
        all
    };
    assert_eq!(listens(control), [at("libvirt-sock"), at("libvirt-sock-ro"), at("unix.socket")]);
    assert_eq!(listens(host), [at("run/host.sock")]);
    let environment = |pid| fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    assert!(
        !environment(control).contains("CARGO") && !environment(host).contains("HOME="),
        "cleared environment"
    );

    assert_eq!(mode(karstd.dir.join("unix.socket")).0, 0o660);
    assert_eq!(mode(karstd.dir.join("run/host.sock")), (0o660, 0, gid));
    assert_eq!(mode(karstd.dir.join("run")), (0o750, 0, gid));
    assert_eq!(mode(karstd.dir.join("state")), (0o700, uid, gid));
    assert_eq!(mode(karstd.dir.join("host")), (0o711, 0, 0));
    assert_eq!(mode(karstd.dir.clone()), (0o711, 0, 0));

    let took: Vec<u64> = [launcher, host, control]
        .iter()
        .map(|pid| {
            let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
            let pss = rollup.lines().find_map(|l| l.strip_prefix("Pss:")).unwrap();
            pss.trim().trim_end_matches(" kB").parse().unwrap()
        })
        .collect();
    eprintln!("PSS in kB: launcher, host, control {took:?}, together {}", took.iter().sum::<u64>());

    assert!(karstd.stop().success());
    for pid in [launcher, host, control] {
        assert!(!alive(pid), "{pid} ended with the launcher");
    }
    assert!(!karstd.dir.join("unix.socket").exists());
    assert_eq!(karstd.lines("ERROR"), Vec::<String>::new());
    let warnings: Vec<_> = karstd.lines("WARN").into_iter().filter(|l| !of_the_machine(l)).collect();
    assert_eq!(warnings, Vec::<String>::new());
}

/// Is this a complaint that is not the daemons' doing: what a host without KVM says of itself, what a slow one makes of a start or
/// an end, and that another daemon was quicker with a bridge? Whole messages, with the fields that decide.
fn of_the_machine(line: &str) -> bool {
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    let field = |name: &str| line[name].as_str().unwrap_or_default();
    let error = field("error");
    let no_host = error == "the host process does not answer"
        || error == "the host process ended while it worked on this"
        || error == "the host process closed the connection";
    let quicker = error.contains(" exists already and was not made by this Karst; ");
    let slow = "virtual machines are emulated and slow";
    match (field("target"), field("message")) {
        ("karstd::platform", "the last requests are not in the audit log")
        | ("karst_agent_host::agent", "new volumes are not known to be on disk yet") => true,
        ("karst_agent_host::facts", "QEMU does not say what it is; asking again later") => {
            error.contains(" did not end within ")
        }
        ("karst_engine::reconcile", "the host does not say what it runs; trying again") => {
            no_host || error.contains(" did not end within its time ")
        }
        ("karst_engine::audit", "the audit log cannot be written; trying again") => no_host,
        ("karstd::platform", "the default pool and network could not be made; trying again") => {
            no_host || quicker
        }
        ("karst_engine::saga::runner", "a step failed; undoing") => {
            field("name") == "network-create" && quicker
        }
        ("karst_engine::reconcile", text) if text.starts_with("QEMU ") => {
            text == "QEMU is installed, but has not said yet what it is; it is asked again"
        }
        ("karst_engine::reconcile", text) if text.starts_with("/dev/kvm ") => text.contains(slow),
        ("karst_engine::reconcile", text) if text.starts_with("the CPU ") => text.contains(slow),
        _ => false,
    }
}

/// Asks the API, and waits for the operation that it answers with.
fn api(karstd: &Karstd, method: &str, path: &str, headers: &str, body: &[u8]) -> serde_json::Value {
    let mut stream = UnixStream::connect(karstd.dir.join("unix.socket")).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: karst\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let text = answer.split_once("\r\n\r\n").unwrap().1;
    let answer: serde_json::Value = serde_json::from_str(text).unwrap();
    let wrong = |answer: &serde_json::Value| {
        answer["type"] == "error" || !answer["metadata"]["err"].as_str().unwrap_or("").is_empty()
    };
    assert!(!wrong(&answer), "{method} {path}: {answer}");
    match answer["operation"].as_str() {
        Some(operation) if !operation.is_empty() => {
            let wait = format!("{operation}/wait?timeout={}", LONG.as_secs());
            let ended = api(karstd, "GET", &wait, "", b"");
            assert_eq!(ended["metadata"]["status"], "Success", "{method} {path}: {ended}");
            ended
        }
        _ => answer,
    }
}

fn json(karstd: &Karstd, method: &str, path: &str, body: serde_json::Value) -> serde_json::Value {
    api(karstd, method, path, "Content-Type: application/json\r\n", body.to_string().as_bytes())
}

/// Processes of which one argument is this, by the base name of their program.
fn with_argument(argument: &str) -> Vec<(u32, String)> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut arguments = line.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned());
        let program = arguments.next()?.rsplit('/').next()?.to_owned();
        arguments.any(|a| a == argument).then_some((pid, program))
    })
    .collect()
}

/// The keeper of each kind of guest, and QEMU below one: what they may, what they hold open, and that they belong to no
/// daemon.
#[test]
fn what_runs_a_guest_has_its_rights_and_no_more() {
    let Some(mut karstd) = Karstd::start(&[]) else {
        return;
    };
    let keeper = Path::new(env!("CARGO_BIN_EXE_karstd")).with_file_name("karst-keeper");
    if !keeper.exists() {
        // A test of one package builds no other's programs.
        let built = Command::new(env!("CARGO")).args(["build", "-q", "-p", "karst-keeper"]).status().unwrap();
        assert!(built.success());
    }
    karstd.healthy();
    until("the first start's devices of the profile", || {
        let profile = api(&karstd, "GET", "/1.0/profiles/default", "", b"");
        profile["metadata"]["devices"]["root"].is_object().then_some(())
    });
    let root = |size: Option<&str>| {
        let mut root = serde_json::json!({"type": "disk", "path": "/", "pool": "default"});
        if let Some(size) = size {
            root["size"] = size.into();
        }
        root
    };
    // Without NICs: what they are given is on the machine, which others share; whose sockets they are is the question here.
    let none = serde_json::json!({"type": "none"});
    json(
        &karstd,
        "POST",
        "/1.0/instances",
        serde_json::json!({
            "name": "c1", "type": "container", "source": {"type": "none"}, "devices": {"root": root(None), "eth0": none},
        }),
    );
    // A root file system of one program, as any client could push it.
    for place in ["sbin", "proc", "sys", "dev", "run", "tmp", "etc"] {
        let path = format!("/1.0/instances/c1/files?path=/{place}");
        api(&karstd, "POST", &path, "X-Incus-type: directory\r\nX-Incus-mode: 0755\r\n", b"");
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find_map(|p| fs::read(p).ok());
    let busybox = busybox.expect("busybox is installed (scripts/install-dependencies)");
    let program = "Content-Type: application/octet-stream\r\nX-Incus-type: file\r\nX-Incus-mode: 0755\r\n";
    api(&karstd, "POST", "/1.0/instances/c1/files?path=/sbin/init", program, &busybox);
    json(
        &karstd,
        "POST",
        "/1.0/instances",
        serde_json::json!({
            "name": "v1", "type": "virtual-machine", "source": {"type": "none"},
            "config": {"limits.memory": "64MiB", "security.secureboot": "false"},
            "devices": {"root": root(Some("16MiB")), "eth0": none},
        }),
    );
    for name in ["c1", "v1"] {
        json(
            &karstd,
            "PUT",
            &format!("/1.0/instances/{name}/state"),
            serde_json::json!({"action": "start", "timeout": -1}),
        );
    }

    let mut kept = vec![];
    for name in ["c1", "v1"] {
        let instance = api(&karstd, "GET", &format!("/1.0/instances/{name}"), "", b"");
        let uuid = instance["metadata"]["config"]["volatile.uuid"].as_str().unwrap().to_owned();
        let state = karstd.dir.join("host/guests").join(&uuid);
        let found = with_argument(state.to_str().unwrap());
        let [(keeper, _)] = *found.iter().filter(|(_, p)| p == "karst-keeper").collect::<Vec<_>>() else {
            panic!("one keeper of {name}: {found:?}")
        };
        let keeper = *keeper;
        assert_bounded_root(&format!("the keeper of {name}"), keeper);
        let of = proc_status(keeper);
        assert_eq!(of["Threads"], "1");
        // Programs inside a container gain rights by setuid files of their own; a keeper that could not hand that on would
        // break them. It executes nothing but what the host wrote down.
        assert_eq!(of["NoNewPrivs"], proc_status(karstd.pid("host").unwrap())["NoNewPrivs"]);
        let places = descriptors(keeper);
        // The console is a terminal of which it holds both ends, so that it outlives whoever writes to it.
        let masters = places.iter().filter(|(_, p)| ["/dev/ptmx", "/dev/pts/ptmx"].contains(&p.as_str()));
        let terminals: Vec<String> = masters
            .map(|(fd, _)| fs::read_to_string(format!("/proc/{keeper}/fdinfo/{fd}")).unwrap())
            .filter_map(|info| Some(info.split_once("tty-index:")?.1.split_whitespace().next()?.to_owned()))
            .map(|index| format!("/dev/pts/{index}"))
            .collect();
        let sound = |place: &str| {
            ["/dev/null", "/dev/ptmx", "/dev/pts/ptmx"].contains(&place)
                || terminals.iter().any(|t| t == place)
                || ["pipe:[", "socket:[", "anon_inode:"].iter().any(|p| place.starts_with(p))
                || place.starts_with(state.to_str().unwrap())
        };
        let strange: Vec<_> = places.values().filter(|p| !sound(p)).collect();
        assert!(strange.is_empty(), "the keeper of {name} holds {strange:?}");
        let listening: Vec<_> = places.values().filter_map(|p| listens_at(keeper, p)).collect();
        assert!(matches!(&listening[..], [one] if one.ends_with("/keeper.sock")), "{name}: {listening:?}");
        let environment = fs::read(format!("/proc/{keeper}/environ")).unwrap();
        assert!(!String::from_utf8_lossy(&environment).contains("CARGO"), "cleared environment");
        let status = fs::read_to_string(state.join("keeper.status")).unwrap();
        let main = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap();
        let main: u32 = main.split_whitespace().next().expect(&status).parse().unwrap();
        kept.extend([keeper, main]);
        if name == "c1" {
            continue;
        }
        // QEMU: a user of its own without any right, filtered system calls, no port of the machine's.
        let of = proc_status(main);
        let uids: Vec<u32> = of["Uid"].split_whitespace().map(|u| u.parse().unwrap()).collect();
        assert!(uids.iter().all(|u| *u == uids[0] && *u >= 65_536), "{uids:?}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(u64::from_str_radix(&of[set], 16), Ok(0), "{set} of QEMU");
        }
        assert_eq!((of["NoNewPrivs"].as_str(), of["Seccomp"].as_str()), ("1", "2"));
        assert_no_network("QEMU", main);
        for place in descriptors(main).values().filter_map(|p| listens_at(main, p)) {
            assert!(!place.starts_with('@'), "abstract sockets have no owner: {place}");
        }
    }

    // They belong to no daemon: everything else is killed, and who comes next finds them.
    let daemons = ["launcher", "host", "control"].map(|r| karstd.pid(r).unwrap());
    for pid in daemons {
        kill(pid, libc::SIGKILL);
    }
    karstd.child.wait().unwrap();
    until("the end of the daemons", || daemons.iter().all(|pid| !alive(*pid)).then_some(()));
    assert!(kept.iter().all(|pid| alive(*pid)), "guests run on without any daemon");
    karstd.child = start_in(&karstd.dir, &[]);
    karstd.healthy();
    for name in ["c1", "v1"] {
        until("the guest is found again", || {
            let state = api(&karstd, "GET", &format!("/1.0/instances/{name}/state"), "", b"");
            (state["metadata"]["status"] == "Running").then_some(())
        });
    }
    assert!(kept.iter().all(|pid| alive(*pid)));
    for name in ["c1", "v1"] {
        json(
            &karstd,
            "PUT",
            &format!("/1.0/instances/{name}/state"),
            serde_json::json!({"action": "stop", "force": true, "timeout": -1}),
        );
        api(&karstd, "DELETE", &format!("/1.0/instances/{name}"), "", b"");
    }
    until("their end", || kept.iter().all(|pid| !alive(*pid)).then_some(()));
    assert!(karstd.stop().success());
}

/// Does something as somebody else, by the rights of one thread: who this process is stays as it is.
fn as_user<T: Send>(uid: u32, groups: &[u32], work: impl FnOnce() -> T + Send) -> T {
    let as_them = move || {
        // SAFETY: the system calls themselves, unlike the C library's functions, are for this thread alone, which ends.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_setgroups, groups.len() - 1, groups[1..].as_ptr()), 0);
            assert_eq!(libc::syscall(libc::SYS_setresgid, groups[0], groups[0], groups[0]), 0);
            assert_eq!(libc::syscall(libc::SYS_setresuid, uid, uid, uid), 0);
        }
        work()
    };
    std::thread::scope(|s| s.spawn(as_them).join().unwrap())
}

/// Members of `karst-admin` are administrators; nobody else gets in, and nobody but control to the host.
#[test]
fn members_of_the_group_get_in_and_strangers_do_not() {
    const GROUP: u32 = 64_917;
    const MEMBER: u32 = 64_918;
    const STRANGER: u32 = 64_919;
    if !backends::root() {
        return;
    }
    // A machine that has the group, for the daemon alone: in a mount namespace of its own with another /etc/group.
    let groups = fs::read_to_string("/etc/group").unwrap();
    let others: String =
        groups.lines().filter(|l| !l.starts_with("karst-admin:")).map(|l| format!("{l}\n")).collect();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "{others}karst-admin:x:{GROUP}:").unwrap();
    fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let from = std::ffi::CString::new(file.path().to_str().unwrap()).unwrap();
    let private = move |command: &mut Command| {
        let mount = move || {
            // SAFETY: between fork and exec, system calls on strings that live in the closure.
            unsafe {
                let all = libc::MS_REC | libc::MS_PRIVATE;
                let null = std::ptr::null::<libc::c_char>();
                if libc::unshare(libc::CLONE_NEWNS) != 0
                    || libc::mount(null, c"/".as_ptr(), null, all, null.cast()) != 0
                    || libc::mount(from.as_ptr(), c"/etc/group".as_ptr(), null, libc::MS_BIND, null.cast())
                        != 0
                {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: as above.
        unsafe { command.pre_exec(mount) };
    };
    let mut karstd = Karstd::start_as(&[], private).unwrap();
    karstd.healthy();
    for (name, rights) in [("unix.socket", 0o660), ("libvirt-sock", 0o660), ("libvirt-sock-ro", 0o666)] {
        assert_eq!(mode(karstd.dir.join(name)), (rights, 0, GROUP), "{name}");
    }
    let dir = karstd.dir.as_path();
    let connect = |name: &str| UnixStream::connect(dir.join(name)).map(drop).map_err(|e| e.kind());
    let denied = Err(std::io::ErrorKind::PermissionDenied);
    // The group as one of many, and as the first.
    for groups in [&[MEMBER, GROUP][..], &[GROUP]] {
        as_user(MEMBER, groups, || {
            let answer = api(&karstd, "GET", "/1.0", "", b"");
            assert_eq!(answer["metadata"]["auth"], "trusted", "{answer}");
            // Not only to read: a change, and back.
            json(&karstd, "POST", "/1.0/projects", serde_json::json!({"name": "of-a-member"}));
            api(&karstd, "DELETE", "/1.0/projects/of-a-member", "", b"");
            assert_eq!((connect("libvirt-sock"), connect("libvirt-sock-ro")), (Ok(()), Ok(())));
            assert_eq!(connect("run/host.sock"), denied, "administrators of guests are not the host's root");
            for private in ["state", "host", "run"] {
                let refused = fs::read_dir(dir.join(private)).map(drop).map_err(|e| e.kind());
                assert_eq!(refused, denied, "{private} is nobody else's to read");
            }
        });
    }
    as_user(STRANGER, &[STRANGER, GROUP + 100], || {
        assert_eq!((connect("unix.socket"), connect("libvirt-sock")), (denied, denied));
        assert_eq!(connect("run/host.sock"), denied);
        assert_eq!(
            connect("libvirt-sock-ro"),
            Ok(()),
            "the read-only socket is everybody's, as libvirt's is"
        );
    });
    assert!(karstd.stop().success());
}

#[test]
fn the_first_answer_comes_soon() {
    // The figure is 0.1 s on an idle machine; on a busy one some of several must come near it.
    let mut took = vec![];
    while took.len() < 8 && took.iter().all(|t| *t >= Duration::from_secs(3)) {
        let Some(mut karstd) = Karstd::start(&[]) else {
            return;
        };
        let began = Instant::now();
        until("an answer", || karstd.status());
        took.push(began.elapsed());
        karstd.stop();
    }
    eprintln!("first answer after {took:?}");
    assert!(took.iter().any(|t| *t < Duration::from_secs(3)), "{took:?}");
}

#[test]
fn killed_in_any_combination_they_come_back() {
    let Some(mut karstd) = Karstd::start(&[]) else {
        return;
    };
    let id = karstd.healthy()["daemon"].clone();
    for victims in [&["host"][..], &["control"], &["host", "control"], &["control", "host"]] {
        let before: Vec<_> = victims.iter().map(|v| (*v, karstd.pid(v).unwrap())).collect();
        for (_, pid) in &before {
            kill(*pid, libc::SIGKILL);
        }
        for (role, old) in &before {
            until("a new process", || karstd.pid(role).filter(|new| new != old && alive(*new)));
            assert!(!alive(*old));
        }
        assert_eq!(karstd.healthy()["daemon"], id);
    }
    let record = karstd.daemons().unwrap();
    assert_eq!(
        (&record["daemons"]["host"]["starts"], &record["daemons"]["control"]["starts"]),
        (&4.into(), &4.into())
    );
    assert!(karstd.lines("WARN").iter().any(|l| l.contains("signal 9")), "it is logged");

    // The launcher: both daemons end with it, a new one takes DIR over.
    let [host, control] = ["host", "control"].map(|r| karstd.pid(r).unwrap());
    kill(karstd.child.id(), libc::SIGKILL);
    karstd.child.wait().unwrap();
    until("the end of the daemons", || (!alive(host) && !alive(control)).then_some(()));
    let again = start_in(&karstd.dir, &[]);
    karstd.child = again;
    assert_eq!(karstd.healthy()["daemon"], id, "the same instance");
    assert!(karstd.stop().success());
}

/// While control cannot stay up, clients are told why at once, and are served as soon as it does.
#[test]
fn who_asks_while_control_keeps_ending_is_told_why() {
    let Some(mut karstd) = Karstd::start(&[]) else {
        return;
    };
    karstd.healthy();
    let file = karstd.dir.join("store.toml");
    fs::write(&file, "etdc = []\n").unwrap();
    kill(karstd.pid("control").unwrap(), libc::SIGKILL);
    let ask = || {
        let mut stream = UnixStream::connect(karstd.dir.join("unix.socket")).ok()?;
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.write_all(b"GET /1.0 HTTP/1.1\r\nHost: karst\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    };
    let refusal = until("a refusal", ask);
    assert!(refusal.starts_with("HTTP/1.1 503 "), "{refusal}");
    let body: serde_json::Value = serde_json::from_str(refusal.split_once("\r\n\r\n").unwrap().1).unwrap();
    let error = body["error"].as_str().unwrap();
    assert!(
        error.contains("store.toml") && error.contains("etdc") && error.contains("times in a row"),
        "{error}"
    );
    assert_eq!(proc_status(karstd.pid("launcher").unwrap())["Threads"], "1");
    fs::remove_file(&file).unwrap();
    karstd.healthy();
    karstd.stop();
}

#[test]
fn one_launcher_a_directory() {
    let Some(mut karstd) = Karstd::start(&[]) else {
        return;
    };
    karstd.healthy();
    let second = start_in(&karstd.dir, &[]).wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && text.contains("already serves") && text.contains("--dir"), "{text}");
    karstd.healthy();
    assert!(karstd.stop().success());
    let output = Command::new(env!("CARGO_BIN_EXE_karstd"))
        .arg("--dir")
        .arg(&karstd.dir)
        .args(["--user", "karst-no-such-user"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("useradd"), "{text}");
}

/// A launcher may be killed between making a directory of control's and giving it away.
#[test]
fn a_directory_that_was_not_given_away_yet_is_taken_over() {
    use std::os::unix::fs::{DirBuilderExt, chown};
    let half_made = |command: &mut Command| {
        let dir = PathBuf::from(command.get_args().nth(1).unwrap());
        fs::DirBuilder::new().mode(0o711).create(&dir).unwrap();
        fs::DirBuilder::new().mode(0o700).create(dir.join("state")).unwrap();
    };
    let Some(mut karstd) = Karstd::start_as(&[], half_made) else {
        return;
    };
    karstd.healthy();
    let (state, (uid, gid)) = (karstd.dir.join("state"), nobody());
    assert_eq!(mode(state.clone()), (0o700, uid, gid));
    assert!(karstd.stop().success());
    // With something in it, somebody gave it to that user.
    chown(&state, Some(0), None).unwrap();
    let refused = start_in(&karstd.dir, &[]).wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("belongs to user 0"), "{text}");
    assert_eq!(mode(state.clone()).1, 0, "nothing was changed");
    chown(&state, Some(uid), None).unwrap();
}

#[test]
fn without_root_it_says_what_to_do() {
    if !backends::root() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    fs::set_permissions(base.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let program = base.path().join("karstd");
    fs::copy(env!("CARGO_BIN_EXE_karstd"), &program).unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let (uid, gid) = nobody();
    let run = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.arg("--dir").arg(base.path().join("d")).args(args).uid(uid).gid(gid);
        command.output().unwrap()
    };
    let output = run(&[]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("root") && text.contains("--simulate"), "{text}");
    assert!(!base.path().join("d").exists(), "nothing was made");
    // The roles by hand are refused as well, as root and as anybody.
    let flags = ["--listen-fd", "3", "--daemon-id", "aaaaaa", "--parent", "1", "--control-uid", "0"];
    for role in ["host", "control"] {
        assert!(!run(&[&[role], &flags[..]].concat()).status.success(), "{role} as nobody");
        let as_root = Command::new(&program).arg(role).args(flags).output().unwrap();
        assert!(!as_root.status.success(), "{role} as root");
    }
}

#[test]
fn the_simulation_needs_no_privileges() {
    let mut karstd = Karstd::start(&["--simulate", "3x2"]).unwrap();
    let status = karstd.healthy();
    assert_eq!(status["hosts"], 3);
    until("the guests of all hosts", || (karstd.status()?["instances"] == 6).then_some(()));
    assert_eq!(status["host"]["kernel"], "6.1.0-simulated");
    assert!(karstd.stop().success());
}

/// A policy that others could have written stops the host, in words; control goes on.
#[test]
fn a_policy_that_is_not_roots_is_refused() {
    if Path::new("/etc/karst/host-policy.toml").exists() {
        return backends::absent(backends::Optional::NoPolicy);
    }
    let Some(mut karstd) = Karstd::start(&[]) else {
        return;
    };
    karstd.healthy();
    let file = karstd.dir.join("host-policy.toml");
    fs::write(&file, "privileged_containers = true\n").unwrap();
    std::os::unix::fs::chown(&file, Some(nobody().0), None).unwrap();
    kill(karstd.pid("host").unwrap(), libc::SIGKILL);
    until("the refusal", || {
        karstd.lines("ERROR").iter().any(|l| l.contains("host-policy.toml")).then_some(())
    });
    assert!(karstd.status().unwrap()["host"]["error"].is_string(), "control answers, the host does not");
    fs::remove_file(&file).unwrap();
    karstd.healthy();
    karstd.stop();
}
