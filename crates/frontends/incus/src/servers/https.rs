//! Requests over `https`: connection, certificate, redirections, bounds.

use super::nonsense;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{
    Request, StatusCode, Uri,
    body::Incoming,
    header::{HOST, HeaderName, LOCATION, USER_AGENT},
    http::response,
};
use hyper_util::rt::TokioIo;
use karst_model::{Error, Result, image::UpdateSource};
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::client::TlsStream;

/// Redirections that are followed.
const REDIRECTIONS: usize = 5;
/// How long connecting, the handshake, and the head of an answer may take.
const CONNECT: Duration = Duration::from_secs(20);
const HEAD: Duration = Duration::from_secs(30);
/// How long nothing may come.
const STANDSTILL: Duration = Duration::from_secs(60);
/// Where distributions keep the authorities that the host trusts.
const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A server, and how it is known.
pub(super) struct Https {
    base: String,
    config: Arc<ClientConfig>,
}

/// What comes after the head of an answer.
pub(super) struct Body {
    body: Incoming,
    host: String,
}

impl Body {
    /// The next piece; `None` at its end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let frame = match timeout(STANDSTILL, self.body.frame()).await {
                Ok(None) => return Ok(None),
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(e))) => {
                    return Err(Error::unavailable(format!("the download from {} broke off", self.host))
                        .with_context(e));
                }
                Err(_) => {
                    let text = format!("the download from {} stands still", self.host);
                    return Err(Error::timeout(text));
                }
            };
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
    }
}

