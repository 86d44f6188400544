//! An etcd server of the test's own: a process on loopback with its data in a temporary directory, and, over TLS, with
//! certificates that the test makes itself.
#![allow(dead_code)] // each suite uses a part

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

const PROGRAM: &str = "/usr/bin/etcd";

/// A running server; ends with the value.
pub struct EtcdServer {
    child: Child,
    directory: TempDir,
    ports: [u16; 2],
    tls: bool,
}

/// Two ports that nobody has and nobody is given by chance: below those that the kernel draws for connections and for
/// port 0, and never the same twice in one program. (A drawn one, let go until the server takes it, was another test's by
/// then, once in some hundred runs.)
fn free_ports() -> [u16; 2] {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(64);
    let free = || {
        let drawn = || 10_000 + (first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000) as u16;
        let mut ports = std::iter::repeat_with(drawn).take(1000);
        ports
            .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
            .expect("one of 1,000 ports is free")
    };
    [free(), free()]
}

fn spawn(directory: &Path, ports: [u16; 2], tls: bool) -> Child {
    let scheme = if tls { "https" } else { "http" };
    let client = format!("{scheme}://127.0.0.1:{}", ports[0]);
    let peer = format!("http://127.0.0.1:{}", ports[1]);
    let file = |name: &str| directory.join(name).to_string_lossy().into_owned();
    let secured = [
        format!("--cert-file={}", file("server.pem")),
        format!("--key-file={}", file("server.key")),
        format!("--trusted-ca-file={}", file("ca.pem")),
        "--client-cert-auth".into(),
    ];
    let log = std::fs::File::create(directory.join("log")).unwrap();
    Command::new(PROGRAM)
        .env_clear()
        .args(["--name", "test", "--log-level", "warn"])
        .arg("--data-dir")
        .arg(directory.join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .arg("--initial-cluster")
        .arg(format!("test={peer}"))
        .args(secured.iter().filter(|_| tls))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("etcd starts")
}

impl EtcdServer {
    /// Starts one. `None` when the program is not installed, which is printed.
    pub fn start() -> Option<EtcdServer> {
        Self::start_with_tls(false)
    }

    /// As [`EtcdServer::start`]; over TLS it demands certificates of its authority, and a password.
    pub fn start_with_tls(tls: bool) -> Option<EtcdServer> {
        if !Path::new(PROGRAM).exists() {
            super::backends::missing("etcd is not installed");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let ports = free_ports();
        if tls {
            certificates(directory.path());
        }
        let child = spawn(directory.path(), ports, tls);
        let mut server = EtcdServer { child, directory, ports, tls };
        server.wait_until_it_listens();
        if tls {
            for words in
                [["user", "add", "root:sesame"], ["user", "grant-role", "root"], ["auth", "enable", ""]]
            {
                server.control(&words);
            }
        }
        Some(server)
    }

    fn wait_until_it_listens(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(("127.0.0.1", self.ports[0])).is_err() {
            if let Some(status) = self.child.try_wait().unwrap() {
                let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
                panic!("etcd ended with {status}: {log}");
            }
            assert!(Instant::now() < deadline, "etcd does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(self.child.try_wait().unwrap().is_none(), "another program listens where etcd should");
    }

    /// Where clients connect.
    pub fn endpoints(&self) -> Vec<String> {
        let scheme = if self.tls { "https" } else { "http" };
        vec![format!("{scheme}://127.0.0.1:{}", self.ports[0])]
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.directory.path().join(name)).unwrap()
    }

    /// Who a client is that it knows.
    pub fn options(&self) -> karst_store::EtcdOptions {
        karst_store::EtcdOptions {
            ca: Some(self.read("ca.pem")),
            identity: Some((self.read("client.pem"), self.read("client.key"))),
            user: Some(("root".into(), "sesame".into())),
        }
    }

    /// An authority that has signed nothing of it.
    pub fn foreign_authority(&self) -> Vec<u8> {
        self.read("foreign.pem")
    }

    /// `etcdctl`.
    fn control(&self, words: &[&str]) {
        let mut words: Vec<&str> = words.iter().copied().filter(|w| !w.is_empty()).collect();
        if words[..2] == ["user", "grant-role"] {
            words.push("root");
        }
        let at = |name: &str| self.directory.path().join(name);
        let out = Command::new("/usr/bin/etcdctl")
            .env_clear()
            .env("ETCDCTL_API", "3")
            .args(["--command-timeout=60s", "--dial-timeout=30s"])
            .arg(format!("--endpoints={}", self.endpoints()[0]))
            .arg(format!("--cacert={}", at("ca.pem").display()))
            .arg(format!("--cert={}", at("client.pem").display()))
            .arg(format!("--key={}", at("client.key").display()))
            .args(&words)
            .output()
            .expect("etcdctl (package etcd-client)");
        assert!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// kill -9.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again on the same data and ports.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(self.directory.path(), self.ports, self.tls);
        self.wait_until_it_listens();
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An authority, a server's and a client's certificate of it, and an authority that is a stranger.
fn certificates(directory: &Path) {
    let run = |args: &[&str]| {
        let out = Command::new("/usr/bin/openssl").args(args).current_dir(directory).output().unwrap();
        assert!(out.status.success(), "openssl {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    };
    let new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    for name in ["ca", "foreign"] {
        let (key, pem, subject) = (format!("{name}.key"), format!("{name}.pem"), format!("/CN={name}"));
        let own = ["req", "-x509", "-keyout", &key, "-out", &pem, "-subj", &subject];
        run(&[&own[..], &new[..]].concat());
    }
    for (name, extension) in [
        ("server", "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n"),
        ("client", "extendedKeyUsage=clientAuth\n"),
    ] {
        let file = |kind: &str| format!("{name}.{kind}");
        let (key, csr, pem, ext) = (file("key"), file("csr"), file("pem"), file("ext"));
        std::fs::write(directory.join(&ext), extension).unwrap();
        // Not "root": the certificate's name would count as the user's without a password.
        let subject = format!("/CN=karst-{name}");
        run(&[&["req", "-keyout", &*key, "-out", &csr, "-subj", &subject][..], &new[..4], &["-nodes"]]
            .concat());
        run(&[
            "x509",
            "-req",
            "-in",
            &csr,
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            &ext,
            "-out",
            &pem,
        ]);
    }
}
