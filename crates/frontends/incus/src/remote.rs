//! Listeners on the network: the API over HTTPS, and one for metrics only. They follow the server's configuration; a
//! change that cannot be listened for changes nothing.

use crate::{
    Peer,
    app::App,
    places::{Bounds, Places},
    serve_stream,
    tls::{
        ClientCertificate,
        listener::{Connection, HANDSHAKE, Listener, handshake},
    },
};
use karst_engine::tenancy::server::ServerSettings;
use karst_model::{Error, Result};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, RwLock},
    time::Duration,
};
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::Mutex};
use tokio_rustls::server::TlsStream;

/// Time for the word that a client is not let in.
const FAREWELL: Duration = Duration::from_secs(5);
/// Pause before an address is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// What a listener answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surface {
    /// The whole API.
    Api,
    /// `/1.0/metrics`.
    Metrics,
}

#[derive(Default)]
struct Both {
    api: Option<Listener>,
    metrics: Option<Listener>,
}

/// The listeners of a server.
pub struct Remote {
    both: Mutex<Both>,
    places: Places,
    /// Where the API listens now, for `/1.0` and trust tokens.
    address: RwLock<Option<SocketAddr>>,
}

impl Default for Remote {
    fn default() -> Self {
        Self::new(Bounds::default())
    }
}

impl Remote {
    /// Without listeners, which have so many places.
    pub fn new(bounds: Bounds) -> Self {
        Self { both: Mutex::default(), places: Places::new(bounds), address: RwLock::default() }
    }

