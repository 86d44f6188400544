//! TLS as front ends share it: the server's own certificate, made at the first start, what is known of a client's, the
//! authority of clients that know a server by one ([`authority`]), and how connections are taken ([`listener`]).
//!
//! Clients are identified by the fingerprint of the certificate they show, as Incus does: no authority signs it, and
//! that it is shown proves nothing until the handshake's signature did. Whether it is trusted is decided by each request.

// The certificates of real sockets; the seeded world ends at the engine, which gives the date.
#![allow(clippy::disallowed_methods)]

pub mod authority;
pub mod listener;
pub use authority::Authority;

use karst_model::{Error, Result};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P384_SHA384, date_time_ymd,
};
use rustls::{
    DigitallySignedStruct, DistinguishedName as Hint, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Years for which the server's certificate is made.
const YEARS: i32 = 10;
/// Largest certificate that is taken, in bytes of DER.
const LARGEST: usize = 64 << 10;

/// The server's certificate and key.
#[derive(Clone)]
pub struct Identity {
    /// PEM.
    pub certificate: String,
    /// SHA-256 of its DER form, lower-case hex.
    pub fingerprint: String,
    config: Arc<rustls::ServerConfig>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity {}", self.fingerprint)
    }
}

/// Where the two files of an identity are.
fn files(directory: &Path, stem: &str) -> (PathBuf, PathBuf) {
    (directory.join(format!("{stem}.crt")), directory.join(format!("{stem}.key")))
}

impl Identity {
    /// Reads `server.crt` and `server.key` of `directory`; makes both when there is no certificate yet. `name` is the
    /// host's, `today` the date.
    ///
    /// # Errors
    /// When they cannot be read or written, or do not belong together; an identity that clients know is never replaced.
    pub fn load(directory: &Path, name: &str, today: jiff::civil::Date) -> Result<Self> {
        let (crt, key) = files(directory, "server");
        if !crt.exists() {
            make(directory, name, today)?;
        }
        Self::parse(read(&crt)?, &read(&key)?)
    }

    fn parse(certificate: String, key: &str) -> Result<Self> {
        let broken = |e: &dyn std::fmt::Display| {
            Error::internal("the server's certificate or key cannot be used; repair or remove both", e)
        };
        let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate.as_bytes())
            .collect::<std::result::Result<_, _>>()
            .map_err(|e| broken(&e))?;
        let first = chain.first().ok_or_else(|| broken(&"server.crt holds no certificate"))?;
        let fingerprint = fingerprint(first);
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| broken(&e))?;
        let mut config = config(chain, key).map_err(|e| broken(&e))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { certificate, fingerprint, config: Arc::new(config) })
    }

    /// What takes a connection.
    pub fn acceptor(&self) -> tokio_rustls::TlsAcceptor {
        tokio_rustls::TlsAcceptor::from(self.config.clone())
    }
}

/// What a server with this certificate takes: TLS 1.2 and 1.3, and any client's certificate or none.
fn config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> std::result::Result<rustls::ServerConfig, rustls::Error> {
    let provider = Arc::new(ring::default_provider());
    rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_client_cert_verifier(Arc::new(AnyClient(provider)))
        .with_single_cert(chain, key)
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).map_err(|e| Error::from(e).with_context(file.display()))
}

/// From a year before `today` until [`YEARS`] after it.
fn date(params: &mut CertificateParams, today: jiff::civil::Date) {
    let year = i32::from(today.year());
    let (month, day) = (today.month().unsigned_abs(), today.day().unsigned_abs().min(28));
    params.not_before = date_time_ymd(year - 1, month, day);
    params.not_after = date_time_ymd(year + YEARS, month, day);
}

fn subject(name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, "Karst");
    subject.push(DnType::CommonName, name);
    subject
}

fn make(directory: &Path, name: &str, today: jiff::civil::Date) -> Result<()> {
    let failed = |e: rcgen::Error| Error::internal("the server's certificate could not be made", e);
    let mut params =
        CertificateParams::new(vec![name.to_owned(), "127.0.0.1".into(), "::1".into()]).map_err(failed)?;
    date(&mut params, today);
    params.distinguished_name = subject(name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).map_err(failed)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    keep(directory, "server", &certificate.pem(), &key.serialize_pem())
}

/// The key first and the certificate last: what is there whole is what a client can have seen.
fn keep(directory: &Path, stem: &str, certificate: &str, key: &str) -> Result<()> {
    let (crt_file, key_file) = files(directory, stem);
    write(&key_file, key, 0o600)?;
    write(&crt_file, certificate, 0o644)?;
    fs::File::open(directory)?.sync_all()?;
    Ok(())
}

fn write(file: &Path, text: &str, mode: u32) -> Result<()> {
    let fresh = file.with_extension("new");
    // What an earlier attempt left may have another mode.
    match fs::remove_file(&fresh) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let mut f = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh)?;
    f.write_all(text.as_bytes())?;
    f.sync_all()?;
    fs::rename(&fresh, file)?;
    Ok(())
}

