//! The lab of the tests: network namespaces that play host, guests and the outside.
#![allow(dead_code)] // each suite uses a part

pub mod probe;

use karst_network::NetworkDriver;
use std::{
    future::Future,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

pub const INSIDE: &str = "KARST_NETWORK_TEST_INSIDE";
pub const ROLE: &str = "KARST_NETWORK_TEST_ROLE";

/// Removes namespaces also when the test fails.
pub struct Namespaces(Vec<String>);
impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

pub fn try_run(argv: &[&str]) -> Output {
    Command::new(argv[0])
        .args(&argv[1..])
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{argv:?}: {e}"))
}

pub fn run(argv: &[&str]) -> String {
    let out = try_run(argv);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{argv:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

pub fn missing(programs: &[&str]) -> Option<String> {
    if std::fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m)).unwrap_or(1) != 0 {
        return Some("not root".into());
    }
    let dirs = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    programs
        .iter()
        .find(|p| !dirs.iter().any(|d| Path::new(d).join(p).is_file()))
        .map(|p| format!("{p} is not installed"))
}

const SETTINGS6: &str = "/proc/sys/net/ipv6/conf";

/// What making a network changes of IPv6 for interfaces that are not its own.
fn settings6() -> Vec<String> {
    let mut found = vec![];
    for link in std::fs::read_dir(SETTINGS6).into_iter().flatten().flatten() {
        for key in ["forwarding", "accept_ra", "disable_ipv6"] {
            let value = std::fs::read_to_string(link.path().join(key)).unwrap_or_default();
            found.push(format!("{}.{key}={}", link.file_name().to_string_lossy(), value.trim_end()));
        }
    }
    found.sort();
    found
}

/// The lab: this process runs inside the namespace of the "host".
pub struct Lab {
    /// Names of the guests' and the outside's namespaces begin with it.
    pub prefix: String,
    pub dir: PathBuf,
}

/// Runs `inside` in a namespace of its own with guests `-a`, `-b`, `-c` and the outside `-x` beside.
pub fn lab<F: Future<Output = ()>>(test: &str, programs: &[&str], inside: impl FnOnce(Lab) -> F) {
    if let Ok(prefix) = std::env::var(INSIDE) {
        // Orphans (dnsmasq) come to this process, which outlives them: a host without a reaping init keeps no zombies of ours.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let dir = PathBuf::from(std::env::var(ROLE).unwrap());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(inside(Lab { prefix, dir }));
        return;
    }
    let mut needed = vec!["ip", "nft", "dnsmasq", "busybox"];
    needed.extend(programs);
    if let Some(reason) = missing(&needed) {
        super::backends::missing(&reason);
        return;
    }
    let prefix = format!("kn{}{}", std::process::id(), &test[..3]);
    let host = format!("{prefix}-h");
    let names: Vec<String> = ["h", "a", "b", "c", "x"].iter().map(|n| format!("{prefix}-{n}")).collect();
    let guard = Namespaces(names.clone());
    for name in &names {
        run(&["ip", "netns", "add", name]);
        run(&["ip", "-n", name, "link", "set", "lo", "up"]);
        // New namespaces inherit it from the machine's.
        run(&["ip", "netns", "exec", name, "busybox", "sysctl", "-qw", "net.ipv4.ip_forward=0"]);
        if Path::new(SETTINGS6).exists() {
            run(&["ip", "netns", "exec", name, "busybox", "sysctl", "-qw", "net.ipv6.conf.all.forwarding=0"]);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    let status = Command::new("ip")
        .args(["netns", "exec", &host])
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(INSIDE, &prefix)
        .env(ROLE, dir.path())
        .status()
        .unwrap();
    for name in &names {
        for pid in run(&["ip", "netns", "pids", name]).split_whitespace() {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            // Only what a failed test left: processes of the namespaces that this test made.
            eprintln!("left in {name}: {pid} {}", String::from_utf8_lossy(&line).replace('\0', " "));
            let _ = Command::new("kill").args(["-9", pid]).status();
        }
    }
    drop(guard);
    assert!(status.success(), "{test} failed inside its namespace");
}

pub const MACS: [&str; 2] = ["02:aa:00:00:00:01", "02:aa:00:00:00:02"];

impl Lab {
    pub fn ns(&self, n: &str) -> String {
        format!("{}-{n}", self.prefix)
    }
    pub fn driver(&self) -> NetworkDriver {
        NetworkDriver::new("ab12cd", self.dir.join("net"))
    }
    pub fn guest(&self, n: &str, argv: &[&str]) -> Output {
        let ns = self.ns(n);
        let mut all = vec!["ip", "netns", "exec", &ns];
        all.extend(argv);
        try_run(&all)
    }
    /// A guest's cable into the bridge.
    pub fn plug(&self, n: &str, mac: &str, bridge: &str) {
        let host = format!("v{n}");
        run(&[
            "ip",
            "link",
            "add",
            &host,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "address",
            mac,
            "netns",
            &self.ns(n),
        ]);
        karst_host::link::set_master(&host, Some(bridge)).unwrap();
        karst_host::link::set_up(&host, true).unwrap();
        run(&["ip", "-n", &self.ns(n), "link", "set", "eth0", "up"]);
    }
    /// A real DHCP client; answers the address that it got and set.
    pub fn dhcp(&self, n: &str, extra: &[&str]) -> Option<String> {
        let script = self.dir.join("udhcpc.sh");
        std::fs::write(
            &script,
            "#!/bin/sh\n[ \"$1\" = bound ] || exit 0\nip addr replace $ip/$mask dev $interface\n\
             ip route replace default via $router\necho $ip > $KARST_OUT\necho $domain $dns > $KARST_OUT.opts\n",
        )
        .unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let out = self.dir.join(format!("lease-{n}"));
        let _ = std::fs::remove_file(&out);
        let set = format!("KARST_OUT={}", out.display());
        let mut argv = vec![
            "env", &set, "busybox", "udhcpc", "-f", "-q", "-n", "-t", "20", "-T", "1", "-i", "eth0", "-s",
        ];
        argv.push(script.to_str().unwrap());
        argv.extend(extra);
        let done = self.guest(n, &argv);
        let address = std::fs::read_to_string(&out).ok().map(|t| t.trim().to_owned());
        if address.is_none() {
            eprintln!("udhcpc in {n}: {}", String::from_utf8_lossy(&done.stderr));
        }
        address
    }
    /// What the bridge's DNS answers to a guest.
    pub fn lookup(&self, n: &str, name: &str, server: &str) -> Option<String> {
        let out = self.guest(n, &["busybox", "nslookup", "-type=a", name, server]);
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let answer = text.split("Name:").nth(1)?;
        Some(answer.lines().find_map(|l| l.strip_prefix("Address: "))?.trim().to_owned())
    }
    pub fn pings(&self, n: &str, to: &str) -> bool {
        self.guest(n, &["busybox", "ping", "-c", "1", "-W", "1", to]).status.success()
    }
    /// It does within some tries: what was plugged or changed a moment ago may cost the first.
    pub fn reaches(&self, n: &str, to: &str) -> bool {
        (0..20).any(|_| {
            let reached = self.pings(n, to);
            if !reached {
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
            reached
        })
    }
    /// The outside: 192.0.2.2 behind the host's 192.0.2.1, without a route back to the guests.
    pub fn outside(&self) {
        run(&["ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", &self.ns("x")]);
        run(&["ip", "addr", "add", "192.0.2.1/24", "dev", "up0"]);
        run(&["ip", "link", "set", "up0", "up"]);
        run(&["ip", "-n", &self.ns("x"), "addr", "add", "192.0.2.2/24", "dev", "eth0"]);
        run(&["ip", "-n", &self.ns("x"), "link", "set", "eth0", "up"]);
        // A trace taken before the link has come up would differ from every later one.
        eventually("the link to the outside is up", || {
            let now = run(&["ip", "-br", "addr", "show", "dev", "up0"]);
            now.contains(" UP ") && (now.contains("fe80:") || !Path::new("/proc/sys/net/ipv6").exists())
        });
    }
    /// Links, nft and iptables rules, settings and dnsmasq processes of this namespace.
    pub fn trace(&self) -> String {
        let links = karst_host::link::list().unwrap().into_iter().map(|l| l.name).collect::<Vec<_>>();
        let iptables = if Path::new("/usr/sbin/iptables-nft").exists() {
            run(&["iptables-nft", "-S"])
        } else {
            String::new()
        };
        format!(
            "{links:?}\n{}\n{iptables}\n{:?}\n{:?}\n{}\n{:?}",
            run(&["nft", "-s", "list", "ruleset"]),
            karst_host::sysctl::get(&["net", "ipv4", "ip_forward"]).unwrap(),
            settings6(),
            run(&["ip", "-br", "addr"]),
            self.dnsmasqs()
        ) + &if std::fs::read_to_string("/proc/net/ip_tables_names").is_ok_and(|t| !t.is_empty()) {
            run(&["iptables-legacy", "-S"])
        } else {
            String::new()
        }
    }
    pub fn setting6(&self, link: &str, key: &str) -> String {
        karst_host::sysctl::get(&["net", "ipv6", "conf", link, key]).unwrap().unwrap_or_default()
    }
    pub fn dnsmasqs(&self) -> Vec<i32> {
        let dir = self.dir.to_string_lossy().into_owned();
        let ours = |a: &[std::ffi::OsString]| {
            a.first().is_some_and(|p| p.to_string_lossy().ends_with("dnsmasq"))
                && a.iter().any(|x| x.to_string_lossy().contains(&dir))
        };
        karst_host::process::Process::find(ours).unwrap().iter().map(|p| p.pid()).collect()
    }
}

pub fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(120);
    while !is() {
        assert!(Instant::now() < until, "not within 120 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
