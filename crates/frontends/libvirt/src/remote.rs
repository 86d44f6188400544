//! libvirt's protocol over TLS, where `core.libvirt_address` says so. A client is who its certificate says, as over HTTPS:
//! by fingerprint, among those that are trusted, with their roles and projects. Others may log in with an API token
//! ([`auth`]), where there is one that serves for it; without, nobody else gets past the handshake.
//!
//! What strangers may cost is bounded: handshakes in number and time, connections in number, and those of one client.

use crate::{
    Front, auth,
    session::{self, Peer},
    transport::Transport,
};
use async_trait::async_trait;
use karst_engine::{
    Context,
    tenancy::server::{NetworkListener, ServerSettings},
};
use karst_model::{Error, PrincipalId, Result, access::Principal};
use karst_tls::{Authority, ClientCertificate, authority::ServerCertificates};
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, RwLock, Weak},
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch},
    task::JoinHandle,
};
use tokio_rustls::server::TlsStream;

/// Where a refusal names the key.
const KEY: &str = "config.core.libvirt_address";
/// Pause after a failure to accept, so that it does not spin.
const PAUSE: Duration = Duration::from_millis(100);
/// Time for the word that a client is not let in.
const FAREWELL: Duration = Duration::from_secs(5);
/// How often it is looked whether the certificate of a connection that lasts is still trusted. Each call looks besides.
const LOOK: Duration = Duration::from_secs(1);

/// What the network may cost.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Time for a handshake.
    pub handshake: Duration,
    /// Handshakes at once; more wait in the listener's queue.
    pub handshakes: usize,
    /// Time for a login, at which people may type; and logins at once: more are not let in.
    pub login: Duration,
    /// See `login`.
    pub logins: usize,
    /// Connections at once.
    pub connections: usize,
    /// Connections at once of one client.
    pub of_one: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(15),
            handshakes: 256,
            login: Duration::from_secs(60),
            logins: 64,
            connections: 2048,
            of_one: 256,
        }
    }
}

struct Listening {
    address: SocketAddr,
    names: Vec<String>,
    certificates: Arc<RwLock<Arc<ServerCertificates>>>,
    end: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Listening {
    /// Closes the socket at once, and the connections.
    async fn stop(self) {
        self.end.send_replace(true);
        self.task.abort();
        // Aborted on purpose: only that it is gone, and with it the socket, matters.
        let _ = self.task.await;
    }
}

/// The listener.
pub struct Network {
    front: Arc<Front>,
    authority: Arc<Authority>,
    bounds: Bounds,
    handshakes: Arc<Semaphore>,
    logins: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    of_one: Mutex<HashMap<PrincipalId, usize>>,
    listening: tokio::sync::Mutex<Option<Listening>>,
    me: Weak<Self>,
}

async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        // A host without IPv6: every address of IPv4 is what is left of "every address".
        Err(e) if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && e.raw_os_error() == Some(97) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        other => other,
    }
}

