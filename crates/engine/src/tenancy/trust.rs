//! Who is trusted beyond the unix socket: certificates, and the one-time tokens by which clients add theirs.

use crate::{Engine, Records, Row, context::Context, db::Tx};
use jiff::Timestamp;
use karst_model::{
    Error, OperationId, PrincipalId, ProjectId, Result,
    access::{Identity, Permission, Principal},
    operation::{Operation, OperationClass, OperationState},
    trust::{Certificate, CertificateKind, TrustToken},
};
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// Longest name of a certificate or token, in characters.
const LONGEST_NAME: usize = 128;
/// Most trust tokens that wait at a time; each is a record.
const MOST_TOKENS: usize = 1000;

/// What a user may say of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateSettings {
    /// Name.
    pub name: String,
    /// User's text.
    pub description: String,
    /// What it is for.
    pub kind: CertificateKind,
    /// Reaches `projects` only.
    pub restricted: bool,
    /// Names of projects.
    pub projects: Vec<String>,
}

/// A certificate that was parsed by the front end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCertificate {
    /// SHA-256 of its DER form, lower-case hex.
    pub fingerprint: String,
    /// PEM.
    pub pem: String,
}

/// A trust token that was issued: the only time that its secret is known.
#[derive(Debug)]
pub struct IssuedToken {
    /// The operation that stands for it.
    pub operation: Arc<Operation>,
    /// The secret, hex.
    pub secret: String,
}

/// Hex of 32 random bytes.
pub(crate) fn random_secret(engine: &Engine) -> String {
    let mut bytes = [0; 32];
    engine.inner().env.fill_random(&mut bytes);
    hex(&bytes)
}

/// SHA-256 of a secret, hex.
pub(crate) fn hash(secret: &str) -> String {
    hex(&Sha256::digest(secret.as_bytes()))
}

/// Bytes as lower-case digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

/// Compares hashes without telling by time where they differ.
pub(crate) fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

pub(crate) fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.chars().count() > LONGEST_NAME || name.chars().any(char::is_control) {
        return Err(Error::invalid("name", format!("a name has 1 to {LONGEST_NAME} printable characters")));
    }
    Ok(())
}

/// Ids of projects by name; they exist and stay as they were read.
pub(crate) fn project_ids(records: &Records, tx: &mut Tx, names: &[String]) -> Result<Vec<ProjectId>> {
    let mut ids = vec![];
    for (n, name) in names.iter().enumerate() {
        let row = records.project(name).map_err(|e| e.at(format!("projects[{n}]")))?;
        if !ids.contains(&row.id) {
            tx.expect(row);
            ids.push(row.id);
        }
    }
    Ok(ids)
}

fn check_restriction(settings: &CertificateSettings) -> Result<()> {
    if !settings.restricted && !settings.projects.is_empty() {
        return Err(Error::invalid(
            "projects",
            "projects are for restricted certificates; set restricted, or leave them out",
        ));
    }
    check_name(&settings.name)
}

/// A trust token as the operation that stands for it.
fn as_operation(token: &TrustToken, node: karst_model::NodeId, projects: &[String]) -> Operation {
    let mut metadata = serde_json::Map::new();
    metadata.insert("name".into(), token.name.clone().into());
    metadata.insert("restricted".into(), token.restricted.into());
    metadata.insert("projects".into(), projects.into());
    if let Some(at) = token.expires_at {
        metadata.insert("expiresAt".into(), at.to_string().into());
    }
    Operation {
        id: token.id,
        description: "Executing operation".into(),
        class: OperationClass::Token,
        project: None,
        principal: PrincipalId(uuid::Uuid::nil()),
        requestor: token.requestor.clone(),
        node: Some(node),
        saga: None,
        state: OperationState::Running,
        resources: Default::default(),
        metadata,
        may_cancel: true,
        error: None,
        created_at: token.created_at,
        updated_at: token.created_at,
    }
}

fn is_over(expires_at: Option<Timestamp>, now: Timestamp) -> bool {
    expires_at.is_some_and(|at| at <= now)
}

