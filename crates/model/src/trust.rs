//! Whom the server trusts beyond its unix socket: client certificates, tokens that let one be added, and tokens that
//! are shown with each request. Secrets are kept as their SHA-256 only: they are 256 random bits, so there is nothing to
//! guess and no need for a slow hash.

use crate::{
    Config, OperationId, PrincipalId, ProjectId,
    access::{Grant, Role},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CertificateKind {
    /// A client of the API.
    Client,
    /// Reads metrics and nothing else.
    Metrics,
}

impl CertificateKind {
    /// Incus' word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Metrics => "metrics",
        }
    }

    /// Of Incus' word.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "" | "client" => Some(Self::Client),
            "metrics" => Some(Self::Metrics),
            _ => None,
        }
    }
}

/// A certificate that is trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// Reference, also of the principal that shows it.
    pub id: PrincipalId,
    /// SHA-256 of its DER form, 64 lower-case hex digits; unique.
    pub fingerprint: String,
    /// User's name for it; need not be unique.
    pub name: String,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// What it is for.
    pub kind: CertificateKind,
    /// Reaches `projects` only, instead of everything.
    #[serde(default)]
    pub restricted: bool,
    /// Projects that a restricted one operates.
    #[serde(default)]
    pub projects: Vec<ProjectId>,
    /// Roles it was given besides.
    #[serde(default)]
    pub grants: Vec<Grant>,
    /// The certificate, PEM.
    pub certificate: String,
    /// When it was added.
    pub created_at: Timestamp,
    /// Grows with each change.
    pub spec_version: u64,
}

impl Certificate {
    /// The roles of who shows it.
    pub fn roles(&self) -> Vec<Grant> {
        let role = match self.kind {
            CertificateKind::Client if self.restricted => Role::Operator,
            CertificateKind::Client => Role::Admin,
            CertificateKind::Metrics => Role::Metrics,
        };
        let mut all = match self.restricted {
            false => vec![Grant { role, project: None }],
            true => self.projects.iter().map(|p| Grant { role, project: Some(*p) }).collect(),
        };
        // A certificate for metrics stays one, whatever it was given.
        if self.kind == CertificateKind::Client {
            all.extend(self.grants.iter().cloned());
        }
        all
    }
}

/// Lets whoever knows its secret add one client certificate, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustToken {
    /// The operation that stands for it in the API.
    pub id: OperationId,
    /// Name that the certificate will have.
    pub name: String,
    /// SHA-256 of the secret, hex.
    pub secret_hash: String,
    /// As [`Certificate::restricted`].
    pub restricted: bool,
    /// As [`Certificate::projects`].
    pub projects: Vec<ProjectId>,
    /// Who issued it, in words.
    pub requestor: String,
    /// When it was issued.
    pub created_at: Timestamp,
    /// Worthless from then on.
    pub expires_at: Option<Timestamp>,
}

/// A secret that is shown with each request (`Authorization: Bearer`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiToken {
    /// Reference, also of its principal, and the part of the token that is no secret.
    pub id: PrincipalId,
    /// Unique name.
    pub name: String,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// SHA-256 of the secret, hex.
    pub secret_hash: String,
    /// What a login by name compares, which never sees the token; those of older versions have none.
    #[serde(default)]
    pub scram: Option<Scram>,
    /// What it may.
    pub grants: Vec<Grant>,
    /// When it was made.
    pub created_at: Timestamp,
    /// Worthless from then on.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// Grows with each change.
    pub spec_version: u64,
}

/// Verifier of SCRAM-SHA-256 (RFC 5802, RFC 7677); all hex. Of 256 random bits nothing can be guessed by it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scram {
    /// Salt.
    pub salt: String,
    /// Rounds of PBKDF2.
    pub iterations: u32,
    /// Hash of the key by which a client proves that it knows the password.
    pub stored_key: String,
    /// Key by which the server proves that it knows this.
    pub server_key: String,
}

/// The server's own configuration: one record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerConfig {
    /// As written.
    pub config: Config,
    /// Grows with each change; 0 before the first.
    pub spec_version: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restricted_certificate_reaches_its_projects_and_one_for_metrics_stays_that() {
        let project = ProjectId(uuid::Uuid::from_u128(3));
        let mut certificate = Certificate {
            id: PrincipalId(uuid::Uuid::from_u128(1)),
            fingerprint: "0".repeat(64),
            name: "c".into(),
            description: String::new(),
            kind: CertificateKind::Client,
            restricted: false,
            projects: vec![],
            grants: vec![],
            certificate: String::new(),
            created_at: Timestamp::UNIX_EPOCH,
            spec_version: 1,
        };
        assert_eq!(certificate.roles(), [Grant { role: Role::Admin, project: None }]);
        certificate.restricted = true;
        assert_eq!(certificate.roles(), [], "no project, nothing");
        certificate.projects = vec![project];
        assert_eq!(certificate.roles(), [Grant { role: Role::Operator, project: Some(project) }]);
        certificate.kind = CertificateKind::Metrics;
        certificate.grants = vec![Grant { role: Role::Admin, project: None }];
        assert_eq!(certificate.roles(), [Grant { role: Role::Metrics, project: Some(project) }]);
    }
}