    /// Listens as the server's configuration says, and tries again what does not work.
    pub async fn start(app: Arc<App>) {
        let mut told = false;
        loop {
            let outcome = {
                let mut both = app.remote.both.lock().await;
                let settings = app.engine.server_settings();
                app.remote.apply(&app, &mut both, &settings).await
            };
            let Err(e) = outcome else { return };
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(error = %e, "not listening on the network; trying again");
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Listens as `settings` say, then commits; goes back to what was when either fails.
    ///
    /// # Errors
    /// Invalid at the key whose address cannot be listened on; those of `commit`.
    pub async fn change(
        &self,
        app: &Arc<App>,
        settings: &ServerSettings,
        commit: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let mut both = self.both.lock().await;
        let outcome = match self.apply(app, &mut both, settings).await {
            Ok(()) => commit.await,
            Err(e) => Err(e),
        };
        if outcome.is_err() {
            let before = app.engine.server_settings();
            if let Err(e) = self.apply(app, &mut both, &before).await {
                tracing::warn!(error = %e, "what was listened on before is gone");
            }
        }
        outcome
    }

    async fn apply(&self, app: &Arc<App>, both: &mut Both, settings: &ServerSettings) -> Result<()> {
        let Both { api, metrics } = both;
        // All that ends ends first: one may take over the other's port.
        for (slot, wanted) in [(&mut *api, settings.https_address), (&mut *metrics, settings.metrics_address)]
        {
            if slot.as_ref().is_some_and(|l| Some(l.address()) != wanted)
                && let Some(old) = slot.take()
            {
                old.stop().await;
            }
        }
        let other = app.engine.network_listener();
        if let Some(other) = &other {
            other.release(settings).await;
        }
        let mut outcome = match self.ensure(app, api, settings.https_address, Surface::Api).await {
            Ok(()) => self.ensure(app, metrics, settings.metrics_address, Surface::Metrics).await,
            Err(e) => Err(e),
        };
        if let (Ok(()), Some(other)) = (&outcome, &other) {
            outcome = other.ensure(settings).await;
        }
        *self.address.write().unwrap_or_else(|e| e.into_inner()) = api.as_ref().map(Listener::address);
        outcome
    }

    async fn ensure(
        &self,
        app: &Arc<App>,
        slot: &mut Option<Listener>,
        wanted: Option<SocketAddr>,
        surface: Surface,
    ) -> Result<()> {
        let (Some(address), None) = (wanted, &slot) else { return Ok(()) };
        let key = match surface {
            Surface::Api => "config.core.https_address",
            Surface::Metrics => "config.core.metrics_address",
        };
        let Some(identity) = &app.info.identity else {
            return Err(Error::unsupported("this server has no certificate to listen with").at(key));
        };
        let (app, acceptor) = (app.clone(), identity.acceptor());
        let places = app.remote.places.handshakes();
        let serve = move |taken| connection(app.clone(), acceptor.clone(), surface, taken);
        *slot = Some(Listener::start(address, key, places, serve).await?);
        tracing::info!(%address, ?surface, "listening");
        Ok(())
    }

    /// Where clients reach the API, as `ADDRESS:PORT`; every address of this host when it listens on all.
    pub fn addresses(&self) -> Vec<String> {
        let Some(address) = *self.address.read().unwrap_or_else(|e| e.into_inner()) else {
            return vec![];
        };
        if !address.ip().is_unspecified() {
            return vec![address.to_string()];
        }
        let own = own_addresses();
        own.into_iter()
            .filter(|a| address.is_ipv6() || a.is_ipv4())
            .map(|a| SocketAddr::new(a, address.port()).to_string())
            .collect()
    }

    /// Does the API listen on the network?
    pub fn listens(&self) -> bool {
        self.address.read().unwrap_or_else(|e| e.into_inner()).is_some()
    }
}

/// Global addresses of this network namespace, IPv4 first, from proc(5): `net/fib_trie`, `net/if_inet6`.
fn own_addresses() -> Vec<IpAddr> {
    let v4 = std::fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let v6 = std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    parse_addresses(&v4, &v6)
}

fn parse_addresses(v4: &str, v6: &str) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = vec![];
    let mut last = None;
    for line in v4.lines() {
        if let Some(address) = line.trim_start().strip_prefix("|-- ") {
            last = address.trim().parse::<Ipv4Addr>().ok();
        } else if line.contains("/32 host LOCAL")
            && let Some(address) = last.filter(|a| !a.is_loopback())
            && !found.contains(&address.into())
        {
            found.push(address.into());
        }
    }
    for line in v6.lines() {
        // Address, index, prefix, scope (00 is global), flags, device.
        let mut words = line.split_whitespace();
        if let (Some(hex), Some("00")) = (words.next(), words.nth(2))
            && let Ok(bits) = u128::from_str_radix(hex, 16)
        {
            found.push(Ipv6Addr::from_bits(bits).into());
        }
    }
    found
}

async fn connection(app: Arc<App>, acceptor: tokio_rustls::TlsAcceptor, surface: Surface, taken: Connection) {
    let Connection { stream, address, place, ended } = taken;
    let Some(arrival) = app.remote.places.arrive(place, address.ip()) else {
        tracing::debug!(%address, "too many connections come from there");
        return;
    };
    let Some(stream) = handshake(acceptor, stream, address, HANDSHAKE).await else { return };
    let shown = stream.get_ref().1.peer_certificates().and_then(|c| c.first());
    let certificate = match shown.map(|der| ClientCertificate::from_der(der)) {
        None => None,
        Some(Ok(certificate)) => Some(certificate),
        Some(Err(e)) => {
            tracing::debug!(%address, error = %e, "a client's certificate cannot be read");
            None
        }
    };
    let now = app.engine.inner().env.now().as_second();
    let known = certificate.as_ref().filter(|c| c.is_valid_at(now));
    let known = known.map(|c| app.engine.principal_by_certificate(&c.fingerprint, &address.to_string()));
    let who = known.filter(|p| p.is_known()).map(|p| p.id);
    let Some(place) = app.remote.places.admit(arrival, who) else {
        tracing::debug!(%address, known = who.is_some(), "there are too many connections");
        return farewell(stream).await;
    };
    let place = Arc::new(place);
    let peer = Peer::Remote { certificate: certificate.map(Arc::new), address, surface, place };
    serve_stream(app, peer, stream, ended).await;
}

/// Ends a connection for which there is no place, with the reason for who has asked for something already.
async fn farewell(mut stream: TlsStream<TcpStream>) {
    let text = "there are too many connections; close some, or try again later";
    let body = serde_json::json!({"type": "error", "error": text, "error_code": 503}).to_string();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let told = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    };
    // Its client may be gone already.
    let _ = tokio::time::timeout(FAREWELL, told).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_addresses_are_the_global_ones() {
        let v4 = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     |-- 10.1.2.3\n        /32 host LOCAL\n     |-- 127.0.0.1\n        /32 host LOCAL\nLocal:\n     |-- 10.1.2.3\n        /32 host LOCAL\n     |-- 10.1.2.255\n        /32 link BROADCAST\n";
        let v6 = "00000000000000000000000000000001 01 80 10 80       lo\nfe800000000000000000000000000001 02 40 20 80     eth0\n20010db8000000000000000000000007 02 40 00 80     eth0\n";
        let found: Vec<_> = parse_addresses(v4, v6).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.1.2.3", "2001:db8::7"]);
    }
}