impl Engine {
    /// Who shows a certificate with this fingerprint: nobody, unless it is trusted.
    pub fn principal_by_certificate(&self, fingerprint: &str, address: &str) -> Principal {
        let records = self.inner().inventory.read();
        let Some(row) = records.tenancy.by_fingerprint(fingerprint) else {
            return Principal::anonymous();
        };
        let identity = Identity::Certificate {
            fingerprint: row.fingerprint.clone(),
            name: row.name.clone(),
            address: address.to_owned(),
        };
        Principal::of(row.id, identity, row.roles())
    }

    /// Is a principal still who it was when it came, with the same roles? A connection that lasts asks this.
    pub fn principal_stands(&self, principal: &Principal) -> bool {
        let now = self.principal_now(principal);
        now.is_known() && now.id == principal.id && now.grants == principal.grants
    }

    /// A principal as it is now: what it was given may have been taken away since.
    pub(crate) fn principal_now(&self, principal: &Principal) -> Principal {
        match &principal.identity {
            Identity::Certificate { fingerprint, address, .. } => {
                self.principal_by_certificate(fingerprint, address)
            }
            Identity::Token { .. } => {
                let now = self.inner().env.now();
                let records = self.inner().inventory.read();
                match records.tenancy.api_tokens.get(&principal.id) {
                    Some(row) if !is_over(row.expires_at, now) => {
                        Principal { grants: row.grants.clone(), ..principal.clone() }
                    }
                    _ => Principal::anonymous(),
                }
            }
            _ => principal.clone(),
        }
    }

    /// Trusted certificates, by fingerprint; who does not inspect the server sees his own.
    ///
    /// # Errors
    /// Unauthenticated.
    pub fn certificates(&self, context: &Context) -> Result<Vec<Row<Certificate>>> {
        context.demand_known()?;
        let all = context.principal().may(Permission::ServerInspect, None);
        let records = self.inner().inventory.read();
        let mut found: Vec<_> = records
            .tenancy
            .certificates
            .values()
            .filter(|c| all || c.id == context.principal().id)
            .cloned()
            .collect();
        found.sort_by(|a, b| a.fingerprint.cmp(&b.fingerprint));
        Ok(found)
    }

    /// A certificate by fingerprint or a unique beginning of it.
    ///
    /// # Errors
    /// Not found, also when it may not be seen.
    pub fn certificate(&self, context: &Context, fingerprint: &str) -> Result<Row<Certificate>> {
        context.demand_known()?;
        if !context.principal().may(Permission::ServerInspect, None) {
            let own =
                self.inner().inventory.read().tenancy.certificates.get(&context.principal().id).cloned();
            let lower = fingerprint.to_ascii_lowercase();
            return own
                .filter(|c| lower.len() >= 4 && c.fingerprint.starts_with(&lower))
                .ok_or_else(|| Error::not_found(format!("certificate {fingerprint:?} not found")));
        }
        self.inner().inventory.read().tenancy.certificate(fingerprint).cloned()
    }

    /// Names of the projects of a certificate, for front ends.
    pub fn certificate_projects(&self, certificate: &Certificate) -> Vec<String> {
        let records = self.inner().inventory.read();
        let names = certificate.projects.iter().filter_map(|p| records.projects.get(p));
        names.map(|p| p.name.to_string()).collect()
    }

    /// Trusts a certificate.
    ///
    /// # Errors
    /// Invalid by field, conflict (trusted already), not found (project), forbidden.
    pub async fn certificate_add(
        &self,
        context: &Context,
        new: NewCertificate,
        settings: CertificateSettings,
    ) -> Result<()> {
        context.demand_server(Permission::ServerEdit)?;
        check_restriction(&settings)?;
        self.inner()
            .transact(|records, tx| {
                let projects = project_ids(records, tx, &settings.projects)?;
                self.trust(records, tx, &new, &settings, projects)
            })
            .await?;
        self.certificate_event(context, "certificate-created", &new.fingerprint);
        Ok(())
    }

