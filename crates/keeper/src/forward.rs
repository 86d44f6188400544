//! `karst-keeper --forward tcp|udp TARGET…`: passes on what comes to the sockets it got as descriptors, from 3 on in the
//! order of the targets. It runs below a keeper of its own as the guest's user, without capabilities, in the network from
//! which it connects; the sockets it listens at may be another network's, where they were made.
//!
//! Threads rather than one loop: each waits in the kernel, and their number is bounded.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{FromRawFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// Connections, or senders of datagrams, at a time.
const MOST: usize = 512;
const CONNECT: Duration = Duration::from_secs(10);
/// How long the answers to a datagram find its sender.
const IDLE: Duration = Duration::from_secs(60);
const STACK: usize = 64 * 1024;

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// A place among [`MOST`].
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let free = |n: usize| (n < MOST).then_some(n + 1);
        OPEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free).ok().map(|_| Place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves until it is killed.
pub(crate) fn main() -> ! {
    let mut args = std::env::args().skip(2);
    let udp = match args.next().as_deref() {
        Some("tcp") => false,
        Some("udp") => true,
        other => fail(&format!("unknown protocol {other:?}")),
    };
    let mut threads = vec![];
    for (n, target) in args.enumerate() {
        let target: SocketAddr = match target.parse() {
            Ok(target) => target,
            Err(_) => fail(&format!("{target:?} is no address")),
        };
        // SAFETY: the keeper has put one socket for each target there; nobody else owns them.
        let socket = unsafe { OwnedFd::from_raw_fd(3 + n as i32) };
        let work = move || {
            if udp {
                datagrams(&UdpSocket::from(socket), target)
            } else {
                streams(&TcpListener::from(socket), target)
            }
        };
        match thread::Builder::new().stack_size(STACK).spawn(work) {
            Ok(thread) => threads.push(thread),
            Err(e) => fail(&format!("no thread: {e}")),
        }
    }
    for thread in threads {
        let _ = thread.join(); // they end only when something is wrong with their socket
    }
    fail("nothing to listen at")
}

fn fail(text: &str) -> ! {
    eprintln!("karst-keeper: {text}");
    std::process::exit(1)
}

fn streams(listener: &TcpListener, target: SocketAddr) {
    loop {
        let from = match listener.accept() {
            Ok((from, _)) => from,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK)) => return,
            Err(_) => {
                // Too many descriptors, or the peer is gone already.
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        // One too many is closed at once.
        let Some(place) = Place::take() else { continue };
        let _ = thread::Builder::new().stack_size(STACK).spawn(move || {
            let _place = place;
            let Ok(to) = TcpStream::connect_timeout(&target, CONNECT) else { return };
            let _ = (from.set_nodelay(true), to.set_nodelay(true));
            let (Ok(from2), Ok(to2)) = (from.try_clone(), to.try_clone()) else { return };
            let back = thread::Builder::new().stack_size(STACK).spawn(move || pass(&to2, &from2));
            pass(&from, &to);
            match back {
                Ok(back) => drop(back.join()),
                Err(_) => drop(from.shutdown(Shutdown::Both)),
            }
        });
    }
}

/// Passes on to the end, and tells the other side that it is one.
fn pass(mut from: &TcpStream, mut to: &TcpStream) {
    if io::copy(&mut from, &mut to).is_err() {
        let _ = from.shutdown(Shutdown::Both);
    }
    let _ = to.shutdown(Shutdown::Write);
}

fn datagrams(socket: &UdpSocket, target: SocketAddr) {
    let senders: Arc<Mutex<HashMap<SocketAddr, Arc<UdpSocket>>>> = Arc::default();
    let mut buffer = vec![0u8; 65_536];
    loop {
        let (n, sender) = match socket.recv_from(&mut buffer) {
            Ok(got) => got,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EBADF | libc::ENOTSOCK)) => return,
            Err(_) => continue,
        };
        let known = senders.lock().unwrap_or_else(|e| e.into_inner()).get(&sender).cloned();
        let to = match known {
            Some(to) => to,
            None => match answers(socket, sender, target, &senders) {
                Some(to) => to,
                None => continue,
            },
        };
        // A datagram may be lost.
        let _ = to.send(&buffer[..n]);
    }
}

/// A socket towards the target for one sender, whose answers are sent back until none came for a while.
fn answers(
    socket: &UdpSocket,
    sender: SocketAddr,
    target: SocketAddr,
    senders: &Arc<Mutex<HashMap<SocketAddr, Arc<UdpSocket>>>>,
) -> Option<Arc<UdpSocket>> {
    let place = Place::take()?;
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let to = UdpSocket::bind(any).ok()?;
    to.connect(target).ok()?;
    to.set_read_timeout(Some(IDLE)).ok()?;
    let (to, back) = (Arc::new(to), socket.try_clone().ok()?);
    senders.lock().unwrap_or_else(|e| e.into_inner()).insert(sender, to.clone());
    let (from, all) = (to.clone(), senders.clone());
    let spawned = thread::Builder::new().stack_size(STACK).spawn(move || {
        let _place = place;
        let mut buffer = vec![0u8; 65_536];
        loop {
            match from.recv(&mut buffer) {
                Ok(n) => drop(back.send_to(&buffer[..n], sender)),
                // Nobody listens there now; somebody may later.
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(_) => break,
            }
        }
        all.lock().unwrap_or_else(|e| e.into_inner()).remove(&sender);
    });
    if spawned.is_err() {
        senders.lock().unwrap_or_else(|e| e.into_inner()).remove(&sender);
        return None;
    }
    Some(to)
}