impl Network {
    /// Over a front end; listens when it is told.
    pub fn new(front: Arc<Front>, authority: Arc<Authority>, bounds: Bounds) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            front,
            authority,
            bounds,
            handshakes: Arc::new(Semaphore::new(bounds.handshakes)),
            logins: Arc::new(Semaphore::new(bounds.logins)),
            connections: Arc::new(Semaphore::new(bounds.connections)),
            of_one: Mutex::default(),
            listening: tokio::sync::Mutex::default(),
            me: me.clone(),
        })
    }

    /// Listens no more; connections end.
    pub async fn stop(&self) {
        if let Some(listening) = self.listening.lock().await.take() {
            listening.stop().await;
        }
    }

    fn certificates(&self, names: &[String]) -> Result<Arc<ServerCertificates>> {
        let now = self.front.engine.inner().env.now();
        let today = now.to_zoned(jiff::tz::TimeZone::UTC).date();
        self.authority.server(names, today).map(Arc::new).map_err(|e| e.at(KEY))
    }

    async fn accept(
        self: Arc<Self>,
        listener: TcpListener,
        certificates: Arc<RwLock<Arc<ServerCertificates>>>,
        ended: watch::Receiver<bool>,
    ) {
        loop {
            let Ok(place) = self.handshakes.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, address)) => {
                    let certificates = certificates.read().unwrap_or_else(|e| e.into_inner()).clone();
                    let (me, mut ended) = (self.clone(), ended.clone());
                    tokio::spawn(async move {
                        tokio::select! {
                            () = me.connection(stream, address, &certificates, place) => {}
                            _ = ended.wait_for(|ended| *ended) => {}
                        }
                    });
                }
                Err(e) => {
                    tracing::warn!(error = %e, "a connection could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn connection(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        certificates: &ServerCertificates,
        place: OwnedSemaphorePermit,
    ) {
        let Some(mut stream) = self.handshake(stream, address, certificates).await else { return };
        let first = stream.get_ref().1.peer_certificates().and_then(|c| c.first());
        let shown = first.and_then(|der| ClientCertificate::from_der(der).ok());
        let known = shown.as_ref().map_or_else(Principal::anonymous, |c| self.principal(c, address));
        // Who he is, or that he may say it by a login.
        let admitted = match (known.is_known(), &shown) {
            (true, _) => self
                .admit(known.id)
                .map(|place| Entry::Known(known, place))
                .ok_or("there are too many connections"),
            (false, _) if self.front.engine.scram_offered() => {
                self.logins.try_acquire().map(Entry::Stranger).map_err(|_| "there are too many logins")
            }
            (false, None) => Err("it shows no certificate"),
            (false, Some(_)) => Err("its certificate is not trusted, or not valid now"),
        };
        let word: &[u8] = if admitted.is_ok() { &[1] } else { &[0] };
        let told = async {
            stream.write_all(word).await?;
            stream.flush().await
        };
        let told = tokio::time::timeout(FAREWELL, told).await;
        // From here on others may shake hands.
        drop(place);
        let entry = match (admitted, told) {
            (Ok(entry), Ok(Ok(()))) => entry,
            (Ok(_), _) => return,
            (Err(why), _) => {
                let fingerprint = shown.as_ref().map(|c| c.fingerprint.as_str()).unwrap_or_default();
                tracing::info!(%address, fingerprint, why, "a client of libvirt is not let in");
                return farewell(stream).await;
            }
        };
        let (principal, admitted, shown) = match entry {
            Entry::Known(principal, admitted) => (principal, admitted, shown),
            Entry::Stranger(_login) => {
                let text = address.to_string();
                let login = auth::negotiate(&self.front.engine, &mut stream, &text);
                let outcome = tokio::time::timeout(self.bounds.login, login).await;
                let principal = match outcome {
                    Ok(Ok(Some(principal))) => principal,
                    _ => return farewell(stream).await,
                };
                match self.admit(principal.id) {
                    Some(admitted) => (principal, admitted, None),
                    None => return farewell(stream).await,
                }
            }
        };
        let front = self.front.clone();
        let stands = {
            let (front, principal) = (front.clone(), principal.clone());
            move || {
                let now = front.engine.inner().env.now().as_second();
                shown.as_ref().is_none_or(|c| c.is_valid_at(now)) && front.engine.principal_stands(&principal)
            }
        };
        let peer = Peer {
            context: Context::new(principal),
            read_only: false,
            stands: Some((Box::new(stands), LOOK)),
        };
        session::serve(front, peer, Transport::Tls(Box::new(stream))).await;
        drop(admitted);
    }

    async fn handshake(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        certificates: &ServerCertificates,
    ) -> Option<TlsStream<TcpStream>> {
        // Small answers go out at once, and of a client that is gone without a word the kernel tells; where the socket does
        // not know the options, both only come later.
        let _ = stream.set_nodelay(true);
        let _ = keep_alive(&stream);
        let acceptor =
            match stream.local_addr().map_err(Error::from).and_then(|a| certificates.acceptor(a.ip())) {
                Ok(acceptor) => acceptor,
                Err(e) => {
                    let context = e.context.as_deref().unwrap_or_default();
                    tracing::warn!(%address, error = %e, context, "a connection has no certificate");
                    return None;
                }
            };
        match tokio::time::timeout(self.bounds.handshake, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err(e)) => {
                tracing::debug!(%address, error = %e, "a TLS handshake failed");
                None
            }
            Err(_) => None,
        }
    }

    fn principal(&self, certificate: &ClientCertificate, address: SocketAddr) -> Principal {
        let engine = &self.front.engine;
        match certificate.is_valid_at(engine.inner().env.now().as_second()) {
            true => engine.principal_by_certificate(&certificate.fingerprint, &address.to_string()),
            false => Principal::anonymous(),
        }
    }

    /// A place among the connections, and among those of one client.
    fn admit(&self, of: PrincipalId) -> Option<Admitted<'_>> {
        let place = self.connections.clone().try_acquire_owned().ok()?;
        let mut counts = self.of_one.lock().unwrap_or_else(|e| e.into_inner());
        let count = counts.entry(of).or_default();
        if *count >= self.bounds.of_one {
            return None;
        }
        *count += 1;
        Some(Admitted { network: self, of, _place: place })
    }
}

