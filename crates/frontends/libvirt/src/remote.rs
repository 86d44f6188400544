//! libvirt's protocol over TLS, where `core.libvirt_address` says so. A client is who its certificate says, as over HTTPS:
//! by fingerprint, among those that are trusted, with their roles and projects. Others may log in with an API token
//! ([`auth`]), where there is one that serves for it; without, nobody else gets past the handshake.
//!
//! What strangers may cost is bounded: handshakes in number and time, connections in number, and those of one client.

use crate::{
    Front, auth,
    bounds::{Clients, OfOne, Place},
    session::{self, Peer},
    transport::Transport,
};
use async_trait::async_trait;
use karst_engine::{
    Context,
    tenancy::server::{NetworkListener, ServerSettings},
};
use karst_model::{Error, PrincipalId, Result, access::Principal};
use karst_tls::{
    Authority, ClientCertificate,
    authority::ServerCertificates,
    listener::{self, Connection, Listener},
};
use std::{
    net::SocketAddr,
    sync::{Arc, RwLock, Weak},
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit},
};
use tokio_rustls::server::TlsStream;

/// Where a refusal names the key.
const KEY: &str = "config.core.libvirt_address";
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
            handshake: listener::HANDSHAKE,
            handshakes: 256,
            login: Duration::from_secs(60),
            logins: 64,
            connections: 2048,
            of_one: 256,
        }
    }
}

struct Listening {
    listener: Listener,
    names: Vec<String>,
    certificates: Arc<RwLock<Arc<ServerCertificates>>>,
}

/// The listener.
pub struct Network {
    front: Arc<Front>,
    authority: Arc<Authority>,
    bounds: Bounds,
    handshakes: Arc<Semaphore>,
    logins: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    clients: Arc<Clients<PrincipalId>>,
    listening: tokio::sync::Mutex<Option<Listening>>,
    me: Weak<Self>,
}

impl Network {
    /// Over a front end; listens when it is told.
    pub fn new(front: Arc<Front>, authority: Arc<Authority>, bounds: Bounds) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            authority,
            bounds,
            handshakes: Arc::new(Semaphore::new(bounds.handshakes)),
            logins: Arc::new(Semaphore::new(bounds.logins)),
            connections: Arc::new(Semaphore::new(bounds.connections)),
            clients: Clients::new(OfOne { connections: bounds.of_one, ..front.bounds.network }),
            listening: tokio::sync::Mutex::default(),
            me: me.clone(),
            front,
        })
    }

    /// Listens no more; connections end.
    pub async fn stop(&self) {
        if let Some(listening) = self.listening.lock().await.take() {
            listening.listener.stop().await;
        }
    }

    fn certificates(&self, names: &[String]) -> Result<Arc<ServerCertificates>> {
        let now = self.front.engine.inner().env.now();
        let today = now.to_zoned(jiff::tz::TimeZone::UTC).date();
        self.authority.server(names, today).map(Arc::new).map_err(|e| e.at(KEY))
    }

    /// Serves a connection until the listener stops; what is shown to it is what the certificates are now.
    async fn serve(
        self: Arc<Self>,
        certificates: Arc<RwLock<Arc<ServerCertificates>>>,
        connection: Connection,
    ) {
        let Connection { stream, address, place, mut ended } = connection;
        let certificates = certificates.read().unwrap_or_else(|e| e.into_inner()).clone();
        tokio::select! {
            () = self.connection(stream, address, &certificates, place) => {}
            _ = ended.wait_for(|ended| *ended) => {}
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
            allowance: admitted.place.allowance.clone(),
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
        let acceptor =
            match stream.local_addr().map_err(Error::from).and_then(|a| certificates.acceptor(a.ip())) {
                Ok(acceptor) => acceptor,
                Err(e) => {
                    let context = e.context.as_deref().unwrap_or_default();
                    tracing::warn!(%address, error = %e, context, "a connection has no certificate");
                    return None;
                }
            };
        listener::handshake(acceptor, stream, address, self.bounds.handshake).await
    }

    fn principal(&self, certificate: &ClientCertificate, address: SocketAddr) -> Principal {
        let engine = &self.front.engine;
        match certificate.is_valid_at(engine.inner().env.now().as_second()) {
            true => engine.principal_by_certificate(&certificate.fingerprint, &address.to_string()),
            false => Principal::anonymous(),
        }
    }

    /// A place among the connections, and among those of one client.
    fn admit(&self, of: PrincipalId) -> Option<Admitted> {
        let all = self.connections.clone().try_acquire_owned().ok()?;
        Some(Admitted { place: self.clients.admit(of)?, _all: all })
    }
}

/// How a connection goes on after the handshake.
enum Entry<'a> {
    /// As somebody.
    Known(Principal, Admitted),
    /// With a login.
    Stranger(SemaphorePermit<'a>),
}

/// Ends a connection that goes no further.
async fn farewell(mut stream: TlsStream<TcpStream>) {
    // Its client may be gone already.
    let _ = tokio::time::timeout(FAREWELL, stream.shutdown()).await;
}

/// A connection that was let in, as long as it lasts.
struct Admitted {
    place: Place<PrincipalId>,
    _all: OwnedSemaphorePermit,
}

#[async_trait]
impl NetworkListener for Network {
    async fn release(&self, settings: &ServerSettings) {
        let mut listening = self.listening.lock().await;
        if listening.as_ref().is_some_and(|l| Some(l.listener.address()) != settings.libvirt_address)
            && let Some(old) = listening.take()
        {
            old.listener.stop().await;
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
        let Some(me) = self.me.upgrade() else { return Ok(()) };
        let (places, shown) = (self.handshakes.clone(), certificates.clone());
        let serve = move |connection| me.clone().serve(shown.clone(), connection);
        let listener = Listener::start(address, KEY, places, serve).await?;
        tracing::info!(%address, "listening for clients of libvirt");
        *listening = Some(Listening { listener, names: settings.libvirt_names.clone(), certificates });
        Ok(())
    }
}