/// Takes the certificate that was stated, or one that it signed; else what the host trusts.
#[derive(Debug)]
struct Stated {
    der: CertificateDer<'static>,
    signed: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Stated {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        if end.as_ref() == self.der.as_ref() {
            return Ok(ServerCertVerified::assertion());
        }
        match &self.signed {
            Some(signed) => signed.verify_server_cert(end, between, name, ocsp, now),
            None => Err(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer)),
        }
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

async fn authorities() -> RootCertStore {
    let file = std::env::var_os("SSL_CERT_FILE").map_or_else(|| PathBuf::from(BUNDLE), PathBuf::from);
    let mut roots = RootCertStore::empty();
    match tokio::fs::read(&file).await {
        Ok(pem) => {
            let all = CertificateDer::pem_slice_iter(&pem).flatten();
            let (_, ignored) = roots.add_parsable_certificates(all);
            tracing::debug!(ignored, known = roots.len(), "authorities of the host");
        }
        // Servers whose certificate is stated need none.
        Err(e) => tracing::info!(file = %file.display(), error = %e, "no authorities are known"),
    }
    roots
}

impl Https {
    pub(super) async fn new(from: &UpdateSource) -> Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let unusable = |e: &dyn std::fmt::Display| Error::internal("TLS cannot be used", e);
        let verifier: Arc<dyn ServerCertVerifier> = match from
            .certificate
            .as_deref()
            .filter(|c| !c.is_empty())
        {
            Some(pem) => {
                let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| {
                    Error::invalid("source.certificate", "this is no certificate in PEM form").with_context(e)
                })?;
                let mut roots = RootCertStore::empty();
                let signed = roots.add(der.clone()).ok().and_then(|()| {
                    WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone()).build().ok()
                });
                Arc::new(Stated { der, signed, provider: provider.clone() })
            }
            None => {
                let roots = Arc::new(authorities().await);
                if roots.is_empty() {
                    return Err(Error::unavailable(
                        "this host trusts no authority that could vouch for an image server; install ca-certificates",
                    ));
                }
                WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
                    .build()
                    .map_err(|e| unusable(&e))?
            }
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|e| unusable(&e))?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { base: from.server.trim_end_matches('/').to_owned(), config: Arc::new(config) })
    }

    /// Asks for what lies at `path` below the server; only what was found is answered.
    pub(super) async fn get(&self, path: &str) -> Result<(response::Parts, Body)> {
        let (head, body) = self.ask(&format!("{}{path}", self.base), &[]).await?;
        if head.status == StatusCode::UNAUTHORIZED {
            return Err(Error::forbidden(format!("the image server {} refuses {path}", body.host)));
        }
        Ok((head, body))
    }

    /// The server's address, without a slash at its end.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// Asks at an address with headers of one's own, which do not go along to another server that this one sends to. What was
    /// found is answered, and who must say first who he is.
    pub(super) async fn ask(
        &self,
        address: &str,
        headers: &[(HeaderName, String)],
    ) -> Result<(response::Parts, Body)> {
        let mut uri: Uri = address
            .parse()
            .map_err(|e| Error::invalid("source.server", "this is no address of a server").with_context(e))?;
        if uri.scheme_str() != Some("https") {
            return Err(Error::unavailable("the image server sends to a place that is not https"));
        }
        let first = uri.authority().cloned();
        for _ in 0..=REDIRECTIONS {
            let headers = if uri.authority() == first.as_ref() { headers } else { &[] };
            let (head, body) = self.once(&uri, headers).await?;
            let next = match head.status {
                StatusCode::OK | StatusCode::UNAUTHORIZED => {
                    let host = uri.host().unwrap_or_default().to_owned();
                    return Ok((head, Body { body, host }));
                }
                s if s.is_redirection() => head.headers.get(LOCATION).and_then(|v| v.to_str().ok()),
                StatusCode::NOT_FOUND => {
                    let host = uri.host().unwrap_or_default();
                    return Err(Error::not_found(format!(
                        "the image server {host} does not have {}",
                        uri.path()
                    )));
                }
                StatusCode::FORBIDDEN => {
                    let host = uri.host().unwrap_or_default();
                    return Err(Error::forbidden(format!("the image server {host} refuses {}", uri.path())));
                }
                _ => None,
            };
            let Some(next) = next else {
                let text = format!("the image server answers {}", head.status);
                return Err(Error::unavailable(text).with_context(&uri));
            };
            uri = redirected(&uri, next)?;
        }
        Err(Error::unavailable("the image server sends from one place to another without end"))
    }

    /// A whole document of at most `limit` bytes.
    pub(super) async fn document(&self, path: &str, limit: u64) -> Result<Vec<u8>> {
        let (_, mut body) = self.get(path).await?;
        let mut all = vec![];
        while let Some(piece) = body.next().await? {
            if (all.len() + piece.len()) as u64 > limit {
                return Err(nonsense("answer", format!("{path} is larger than {limit} bytes")));
            }
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }

    async fn connect(&self, uri: &Uri) -> Result<TlsStream<TcpStream>> {
        let host = uri.host().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let port = uri.port_u16().unwrap_or(443);
        let name = ServerName::try_from(bare.to_owned()).map_err(|e| away(host, &e))?;
        let connect = async {
            let stream = TcpStream::connect((bare, port)).await?;
            tokio_rustls::TlsConnector::from(self.config.clone()).connect(name, stream).await
        };
        timeout(CONNECT, connect).await.map_err(|_| slow(host))?.map_err(|e| away(host, &e))
    }

    /// Sends a body to what lies at `path` below the server and answers what comes back, whatever its status; of that at most `limit`
    /// bytes. `sent` counts what has gone, and nothing is redirected.
    pub(super) async fn send<B>(
        &self,
        path: &str,
        headers: &[(HeaderName, String)],
        body: B,
        limit: usize,
        sent: impl Fn() -> u64 + Send + Sync,
    ) -> Result<(StatusCode, Vec<u8>)>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let uri: Uri = format!("{}{path}", self.base)
            .parse()
            .map_err(|e| Error::invalid("target", "this is no address of a server").with_context(e))?;
        let host = uri.host().unwrap_or_default().to_owned();
        let stream = self.connect(&uri).await?;
        let target = uri.path_and_query().map_or("/", |p| p.as_str());
        let request = headers
            .iter()
            .fold(Request::post(target), |request, (name, value)| request.header(name, value))
            .header(HOST, uri.authority().map_or(host.as_str(), |a| a.as_str()))
            .header(USER_AGENT, concat!("karst/", env!("CARGO_PKG_VERSION")))
            .body(body)
            .map_err(|e| Error::internal("a request could not be made", e))?;
        let exchange = async {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            // It ends with the answer; whoever reads that hears what went wrong.
            tokio::spawn(async move { drop(connection.await) });
            sender.send_request(request).await
        };
        let mut exchange = std::pin::pin!(exchange);
        let mut before = 0;
        let answer: std::result::Result<_, hyper::Error> = loop {
            match timeout(STANDSTILL, &mut exchange).await {
                Ok(answer) => break answer,
                Err(_) if sent() == before => {
                    return Err(Error::timeout(format!("the upload to {host} stands still")));
                }
                Err(_) => before = sent(),
            }
        };
        let broken = |e: &dyn std::fmt::Display| {
            Error::unavailable(format!("the upload to {host} broke off")).with_context(e)
        };
        let (head, body) = answer.map_err(|e| broken(&e))?.into_parts();
        let mut body = Body { body, host: host.clone() };
        let mut all = vec![];
        while let Some(piece) = body.next().await? {
            if all.len() + piece.len() > limit {
                return Err(nonsense("answer", format!("it is larger than {limit} bytes")));
            }
            all.extend_from_slice(&piece);
        }
        Ok((head.status, all))
    }

    async fn once(&self, uri: &Uri, headers: &[(HeaderName, String)]) -> Result<(response::Parts, Incoming)> {
        let host = uri.host().unwrap_or_default();
        let stream = self.connect(uri).await?;
        let exchange = async {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            // It ends with the body; whoever reads that hears what went wrong.
            tokio::spawn(async move { drop(connection.await) });
            let target = uri.path_and_query().map_or("/", |p| p.as_str());
            let request = headers
                .iter()
                .fold(Request::get(target), |request, (name, value)| request.header(name, value))
                .header(HOST, uri.authority().map_or(host, |a| a.as_str()))
                .header(USER_AGENT, concat!("karst/", env!("CARGO_PKG_VERSION")))
                .body(Empty::<Bytes>::new());
            let request = match request {
                Ok(request) => request,
                Err(e) => return Ok(Err(Error::internal("a request could not be made", e))),
            };
            sender.send_request(request).await.map(Ok)
        };
        let answer = timeout(HEAD, exchange).await.map_err(|_| slow(host))?;
        let answer: std::result::Result<_, hyper::Error> = answer;
        let (head, body) = answer.map_err(|e| away(host, &e))??.into_parts();
        Ok((head, body))
    }
}