    fn trust(
        &self,
        records: &Records,
        tx: &mut Tx,
        new: &NewCertificate,
        settings: &CertificateSettings,
        projects: Vec<ProjectId>,
    ) -> Result<()> {
        if records.tenancy.by_fingerprint(&new.fingerprint).is_some() {
            // The words are Incus': clients compare them.
            return Err(Error::conflict("Certificate already in trust store"));
        }
        let id = PrincipalId(self.inner().env.uuid());
        tx.take_name("certificates", "", &new.fingerprint, &id.to_string());
        tx.create(&Certificate {
            id,
            fingerprint: new.fingerprint.clone(),
            name: settings.name.clone(),
            description: settings.description.clone(),
            kind: settings.kind,
            restricted: settings.restricted,
            projects,
            grants: vec![],
            certificate: new.pem.clone(),
            created_at: self.inner().env.now(),
            spec_version: 1,
        });
        Ok(())
    }

    fn certificate_event(&self, context: &Context, action: &'static str, fingerprint: &str) {
        self.inner().announce(context, None, action, format!("/1.0/certificates/{fingerprint}"));
    }

    /// Replaces what a user may say of a certificate; `certificate` replaces the certificate itself.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict, precondition failed, forbidden.
    pub async fn certificate_update(
        &self,
        context: &Context,
        fingerprint: &str,
        settings: CertificateSettings,
        certificate: Option<NewCertificate>,
        if_version: Option<u64>,
    ) -> Result<()> {
        context.demand_server(Permission::ServerEdit)?;
        check_restriction(&settings)?;
        let now = self
            .inner()
            .transact(|records, tx| {
                let row = records.tenancy.certificate(fingerprint)?;
                if if_version.is_some_and(|v| v != row.spec_version) {
                    return Err(Error::precondition_failed(
                        "the certificate's record has changed since it was read; read it again",
                    ));
                }
                let mut new = row.value.clone();
                new.name = settings.name.clone();
                new.description = settings.description.clone();
                new.kind = settings.kind;
                new.restricted = settings.restricted;
                new.projects = project_ids(records, tx, &settings.projects)?;
                new.spec_version += 1;
                if let Some(other) = certificate.as_ref().filter(|c| c.fingerprint != row.fingerprint) {
                    if records.tenancy.by_fingerprint(&other.fingerprint).is_some() {
                        return Err(Error::conflict("Certificate already in trust store"));
                    }
                    tx.release_name("certificates", "", &row.fingerprint, &row.id.to_string());
                    tx.take_name("certificates", "", &other.fingerprint, &row.id.to_string());
                    new.fingerprint.clone_from(&other.fingerprint);
                    new.certificate.clone_from(&other.pem);
                }
                tx.replace(row, &new);
                Ok(new.fingerprint)
            })
            .await?;
        self.certificate_event(context, "certificate-updated", &now);
        Ok(())
    }

