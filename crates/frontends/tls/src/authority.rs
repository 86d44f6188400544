//! An authority for clients that know a server by the authority behind its certificate, as libvirt's do: they take no
//! certificate that signs itself, neither a server's nor their own.
//!
//! Its key is kept beside the server's own. It signs what the listener shows, for the address that a client came to, and
//! certificates of clients whose key is made here, told once and not kept. That it signed a client's certificate proves
//! nothing: whoever shows one is looked up by fingerprint, as everywhere.

use super::{config, date, files, fingerprint, keep, read, subject};
use karst_model::{Error, Result};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use sha2::{Digest, Sha256};
use std::{
    collections::HashMap,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Certificates of a listener that are kept, one for each address of the host that clients come to.
const KEPT: usize = 256;
/// Longest common name of a certificate.
const LONGEST_NAME: usize = 64;

/// An authority, made when it is first asked for anything.
pub struct Authority {
    directory: PathBuf,
    stem: &'static str,
    name: String,
    held: Mutex<Option<Arc<Held>>>,
}

struct Held {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate of a client with its key, PEM.
pub struct Issued {
    /// SHA-256 of its DER form, lower-case hex.
    pub fingerprint: String,
    /// The certificate.
    pub certificate: String,
    /// The key.
    pub key: String,
}

/// What a listener shows.
pub struct ServerCertificates {
    held: Arc<Held>,
    key: KeyPair,
    names: Vec<String>,
    today: jiff::civil::Date,
    kept: Mutex<HashMap<IpAddr, TlsAcceptor>>,
}

fn failed(e: impl std::fmt::Display) -> Error {
    Error::internal("a certificate could not be made", e)
}

impl Authority {
    /// The authority of the server `name`, whose files are `STEM.crt` and `STEM.key` of `directory`.
    pub fn new(directory: PathBuf, stem: &'static str, name: &str) -> Self {
        Self { directory, stem, name: name.to_owned(), held: Mutex::new(None) }
    }

    fn held(&self, today: jiff::civil::Date) -> Result<Arc<Held>> {
        let mut held = self.held.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(held) = &*held {
            return Ok(held.clone());
        }
        let (crt, key) = files(&self.directory, self.stem);
        if !crt.exists() {
            self.make(today)?;
        }
        let loaded = Arc::new(parse(read(&crt)?, &read(&key)?)?);
        *held = Some(loaded.clone());
        Ok(loaded)
    }

    fn make(&self, today: jiff::civil::Date) -> Result<()> {
        let mut params = CertificateParams::default();
        date(&mut params, today);
        params.distinguished_name = subject(&short(&format!("libvirt of {}", self.name)));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).map_err(failed)?;
        let certificate = params.self_signed(&key).map_err(failed)?;
        keep(&self.directory, self.stem, &certificate.pem(), &key.serialize_pem())
    }

    /// Its certificate, PEM: what clients keep as `cacert.pem`.
    ///
    /// # Errors
    /// When its files cannot be read or made.
    pub fn certificate(&self, today: jiff::civil::Date) -> Result<String> {
        Ok(self.held(today)?.pem.clone())
    }

    /// What a listener shows, valid for `names` and for whichever address a client comes to.
    ///
    /// # Errors
    /// As [`Authority::certificate`].
    pub fn server(&self, names: &[String], today: jiff::civil::Date) -> Result<ServerCertificates> {
        let own = [self.name.clone(), "localhost".into()];
        Ok(ServerCertificates {
            held: self.held(today)?,
            key: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?,
            names: own.into_iter().chain(names.iter().cloned()).collect(),
            today,
            kept: Mutex::default(),
        })
    }

    /// Makes a key and a certificate for a client; neither is kept.
    ///
    /// # Errors
    /// As [`Authority::certificate`].
    pub fn client(&self, name: &str, today: jiff::civil::Date) -> Result<Issued> {
        let held = self.held(today)?;
        let mut params = CertificateParams::default();
        date(&mut params, today);
        params.distinguished_name = subject(&short(name));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let certificate = params.signed_by(&key, &held.issuer).map_err(failed)?;
        Ok(Issued {
            fingerprint: fingerprint(certificate.der()),
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }
}

fn short(name: &str) -> String {
    name.chars().take(LONGEST_NAME).collect()
}

fn parse(pem: String, key: &str) -> Result<Held> {
    let broken = |why: &dyn std::fmt::Display| {
        Error::internal(
            "the authority of libvirt's certificates cannot be used; repair or remove both files",
            why,
        )
    };
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| broken(&e))?;
    let (_, parsed) = X509Certificate::from_der(&der).map_err(|e| broken(&e))?;
    if !parsed.is_ca() {
        return Err(broken(&"it may not sign"));
    }
    let key = KeyPair::from_pem(key).map_err(|e| broken(&e))?;
    if *parsed.public_key().raw != *rcgen::PublicKeyData::subject_public_key_info(&key) {
        return Err(broken(&"certificate and key do not belong together"));
    }
    let name = parsed.subject().iter_common_name().next().and_then(|n| n.as_str().ok());
    let mut params = CertificateParams::default();
    params.distinguished_name = subject(name.ok_or_else(|| broken(&"its subject has no name"))?);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(Held { pem, issuer: Issuer::new(params, key) })
}

impl ServerCertificates {
    /// What takes the connection of a client that came to `local`.
    ///
    /// # Errors
    /// Internal, when the certificate cannot be made.
    pub fn acceptor(&self, local: IpAddr) -> Result<TlsAcceptor> {
        let local = local.to_canonical();
        let mut kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(acceptor) = kept.get(&local) {
            return Ok(acceptor.clone());
        }
        let certificate = self.certificate(local)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let mut config = config(vec![certificate], key).map_err(failed)?;
        // libvirt's clients read one byte after the handshake and take a ticket that comes before it for a failure.
        config.send_tls13_tickets = 0;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(local, acceptor.clone());
        Ok(acceptor)
    }

    fn certificate(&self, local: IpAddr) -> Result<CertificateDer<'static>> {
        let mut names = self.names.clone();
        names.extend([local.to_canonical().to_string(), "127.0.0.1".into(), "::1".into()]);
        let mut seen = std::collections::BTreeSet::new();
        names.retain(|name| seen.insert(name.clone()));
        let digest = Sha256::digest(self.key.serialize_der());
        let serial = Sha256::new().chain_update(digest).chain_update(names.join(","));
        let mut params = CertificateParams::new(names).map_err(failed)?;
        date(&mut params, self.today);
        // A positive number of 16 bytes.
        let mut serial: Vec<u8> = serial.finalize()[..16].to_vec();
        serial[0] = (serial[0] & 0x7f) | 0x40;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.distinguished_name = subject(&short(&self.names[0]));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&self.key, &self.held.issuer).map_err(failed)?;
        Ok(certificate.der().clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x509_parser::{extensions::GeneralName, pem::parse_x509_pem};

    const TODAY: jiff::civil::Date = jiff::civil::date(2026, 2, 28);

    #[test]
    fn an_authority_stays_and_signs_what_clients_check() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Authority::new(dir.path().to_owned(), "libvirt-ca", "host1");
        let pem = open().certificate(TODAY).unwrap();
        let again = open();
        assert_eq!(again.certificate(jiff::civil::date(2030, 1, 1)).unwrap(), pem);
        let (_, ca) = parse_x509_pem(pem.as_bytes()).unwrap();
        let ca = ca.parse_x509().unwrap();
        assert!(ca.is_ca() && ca.key_usage().unwrap().unwrap().value.key_cert_sign());
        let issued = again.client("laptop", TODAY).unwrap();
        let (_, client) = parse_x509_pem(issued.certificate.as_bytes()).unwrap();
        assert_eq!(fingerprint(&client.contents), issued.fingerprint);
        let client = client.parse_x509().unwrap();
        assert_eq!(client.issuer(), ca.subject());
        assert!(!client.is_ca() && client.extended_key_usage().unwrap().unwrap().value.client_auth);
        assert_ne!(again.client("laptop", TODAY).unwrap().key, issued.key, "never the same twice");
        // A key of another authority: an error, and nothing is replaced.
        let stranger = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap().serialize_pem();
        std::fs::write(dir.path().join("libvirt-ca.key"), &stranger).unwrap();
        assert!(open().certificate(TODAY).unwrap_err().message.contains("authority"));
        assert_eq!(std::fs::read_to_string(dir.path().join("libvirt-ca.key")).unwrap(), stranger);
    }

    #[test]
    fn a_listener_shows_the_address_that_was_come_to() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new(dir.path().to_owned(), "libvirt-ca", "host1");
        let server = authority.server(&["host1.example.com".into()], TODAY).unwrap();
        let names = |local: &str| {
            let der = server.certificate(local.parse().unwrap()).unwrap();
            let (_, parsed) = X509Certificate::from_der(&der).unwrap();
            let mut names = vec![];
            for name in &parsed.subject_alternative_name().unwrap().unwrap().value.general_names {
                names.push(match name {
                    GeneralName::DNSName(n) => n.to_string(),
                    GeneralName::IPAddress(bytes) => format!("{bytes:?}"),
                    other => panic!("{other}"),
                });
            }
            names
        };
        let found = names("::ffff:192.0.2.7");
        for wanted in ["host1", "localhost", "host1.example.com", "[192, 0, 2, 7]", "[127, 0, 0, 1]"] {
            assert!(found.iter().any(|n| n == wanted), "{wanted}: {found:?}");
        }
        assert_eq!(found.len(), 6);
        assert_eq!(names("127.0.0.1").len(), 5, "each once");
        let (one, same) = (
            server.acceptor("127.0.0.1".parse().unwrap()),
            server.acceptor("::ffff:127.0.0.1".parse().unwrap()),
        );
        assert!(Arc::ptr_eq(one.unwrap().config(), same.unwrap().config()));
    }
}