fn away(host: &str, e: &dyn std::fmt::Display) -> Error {
    Error::unavailable(format!("the image server {host} cannot be reached: {e}"))
}

fn slow(host: &str) -> Error {
    Error::timeout(format!("the image server {host} does not answer"))
}

/// Where a server sends to: `https` only.
fn redirected(from: &Uri, to: &str) -> Result<Uri> {
    let wrong = || Error::unavailable("the image server sends to a place that is not https");
    if to.starts_with('/') && !to.starts_with("//") {
        let authority = from.authority().map_or("", |a| a.as_str());
        return format!("https://{authority}{to}").parse().map_err(|_| wrong());
    }
    let uri: Uri = to.parse().map_err(|_| wrong())?;
    if uri.scheme_str() == Some("https") && uri.host().is_some() { Ok(uri) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_https_is_followed() {
        let from: Uri = "https://a.example:8443/x/y".parse().unwrap();
        assert_eq!(redirected(&from, "/z?q").unwrap(), "https://a.example:8443/z?q");
        assert_eq!(redirected(&from, "https://b.example/z").unwrap(), "https://b.example/z");
        for wrong in ["http://b.example/z", "//b.example/z", "ftp://b.example", "z", "", "https://"] {
            assert!(redirected(&from, wrong).is_err(), "{wrong}");
        }
    }
}