    /// Trusts a certificate no longer: with the next request its owner is nobody. Everybody may give up his own.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn certificate_delete(&self, context: &Context, fingerprint: &str) -> Result<()> {
        let id = self.certificate(context, fingerprint)?.id;
        if id != context.principal().id {
            context.demand_server(Permission::ServerEdit)?;
        }
        let fingerprint =
            self.inner()
                .transact(|records, tx| {
                    let row =
                        records.tenancy.certificates.get(&id).ok_or_else(|| {
                            Error::not_found(format!("certificate {fingerprint:?} not found"))
                        })?;
                    tx.delete(row);
                    tx.release_name("certificates", "", &row.fingerprint, &row.id.to_string());
                    Ok(row.fingerprint.clone())
                })
                .await?;
        self.certificate_event(context, "certificate-deleted", &fingerprint);
        Ok(())
    }

    /// Issues a token by which its holder adds one client certificate with these settings.
    ///
    /// # Errors
    /// Invalid by field, not found (project), conflict (a token of this name waits), quota, forbidden.
    pub async fn trust_token_issue(
        &self,
        context: &Context,
        settings: CertificateSettings,
    ) -> Result<IssuedToken> {
        context.demand_server(Permission::ServerEdit)?;
        check_restriction(&settings)?;
        if settings.kind != CertificateKind::Client {
            return Err(Error::invalid("type", "tokens can only be issued for client certificates"));
        }
        let secret = random_secret(self);
        let inner = self.inner();
        let now = inner.env.now();
        let lifetime = self.server_settings().token_lifetime;
        let expires_at = lifetime.map(|d| now.checked_add(d)).transpose();
        let expires_at =
            expires_at.map_err(|e| Error::internal("the token's expiry cannot be computed", e))?;
        let token = inner
            .transact(|records, tx| {
                let waiting = &records.tenancy.trust_tokens;
                for old in waiting.values().filter(|t| is_over(t.expires_at, now)).take(20) {
                    tx.delete(old);
                }
                let mut valid = waiting.values().filter(|t| !is_over(t.expires_at, now));
                if valid.clone().count() >= MOST_TOKENS {
                    let text = format!("{MOST_TOKENS} tokens wait to be used already; revoke some");
                    return Err(Error::quota(text));
                }
                if valid.any(|t| t.name == settings.name) {
                    let text = format!("a token for {:?} waits to be used already; revoke it", settings.name);
                    return Err(Error::conflict(text).at("name"));
                }
                let token = TrustToken {
                    id: OperationId(inner.env.uuid()),
                    name: settings.name.clone(),
                    secret_hash: hash(&secret),
                    restricted: settings.restricted,
                    projects: project_ids(records, tx, &settings.projects)?,
                    requestor: context.principal().identity.describe(),
                    created_at: now,
                    expires_at,
                };
                tx.create(&token);
                Ok(token)
            })
            .await?;
        self.inner().announce(
            context,
            None,
            "certificate-token-created",
            format!("/1.0/operations/{}", token.id),
        );
        let operation = Arc::new(as_operation(&token, inner.node, &settings.projects));
        Ok(IssuedToken { operation, secret })
    }

    /// Trusts the certificate of whoever knows the secret of a trust token, who is nobody as yet. The token is used up in
    /// the same transaction: of two who show it one succeeds.
    ///
    /// # Errors
    /// Forbidden for a secret that is wrong, used or expired; conflict when the certificate is trusted already.
    pub async fn trust_token_redeem(
        &self,
        context: &Context,
        name: &str,
        secret: &str,
        new: NewCertificate,
    ) -> Result<()> {
        let wanted = hash(secret);
        let now = self.inner().env.now();
        self.inner()
            .transact(|records, tx| {
                let refused = || Error::forbidden("no matching token: it is wrong, was used, or has expired");
                let token = records
                    .tenancy
                    .trust_tokens
                    .values()
                    .find(|t| same(&t.secret_hash, &wanted) && t.name == name && !is_over(t.expires_at, now))
                    .ok_or_else(refused)?;
                tx.delete(token);
                let settings = CertificateSettings {
                    name: token.name.clone(),
                    description: String::new(),
                    kind: CertificateKind::Client,
                    restricted: token.restricted,
                    projects: vec![],
                };
                self.trust(records, tx, &new, &settings, token.projects.clone())
            })
            .await?;
        self.certificate_event(context, "certificate-created", &new.fingerprint);
        Ok(())
    }

    /// The trust tokens that wait to be used, as the operations that stand for them.
    pub(crate) fn trust_token_operations(&self, context: &Context) -> Vec<Arc<Operation>> {
        if !context.principal().may(Permission::ServerInspect, None) {
            return vec![];
        }
        let now = self.inner().env.now();
        let records = self.inner().inventory.read();
        let waiting = records.tenancy.trust_tokens.values().filter(|t| !is_over(t.expires_at, now));
        waiting
            .map(|t| {
                let projects: Vec<_> = t
                    .projects
                    .iter()
                    .filter_map(|p| records.projects.get(p))
                    .map(|p| p.name.to_string())
                    .collect();
                Arc::new(as_operation(t, self.inner().node, &projects))
            })
            .collect()
    }

    /// Revokes the trust token behind an operation, if it is one; answers whether it was.
    pub(crate) async fn trust_token_revoke(&self, context: &Context, id: OperationId) -> Result<bool> {
        if !self.inner().inventory.read().tenancy.trust_tokens.contains_key(&id) {
            return Ok(false);
        }
        context.demand_server(Permission::ServerEdit)?;
        self.inner()
            .transact(|records, tx| {
                let missing = || Error::not_found(format!("operation {id} not found"));
                tx.delete(records.tenancy.trust_tokens.get(&id).ok_or_else(missing)?);
                Ok(())
            })
            .await?;
        Ok(true)
    }
}
