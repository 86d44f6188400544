//! `karst-keeper --forward tcp|unix|udp [--announce] TARGET…`: passes on what comes to the sockets it got as descriptors,
//! from 3 on in the order of the targets. It runs below a keeper of its own as an unprivileged user, without capabilities,
//! in the network from which it connects; the sockets it listens at may be another network's, where they were made.
//!
//! A target is `127.0.0.1:80`, `unix:@name` or `unix:/path`. For a path the descriptor behind the sockets is the directory
//! that it begins at, which nothing in it leads out of. With `--announce` a server is told first who connected, in one line:
//! version 1 of the PROXY protocol (haproxy's `proxy-protocol.txt`).
//!
//! Threads rather than one loop: each waits in the kernel, and their number is bounded.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{UnixListener, UnixStream},
    },
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

/// What is connected to.
enum Target {
    Net(SocketAddr),
    Abstract(String),
    /// Below the directory that came along.
    Path(String),
}

impl Target {
    fn parse(text: &str) -> Option<Self> {
        match text.strip_prefix("unix:") {
            None => text.parse().ok().map(Self::Net),
            Some(unix) => Some(match unix.strip_prefix('@') {
                Some(name) => Self::Abstract(name.to_owned()),
                None => Self::Path(unix.trim_start_matches('/').to_owned()),
            }),
        }
    }
}

/// Serves until it is killed.
pub(crate) fn main() -> ! {
    let mut args = std::env::args().skip(2).peekable();
    let kind = args.next().unwrap_or_default();
    let announce = args.next_if(|a| a == "--announce").is_some();
    let parse = |text: String| {
        Target::parse(&text).unwrap_or_else(|| fail(&format!("{text:?} is nothing to connect to")))
    };
    let targets: Vec<Target> = args.map(parse).collect();
    // SAFETY: the keeper has put one socket for each target there, and a directory when a target is a path; nobody else
    // owns them.
    let descriptor = |n: usize| unsafe { OwnedFd::from_raw_fd(3 + n as i32) };
    let root =
        targets.iter().any(|t| matches!(t, Target::Path(_))).then(|| Arc::new(descriptor(targets.len())));
    let mut threads = vec![];
    for (n, target) in targets.into_iter().enumerate() {
        let (socket, root) = (descriptor(n), root.clone());
        let work: Box<dyn FnOnce() + Send> = match (kind.as_str(), target) {
            ("udp", Target::Net(target)) => Box::new(move || datagrams(&UdpSocket::from(socket), target)),
            ("tcp", to) => {
                Box::new(move || streams(&Listener::Tcp(socket.into()), &Way { to, root, announce }))
            }
            ("unix", to) => {
                Box::new(move || streams(&Listener::Unix(socket.into()), &Way { to, root, announce }))
            }
            (kind, _) => fail(&format!("{kind:?} cannot be passed on so")),
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

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// The next connection, and the line that tells of it.
    fn accept(&self) -> io::Result<(Stream, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, sender) = listener.accept()?;
                let line = announcement(sender, stream.local_addr()?);
                Ok((Stream::Tcp(stream), line))
            }
            Self::Unix(listener) => {
                listener.accept().map(|(stream, _)| (Stream::Unix(stream), "PROXY UNKNOWN\r\n".to_owned()))
            }
        }
    }
}

/// The first line of the PROXY protocol.
fn announcement(from: SocketAddr, to: SocketAddr) -> String {
    let (a, b) = (from.ip().to_canonical(), to.ip().to_canonical());
    let family = if a.is_ipv4() { "TCP4" } else { "TCP6" };
    format!("PROXY {family} {a} {b} {} {}\r\n", from.port(), to.port())
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(s) => Self::Tcp(s.try_clone()?),
            Self::Unix(s) => Self::Unix(s.try_clone()?),
        })
    }

    fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Self::Tcp(s) => s.shutdown(how),
            Self::Unix(s) => s.shutdown(how),
        };
    }

    fn at_once(&self) {
        if let Self::Tcp(s) = self {
            let _ = s.set_nodelay(true);
        }
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => (&mut &*s).read(buffer),
            Self::Unix(s) => (&mut &*s).read(buffer),
        }
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(s) => (&mut &*s).write_all(bytes),
            Self::Unix(s) => (&mut &*s).write_all(bytes),
        }
    }
}

/// Where connections are made.
struct Way {
    to: Target,
    /// What a path begins at.
    root: Option<Arc<OwnedFd>>,
    announce: bool,
}

impl Way {
    fn connect(&self) -> io::Result<Stream> {
        match &self.to {
            Target::Net(address) => TcpStream::connect_timeout(address, CONNECT).map(Stream::Tcp),
            Target::Abstract(name) => {
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                UnixStream::connect_addr(&address).map(Stream::Unix)
            }
            Target::Path(path) => {
                use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
                let root = self.root.as_ref().ok_or(io::ErrorKind::NotFound)?;
                let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
                let socket =
                    openat2(root, path.as_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
                UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).map(Stream::Unix)
            }
        }
    }
}

fn streams(listener: &Listener, way: &Way) {
    thread::scope(|scope| {
        loop {
            let (from, line) = match listener.accept() {
                Ok(taken) => taken,
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK)) => {
                    return;
                }
                Err(_) => {
                    // Too many descriptors, or the peer is gone already.
                    thread::sleep(Duration::from_millis(50));
                    continue;
                }
            };
            // One too many is closed at once.
            let Some(place) = Place::take() else { continue };
            let _ = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, move || {
                let _place = place;
                let Ok(to) = way.connect() else { return };
                from.at_once();
                to.at_once();
                if way.announce && to.write_all(line.as_bytes()).is_err() {
                    return;
                }
                let (Ok(from2), Ok(to2)) = (from.try_clone(), to.try_clone()) else { return };
                let back = thread::Builder::new().stack_size(STACK).spawn(move || pass(&to2, &from2));
                pass(&from, &to);
                match back {
                    Ok(back) => drop(back.join()),
                    Err(_) => from.shutdown(Shutdown::Both),
                }
            });
        }
    });
}

/// Passes on to the end, and tells the other side that it is one.
fn pass(from: &Stream, to: &Stream) {
    let mut buffer = [0u8; 16 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) if to.write_all(&buffer[..n]).is_ok() => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            _ => {
                from.shutdown(Shutdown::Both);
                break;
            }
        }
    }
    to.shutdown(Shutdown::Write);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_told_who_connected() {
        let line = |from: &str, to: &str| announcement(from.parse().unwrap(), to.parse().unwrap());
        assert_eq!(line("192.0.2.1:5", "192.0.2.2:80"), "PROXY TCP4 192.0.2.1 192.0.2.2 5 80\r\n");
        assert_eq!(
            line("[2001:db8::1]:5", "[2001:db8::2]:80"),
            "PROXY TCP6 2001:db8::1 2001:db8::2 5 80\r\n"
        );
        assert_eq!(
            line("[::ffff:192.0.2.1]:5", "[::ffff:192.0.2.2]:80"),
            "PROXY TCP4 192.0.2.1 192.0.2.2 5 80\r\n"
        );
    }
}
