//! The three processes as the kernel sees them: users, capabilities, sockets; killed in every combination; a hostile control
//! process; DIR's lock; the simulation.
#![allow(clippy::disallowed_methods)] // real processes, real time

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

const LONG: Duration = Duration::from_secs(30);
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

struct Karstd {
    child: Child,
    dir: PathBuf,
    log: Arc<Mutex<Vec<String>>>,
    _base: tempfile::TempDir,
}

fn start_in(dir: &Path, extra: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_karstd"))
        .arg("--dir")
        .arg(dir)
        .args(["--user", USER, "--log-format", "json"])
        .args(extra)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

impl Karstd {
    /// `None`, said aloud, without root.
    fn start(extra: &[&str]) -> Option<Self> {
        if !rustix::process::geteuid().is_root() && extra.is_empty() {
            eprintln!("skipped: needs root");
            return None;
        }
        let base = tempfile::Builder::new().prefix("karstd-").tempdir().unwrap();
        // The control process passes through it.
        fs::set_permissions(base.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        let dir = base.path().join("k");
        let mut child = start_in(&dir, extra);
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
    all.lines()
        .skip(1)
        .filter(|l| l.split_whitespace().any(|w| inodes.iter().any(|i| i == w)))
        .map(str::to_owned)
        .collect()
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

    let of = proc_status(host);
    assert_eq!(of["Uid"], "0\t0\t0\t0");
    // What docs and code say it may: CHOWN … SETFCAP and MAC_ADMIN, never SYS_MODULE, SYS_RAWIO, SYS_BOOT, SYS_TIME, BPF.
    let granted: u64 = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 18, 19, 21, 23, 24, 27, 31, 33]
        .iter()
        .map(|n| 1u64 << n)
        .sum();
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        let has = u64::from_str_radix(&of[set], 16).unwrap();
        assert_eq!(has & !granted, 0, "{set} of host: {has:x}");
    }
    assert_eq!((of["CapInh"].as_str(), of["CapAmb"].as_str()), ("0000000000000000", "0000000000000000"));

    for (name, pid) in [("launcher", launcher), ("host", host), ("control", control)] {
        for table in ["tcp", "tcp6", "udp", "udp6", "raw", "packet"] {
            assert_eq!(sockets(pid, table), Vec::<String>::new(), "{name} has {table} sockets");
        }
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
        assert!(threads <= if name == "launcher" { 1 } else { 8 }, "{name}: {threads} threads");
    }
    let listens = |pid, path: &str| sockets(pid, "unix").iter().any(|l| l.ends_with(path));
    assert!(listens(control, "/unix.socket") && !listens(control, "/host.sock.lock"));
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
    // What the host says of this machine is not the daemons' doing, nor is another daemon that was quicker with a bridge.
    let known = ["emulated", "exists already", "trying again"];
    let warnings: Vec<_> =
        karstd.lines("WARN").into_iter().filter(|l| !known.iter().any(|k| l.contains(k))).collect();
    assert_eq!(warnings, Vec::<String>::new());
}

#[test]
fn the_first_answer_comes_soon() {
    let Some(mut karstd) = Karstd::start(&[]) else {
        return;
    };
    let began = Instant::now();
    until("an answer", || karstd.status());
    eprintln!("first answer after {:?}", began.elapsed());
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}; the figure is 0.1 s on an idle machine",
        began.elapsed()
    );
    karstd.stop();
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

#[test]
fn without_root_it_says_what_to_do() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: needs root to become somebody else");
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
        return eprintln!("skipped: this machine has a policy of its own");
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