/// SHA-256 of a certificate, lower-case hex.
pub fn fingerprint(der: &[u8]) -> String {
    Sha256::digest(der).iter().map(|b| format!("{b:02x}")).collect()
}

/// Takes any certificate whose owner proves to have its key.
#[derive(Debug)]
struct AnyClient(Arc<CryptoProvider>);

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }
    fn root_hint_subjects(&self) -> &[Hint] {
        &[]
    }
    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A client's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// SHA-256 of its DER form, lower-case hex.
    pub fingerprint: String,
    /// DER.
    pub der: Vec<u8>,
    /// Seconds since 1970 from which and until which it is valid.
    pub valid: (i64, i64),
}

impl ClientCertificate {
    /// Of DER.
    ///
    /// # Errors
    /// Invalid at `certificate`.
    pub fn from_der(der: &[u8]) -> Result<Self> {
        let wrong = |why: &str| Error::invalid("certificate", format!("this is no X.509 certificate: {why}"));
        if der.len() > LARGEST {
            return Err(wrong("it is too large"));
        }
        match X509Certificate::from_der(der) {
            Ok(([], parsed)) => {
                let validity = parsed.validity();
                Ok(Self {
                    fingerprint: fingerprint(der),
                    der: der.to_vec(),
                    valid: (validity.not_before.timestamp(), validity.not_after.timestamp()),
                })
            }
            Ok(_) => Err(wrong("something follows it")),
            Err(e) => Err(wrong("its DER form is malformed").with_context(e)),
        }
    }

    /// Of PEM, or of base64 of DER, as clients send it.
    ///
    /// # Errors
    /// Invalid at `certificate`.
    pub fn parse(text: &str) -> Result<Self> {
        use base64::Engine as _;
        let wrong = || Error::invalid("certificate", "a certificate is PEM, or base64 of its DER form");
        if text.contains("-----BEGIN") {
            let der = CertificateDer::from_pem_slice(text.as_bytes()).map_err(|e| wrong().with_context(e))?;
            return Self::from_der(&der);
        }
        let packed: String = text.split_whitespace().collect();
        let der = base64::engine::general_purpose::STANDARD.decode(packed).map_err(|_| wrong())?;
        Self::from_der(&der)
    }

    /// PEM.
    pub fn pem(&self) -> String {
        use base64::Engine as _;
        let text = base64::engine::general_purpose::STANDARD.encode(&self.der);
        let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
        for line in text.as_bytes().chunks(64) {
            pem.push_str(&String::from_utf8_lossy(line));
            pem.push('\n');
        }
        pem + "-----END CERTIFICATE-----\n"
    }

    /// Is it valid at this second?
    pub fn is_valid_at(&self, second: i64) -> bool {
        (self.valid.0..=self.valid.1).contains(&second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_identity_is_made_once_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let today = jiff::civil::date(2026, 2, 28);
        let first = Identity::load(dir.path(), "host1", today).unwrap();
        let mode = fs::metadata(dir.path().join("server.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let second = Identity::load(dir.path(), "another", jiff::civil::date(2030, 1, 1)).unwrap();
        assert_eq!(second.fingerprint, first.fingerprint);
        let parsed = ClientCertificate::parse(&first.certificate).unwrap();
        assert_eq!(parsed.fingerprint, first.fingerprint);
        let second = |text: &str| text.parse::<jiff::Timestamp>().unwrap().as_second();
        assert!(parsed.is_valid_at(second("2026-02-28T00:00:00Z")));
        assert!(parsed.is_valid_at(second("2036-02-01T00:00:00Z")));
        assert!(!parsed.is_valid_at(second("2037-02-01T00:00:00Z")));
        // A key that does not belong to it: an error, and the files stay.
        let stranger = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap().serialize_pem();
        fs::write(dir.path().join("server.key"), &stranger).unwrap();
        Identity::load(dir.path(), "host1", today).unwrap_err();
        assert_eq!(fs::read_to_string(dir.path().join("server.key")).unwrap(), stranger);
    }

    #[test]
    fn certificates_come_as_pem_or_base64_and_nothing_else() {
        use base64::Engine as _;
        let dir = tempfile::tempdir().unwrap();
        let made = Identity::load(dir.path(), "h", jiff::civil::date(2026, 1, 1)).unwrap();
        let parsed = ClientCertificate::parse(&made.certificate).unwrap();
        assert_eq!(ClientCertificate::parse(&parsed.pem()).unwrap(), parsed);
        let base64 = base64::engine::general_purpose::STANDARD.encode(&parsed.der);
        assert_eq!(ClientCertificate::parse(&base64).unwrap(), parsed);
        let mut longer = parsed.der.clone();
        longer.push(0);
        for wrong in ["", "x", "AAAA", &base64[4..], "-----BEGIN CERTIFICATE-----\n"] {
            assert_eq!(
                ClientCertificate::parse(wrong).unwrap_err().field.as_deref(),
                Some("certificate"),
                "{wrong}"
            );
        }
        assert!(ClientCertificate::from_der(&longer).unwrap_err().message.contains("follows"));
    }
}