/// How a connection goes on after the handshake.
enum Entry<'a> {
    /// As somebody.
    Known(Principal, Admitted<'a>),
    /// With a login.
    Stranger(SemaphorePermit<'a>),
}

/// Ends a connection that goes no further.
async fn farewell(mut stream: TlsStream<TcpStream>) {
    // Its client may be gone already.
    let _ = tokio::time::timeout(FAREWELL, stream.shutdown()).await;
}

/// A connection that was let in, as long as it lasts.
struct Admitted<'a> {
    network: &'a Network,
    of: PrincipalId,
    _place: OwnedSemaphorePermit,
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        let mut counts = self.network.of_one.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(count) = counts.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.of);
            }
        }
    }
}

fn keep_alive(stream: &TcpStream) -> rustix::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(15))?;
    sockopt::set_tcp_keepcnt(stream, 4)
}

#[async_trait]
impl NetworkListener for Network {
    async fn release(&self, settings: &ServerSettings) {
        let mut listening = self.listening.lock().await;
        if listening.as_ref().is_some_and(|l| Some(l.address) != settings.libvirt_address)
            && let Some(old) = listening.take()
        {
            old.stop().await;
        }
    }

    async fn ensure(&self, settings: &ServerSettings) -> Result<()> {
        let mut listening = self.listening.lock().await;
        let Some(address) = settings.libvirt_address else { return Ok(()) };
        if let Some(listening) = listening.as_mut() {
            if listening.names != settings.libvirt_names {
                let new = self.certificates(&settings.libvirt_names)?;
                *listening.certificates.write().unwrap_or_else(|e| e.into_inner()) = new;
                listening.names = settings.libvirt_names.clone();
            }
            return Ok(());
        }
        let certificates = Arc::new(RwLock::new(self.certificates(&settings.libvirt_names)?));
        let listener = bind(address)
            .await
            .map_err(|e| Error::invalid(KEY, format!("{address} cannot be listened on: {e}")))?;
        let Some(me) = self.me.upgrade() else { return Ok(()) };
        let (end, ended) = watch::channel(false);
        let task = tokio::spawn(me.accept(listener, certificates.clone(), ended));
        tracing::info!(%address, "listening for clients of libvirt");
        let names = settings.libvirt_names.clone();
        *listening = Some(Listening { address, names, certificates, end, task });
        Ok(())
    }
}
