//! Proxies of real containers: both ways, streams and datagrams, over the daemon's death and a reboot from inside.
#![allow(clippy::disallowed_methods)] // tests live in the real world

mod common;

use common::{Place, inside, until};
use karst_guest::{GuestDriver, StopMode};
use karst_model::{
    ErrorKind,
    device::{ProxyDevice, ProxyProtocol},
    spec::ProxySpec,
};
use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
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
        device: ProxyDevice { protocol, in_guest, pairs: vec![(listen, connect)] },
    }
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// A port of the host that was free a moment ago.
fn free() -> u16 {
    TcpListener::bind(local(0)).unwrap().local_addr().unwrap().port()
}

fn ask(port: u16, question: &str) -> Option<String> {
    let mut stream = TcpStream::connect(local(port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
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
        return println!("skipped: busybox is not installed");
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
    sink.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
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
    let script = "bash -c 'exec 3<>/dev/udp/127.0.0.1/1235; echo drop >&3; timeout 10 dd bs=64 count=1 <&3 2>/dev/null'";
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
    let end = Instant::now() + Duration::from_secs(60);
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
