//! Listeners of front ends on the network: an address that is bound, a loop that takes connections no faster than there are
//! places for them, the handshake, and the end of both. What a connection then speaks, and how many of one client there
//! may be, is the front end's.
//!
//! A connection holds its place until its task drops it. A listener that stops has closed its socket when `stop` returns.

use karst_model::{Error, Result};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinHandle,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// How long a client may take for the handshake where nothing else is said.
pub const HANDSHAKE: Duration = Duration::from_secs(15);
/// Pause after a failure to accept, so that it does not spin.
const PAUSE: Duration = Duration::from_millis(100);

/// A connection as it came, before the handshake.
pub struct Connection {
    /// The socket.
    pub stream: TcpStream,
    /// Of the client.
    pub address: SocketAddr,
    /// Its place among those of the listener; dropped, another may come.
    pub place: OwnedSemaphorePermit,
    /// Turns true when the listener stops.
    pub ended: watch::Receiver<bool>,
}

/// An address that is listened on.
pub struct Listener {
    address: SocketAddr,
    end: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Listener {
    /// Listens on `address`, which the configuration names at `key`, and serves each connection in a task of its own; while
    /// there are no `places`, they wait in the socket's queue.
    ///
    /// # Errors
    /// Invalid at `key` when the address cannot be listened on.
    pub async fn start<Serve, Served>(
        address: SocketAddr,
        key: &str,
        places: Arc<Semaphore>,
        serve: Serve,
    ) -> Result<Self>
    where
        Serve: Fn(Connection) -> Served + Send + 'static,
        Served: Future<Output = ()> + Send + 'static,
    {
        let listener = bind(address)
            .await
            .map_err(|e| Error::invalid(key, format!("{address} cannot be listened on: {e}")))?;
        let (end, ended) = watch::channel(false);
        let task = tokio::spawn(accept(listener, places, ended, serve));
        Ok(Self { address, end, task })
    }

    /// The address that was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes the socket at once, and tells the connections.
    pub async fn stop(self) {
        self.end.send_replace(true);
        self.task.abort();
        // Aborted on purpose: only that it is gone, and with it the socket, matters.
        let _ = self.task.await;
    }
}

async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let no_family = Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error());
    match TcpListener::bind(address).await {
        // A host without IPv6: every address of IPv4 is what is left of "every address".
        Err(e) if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && e.raw_os_error() == no_family => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        other => other,
    }
}

async fn accept<Serve, Served>(
    listener: TcpListener,
    places: Arc<Semaphore>,
    ended: watch::Receiver<bool>,
    serve: Serve,
) where
    Serve: Fn(Connection) -> Served + Send + 'static,
    Served: Future<Output = ()> + Send + 'static,
{
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, address)) => {
                tokio::spawn(serve(Connection { stream, address, place, ended: ended.clone() }));
            }
            Err(e) => {
                tracing::warn!(error = %e, "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Shakes hands with a client within `time`; nothing when that fails or takes too long.
pub async fn handshake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    time: Duration,
) -> Option<TlsStream<TcpStream>> {
    // Small answers go out at once; where the socket does not know the option they only come later.
    let _ = stream.set_nodelay(true);
    // Where it cannot be set, a client that vanishes is noticed later: when something is sent to it.
    let _ = keep_alive(&stream);
    match tokio::time::timeout(time, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(e)) => {
            tracing::debug!(%address, error = %e, "a TLS handshake failed");
            None
        }
        Err(_) => None,
    }
}

/// Lets the kernel notice within two minutes that a client has vanished without a word, also where nothing is said: on the
/// control socket of a program, on a console. Where something is on its way, it gives up by itself after a quarter of an
/// hour. No limit on what is unacknowledged: the kernel counts the time too for which a client is there and does not read,
/// as behind a pager. No pings on such connections either: with one on its way keepalive would wait.
fn keep_alive(stream: &TcpStream) -> rustix::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(15))?;
    sockopt::set_tcp_keepcnt(stream, 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener as Bound;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    const SOON: Duration = Duration::from_secs(30);

    /// A port of loopback that nobody has and nobody is given by chance: below those that the kernel draws for connections
    /// and for port 0.
    fn free() -> SocketAddr {
        let first = std::process::id().wrapping_mul(64);
        let mut ports = (0..1000).map(|n| 10_000 + (first.wrapping_add(n) % 20_000) as u16);
        let free = |port: &u16| Bound::bind(("127.0.0.1", *port)).is_ok();
        SocketAddr::from(([127, 0, 0, 1], ports.find(free).expect("one of 1,000 ports is free")))
    }

    /// Tells a byte to whoever comes, and ends when the listener does.
    async fn greet(mut connection: Connection) {
        connection.stream.write_all(b"!").await.unwrap();
        // An error means that the listener is gone, which is an end as well.
        let _ = connection.ended.wait_for(|ended| *ended).await;
    }

    async fn byte(stream: &mut TcpStream) -> Option<u8> {
        timeout(SOON, stream.read_u8()).await.expect("an answer in time").ok()
    }

    #[tokio::test]
    async fn more_than_there_are_places_wait_and_all_end_with_the_listener() {
        let (address, places) = (free(), Arc::new(Semaphore::new(2)));
        let listener = Listener::start(address, "config.x", places.clone(), greet).await.unwrap();
        assert_eq!(listener.address(), address);
        let mut first = TcpStream::connect(address).await.unwrap();
        let mut second = TcpStream::connect(address).await.unwrap();
        assert_eq!((byte(&mut first).await, byte(&mut second).await), (Some(b'!'), Some(b'!')));
        // The kernel connects it, and nobody takes it.
        let mut third = TcpStream::connect(address).await.unwrap();
        assert_eq!(places.available_permits(), 0);
        listener.stop().await;
        assert_eq!((byte(&mut first).await, byte(&mut second).await), (None, None));
        assert_eq!(byte(&mut third).await, None, "it was never served");
        // The socket is closed: the address is free for another.
        let again = Listener::start(address, "config.x", places, greet).await.unwrap();
        again.stop().await;
    }

    #[tokio::test]
    async fn an_address_in_use_is_an_error_at_its_key() {
        let held = Bound::bind("127.0.0.1:0").unwrap();
        let address = held.local_addr().unwrap();
        let refused = Listener::start(address, "config.x", Arc::new(Semaphore::new(1)), greet).await.err();
        let e = refused.expect("it is in use");
        assert_eq!(e.field.as_deref(), Some("config.x"));
        assert!(e.message.contains(&format!("{address} cannot be listened on")), "{}", e.message);
    }
}
