//! Proxies of real containers: both ways, streams and datagrams, over the daemon's death and a reboot from inside.
#![allow(clippy::disallowed_methods)] // tests live in the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, inside, until};
use karst_guest::{GuestDriver, StopMode};
use karst_model::{
    ErrorKind,
    device::{ProxyAddress, ProxyDevice, ProxyProtocol, SocketMode},
    spec::ProxySpec,
};
use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

fn proxy(
    name: &str,
    protocol: ProxyProtocol,
    in_guest: bool,
    listen: SocketAddr,
    connect: SocketAddr,
) -> ProxySpec {
    ProxySpec {
        name: name.into(),
        device: ProxyDevice {
            protocol,
            in_guest,
            pairs: vec![(ProxyAddress::Net(listen), ProxyAddress::Net(connect))],
            socket: None,
            user: None,
            announce: false,
        },
    }
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// A port of the host that nobody has and nobody is given by chance: below those that the kernel draws.
fn free() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(64);
    let drawn = || 10_000 + (first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000) as u16;
    let mut ports = std::iter::repeat_with(drawn).take(1000);
    ports.find(|port| TcpListener::bind(local(*port)).is_ok()).expect("one of 1,000 ports is free")
}

fn ask(port: u16, question: &str) -> Option<String> {
    let mut stream = TcpStream::connect(local(port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
    stream.write_all(question.as_bytes()).ok()?;
    stream.shutdown(std::net::Shutdown::Write).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    (!answer.is_empty()).then_some(answer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_ways_and_through_everything() {
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let mut guest = place.guest(31);
    // busybox, which is static, serves inside.
    let Ok(_) = std::fs::copy("/usr/bin/busybox", guest.root.path.join("usr/bin/busybox")) else {
        return backends::missing("busybox is not installed");
    };
    let unit = "[Service]\nExecStart=/usr/bin/busybox nc -ll -p 7 -e /bin/cat\n[Install]\nWantedBy=multi-user.target\n";
    std::fs::write(guest.root.path.join("etc/systemd/system/echo.service"), unit).unwrap();
    let wants = guest.root.path.join("etc/systemd/system/multi-user.target.wants");
    std::fs::create_dir_all(&wants).unwrap();
    std::os::unix::fs::symlink("/etc/systemd/system/echo.service", wants.join("echo.service")).unwrap();

    let port = free();
    guest.proxies = vec![proxy("echo", ProxyProtocol::Tcp, false, local(port), local(7))];
    driver.start(&guest).await.unwrap();
    until("an answer from inside", || ask(port, "hello") == Some("hello".into())).await;
    // Its process is nobody on the host and can do nothing.
    let keeper = guest.state_dir.join("proxies/echo");
    let pid = karst_guest::keeper::read_status(&keeper).unwrap().pid.unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let base = guest.ids.base;
    assert!(status.contains(&format!("Uid:\t{base}\t{base}\t{base}\t{base}\n")), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000") && status.contains("NoNewPrivs:\t1"), "{status}");

    // A taken port is told, and nothing stays of it.
    let before = guest.proxies.clone();
    guest.proxies.push(proxy("taken", ProxyProtocol::Tcp, false, local(port), local(7)));
    let e = driver.update(&guest).await.unwrap_err();
    assert_eq!((e.kind, e.field.as_deref()), (ErrorKind::Conflict, Some("devices.taken.listen")));
    assert!(!guest.state_dir.join("proxies/taken").exists());
    guest.proxies = before;

    // The other way, live, by another process of the host; datagrams too.
    let again = place.driver();
    again.adopt().await.unwrap();
    let server = TcpListener::bind(local(0)).unwrap();
    let (out, sink) = (server.local_addr().unwrap(), UdpSocket::bind(local(0)).unwrap());
    sink.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    guest.proxies.push(proxy("out", ProxyProtocol::Tcp, true, local(1234), out));
    guest.proxies.push(proxy("drops", ProxyProtocol::Udp, true, local(1235), sink.local_addr().unwrap()));
    again.update(&guest).await.unwrap();
    let serve = std::thread::spawn(move || server.accept().unwrap().0.write_all(b"from the host"));
    assert_eq!(inside(&again, &guest, "busybox nc 127.0.0.1 1234 </dev/null").await, "from the host");
    serve.join().unwrap().unwrap();
    let answer = std::thread::spawn(move || {
        let mut buffer = [0; 16];
        let (n, sender) = sink.recv_from(&mut buffer)?;
        sink.send_to(&buffer[..n], sender)
    });
    let script = "bash -c 'exec 3<>/dev/udp/127.0.0.1/1235; echo drop >&3; timeout 60 dd bs=64 count=1 <&3 2>/dev/null'";
    assert_eq!(inside(&again, &guest, script).await, "drop");
    answer.join().unwrap().unwrap();

    // A reboot from inside: another network, the same proxies.
    let first = again.observe(guest.instance).await.unwrap().pid;
    inside(
        &again,
        &guest,
        "until systemctl list-units >/dev/null 2>&1; do sleep 0.1; done; systemctl reboot || true",
    )
    .await;
    let end = Instant::now() + Duration::from_secs(180);
    while again.observe(guest.instance).await.unwrap().pid.is_none_or(|p| Some(p) == first)
        || ask(port, "again") != Some("again".into())
    {
        assert!(Instant::now() < end, "no answer after a reboot");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Taken away: the port is free. The rest goes with the guest.
    guest.proxies.remove(0);
    again.update(&guest).await.unwrap();
    drop(TcpListener::bind(local(port)).unwrap());
    let left = karst_guest::keeper::read_status(&guest.state_dir.join("proxies/out")).unwrap().pid.unwrap();
    again.stop(guest.instance, StopMode::Force).await.unwrap();
    until("the end of the proxies", || !std::path::Path::new(&format!("/proc/{left}/exe")).exists()).await;
    assert!(std::fs::read_dir(guest.state_dir.join("proxies")).is_ok_and(|mut d| d.next().is_none()));
    place.assert_clean();
}

/// A proxy of streams between any two ends.
fn unix(name: &str, in_guest: bool, listen: &str, connect: &str) -> ProxySpec {
    let mut proxy = proxy(name, ProxyProtocol::Tcp, in_guest, local(1), local(1));
    proxy.device.pairs = vec![(listen.parse().unwrap(), connect.parse().unwrap())];
    proxy
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unix_sockets_of_both_sides() {
    use std::os::unix::{fs::MetadataExt, net::UnixListener, net::UnixStream};
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let mut guest = place.guest(32);
    driver.start(&guest).await.unwrap();

    // Servers on the host, and a directory for sockets that is given by its real path.
    let dir = tempfile::Builder::new().prefix("karst-proxies-").tempdir().unwrap();
    let at = |name: &str| format!("unix:{}", dir.path().canonicalize().unwrap().join(name).display());
    let server = UnixListener::bind(dir.path().join("server")).unwrap();
    std::thread::spawn(move || {
        for mut stream in server.incoming().flatten() {
            let mut question = String::new();
            let _ = stream.read_to_string(&mut question);
            let _ = write!(stream, "host:{question}");
        }
    });
    // By a path in the guest to a path of the host, as a user of the host who may.
    let mut inward = unix("in", true, "unix:/run/in.sock", &at("server"));
    inward.device.socket = Some(SocketMode { uid: 1000, gid: 0, mode: 0o660 });
    inward.device.user = Some((0, 0));
    // By a name in the guest's network to the same; and to a place from which it may not.
    let by_name = ProxySpec {
        device: ProxyDevice { user: Some((0, 0)), ..unix("n", true, "unix:@in", &at("server")).device },
        name: "name".into(),
    };
    let refused = unix("refused", true, "unix:/run/refused.sock", &at("server"));
    // From the host into the guest, where a proxy of the guest's own listens; told who comes.
    let port = free();
    let mut outward = unix("out", false, &at("out"), "unix:/run/in.sock");
    outward.device.socket = Some(SocketMode { uid: 0, gid: 0, mode: 0o600 });
    outward.device.user = Some((1000, 0));
    let tcp = unix("tcp", false, &format!("127.0.0.1:{port}"), "unix:@in");
    let covered = unix("covered", true, "unix:/srv/covered.sock", &at("server"));
    guest.proxies = vec![inward, by_name, refused, outward, tcp, covered];
    driver.update(&guest).await.unwrap();

    // Its init mounts file systems over places where sockets have been made before: they are made again.
    inside(&driver, &guest, "until systemctl list-units >/dev/null 2>&1; do sleep 0.1; done; i=0; \
        until test -S /run/in.sock && test -S /run/refused.sock || test $i -gt 1200; do sleep 0.1; i=$((i+1)); done").await;
    let inside_is = |script: &'static str| inside(&driver, &guest, script);
    assert_eq!(inside_is("stat -c '%u %g %a' /run/in.sock").await.trim(), "1000 0 660");
    let talk = |path: String| {
        let mut stream = UnixStream::connect(path).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
        // Whoever is refused finds it closed at once, or while it still writes.
        let _ = stream.write_all(b"hello").and_then(|()| stream.shutdown(std::net::Shutdown::Write));
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        Some(answer)
    };
    let out = dir.path().join("out").to_str().unwrap().to_owned();
    // Twice through: host, guest, host.
    until("an answer", || talk(out.clone()).as_deref() == Some("host:hello")).await;
    assert_eq!(std::fs::metadata(&out).unwrap().mode() & 0o777, 0o600);
    assert_eq!(ask(port, "name").as_deref(), Some("host:name"));
    // Something that is mounted over its place, where none can be made, is a warning as long as it is there.
    inside_is("until test -S /srv/covered.sock; do sleep 0.1; done; mount -t tmpfs -o ro none /srv").await;
    let id = guest.instance.to_string();
    let told = || driver.warnings().iter().any(|w| w.contains("\"covered\"") && w.contains(&id));
    until("a warning", told).await;
    inside_is("umount /srv").await;
    until("no warning", || driver.warnings().is_empty()).await;
    // Who may not connect gets nothing: the guest's root is nobody on the host.
    std::fs::set_permissions(dir.path().join("server"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .unwrap();
    let root =
        format!("/proc/{}/root/run/refused.sock", driver.observe(guest.instance).await.unwrap().pid.unwrap());
    assert_eq!(talk(root.clone()).as_deref(), Some(""));

    // A name that something else has, and a user that the guest has not, are told; nothing stays.
    let before = guest.proxies.clone();
    std::fs::write(dir.path().join("file"), "mine").unwrap();
    let mut strange = unix("user", true, "unix:/run/strange.sock", &at("server"));
    strange.device.socket = Some(SocketMode { uid: 70_000, gid: 0, mode: 0o600 });
    for (bad, kind, field) in [
        (unix("taken", false, &at("file"), "unix:@x"), ErrorKind::Conflict, "devices.taken.listen"),
        (unix("none", true, "unix:/nowhere/x", &at("server")), ErrorKind::NotFound, "devices.none.listen"),
        (strange, ErrorKind::Invalid, "devices.user.listen"),
    ] {
        guest.proxies = before.clone();
        guest.proxies.push(bad.clone());
        let e = driver.update(&guest).await.unwrap_err();
        assert_eq!((e.kind, e.field.as_deref()), (kind, Some(field)), "{e}");
        assert!(!guest.state_dir.join("proxies").join(&bad.name).exists());
    }
    assert_eq!(std::fs::read_to_string(dir.path().join("file")).unwrap(), "mine");
    // Taken away, both sockets go; what is left goes with the guest.
    guest.proxies = before[3..].to_vec();
    driver.update(&guest).await.unwrap();
    assert!(!Path::new(&root).exists() && !Path::new(&root.replace("refused", "in")).exists());
    assert!(Path::new(&out).exists());
    driver.stop(guest.instance, StopMode::Force).await.unwrap();
    until("the end of the socket", || !Path::new(&out).exists()).await;
    place.assert_clean();
}
