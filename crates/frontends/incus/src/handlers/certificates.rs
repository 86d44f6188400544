//! `/1.0/certificates`: whom the server trusts, and the tokens by which clients add their certificate.

use super::list as respond_list;
use crate::{
    app::{Call, Taken},
    fields::Fields,
    filter::Filter,
    respond::{Etag, Reply, accepted, created, empty, sync_etag},
    tls::ClientCertificate,
    wire::{misc::CertificateView, operation::OperationView},
};
use base64::Engine as _;
use karst_engine::{
    Engine,
    tenancy::trust::{CertificateSettings, NewCertificate},
};
use karst_model::{
    Error, Result,
    operation::Operation,
    trust::{Certificate, CertificateKind},
};
use serde_json::{Map, Value, json};

const VIEW: &str = "certificate";
const READ_ONLY: &[&str] = &["fingerprint"];

fn view<'a>(engine: &Engine, c: &'a Certificate) -> CertificateView<'a> {
    CertificateView {
        name: &c.name,
        kind: c.kind.as_str(),
        restricted: c.restricted,
        projects: engine.certificate_projects(c),
        certificate: &c.certificate,
        fingerprint: &c.fingerprint,
        description: &c.description,
    }
}

/// `GET /1.0/certificates`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let all = call.engine().certificates(&call.context)?;
    respond_list(
        recursion,
        &filter,
        all.iter().map(|c| (view(call.engine(), c), format!("/1.0/certificates/{}", c.fingerprint))),
    )
}

/// `GET /1.0/certificates/{fingerprint}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let c = call.engine().certificate(&call.context, call.param(0))?;
    sync_etag(&view(call.engine(), &c), &Etag::of(VIEW, c.id.uuid(), c.spec_version))
}

fn kind(f: &mut Fields) -> Result<Option<CertificateKind>> {
    let Some(text) = f.text("type")? else { return Ok(None) };
    let refused = || {
        Error::invalid("type", format!("{text:?} is not a type of certificate here; client and metrics are"))
    };
    CertificateKind::parse(&text).ok_or_else(refused).map(Some)
}

/// `POST /1.0/certificates`: an administrator trusts a certificate or issues a token; whoever holds a token has the
/// certificate of his connection trusted.
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn create(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let kind = kind(&mut f)?.unwrap_or(CertificateKind::Client);
    let sent = f.text("certificate")?.filter(|c| !c.is_empty());
    let wants_token = f.flag("token")?;
    // LXD's clients, which know no `trust_token`, show it as the password.
    let secret = f.text("trust_token")?.filter(|t| !t.is_empty());
    let secret = secret.or(f.text("password")?.filter(|t| !t.is_empty()));
    let settings = CertificateSettings {
        name: f.text("name")?.unwrap_or_default(),
        description: f.text("description")?.unwrap_or_default(),
        kind,
        restricted: f.flag("restricted")?,
        projects: f.texts("projects")?.unwrap_or_default(),
    };
    f.finish(READ_ONLY)?;
    if let Some(token) = secret {
        return redeem(call, &token, sent).await;
    }
    if wants_token {
        if sent.is_some() {
            return Err(Error::invalid(
                "certificate",
                "a token is issued for a certificate that is yet to come",
            ));
        }
        return issue(call, settings).await;
    }
    let shown = call.certificate.as_deref().cloned();
    let certificate = match sent {
        Some(text) => ClientCertificate::parse(&text)?,
        None => shown.ok_or_else(|| Error::invalid("certificate", "certificate is missing"))?,
    };
    let settings = match settings.name.is_empty() {
        true => CertificateSettings { name: certificate.fingerprint[..12].to_owned(), ..settings },
        false => settings,
    };
    let new = NewCertificate { fingerprint: certificate.fingerprint.clone(), pem: certificate.pem() };
    call.engine().certificate_add(&call.context, new, settings).await?;
    created(&format!("/1.0/certificates/{}", certificate.fingerprint))
}

/// A token as clients pass it on: base64 of `{"client_name", "secret", …}`.
fn decode(token: &str) -> Option<(String, String)> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(token.trim()).ok()?;
    let value: Value = serde_json::from_slice(&bytes).ok()?;
    let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
    Some((text("client_name")?, text("secret")?))
}

async fn redeem(call: Taken, token: &str, sent: Option<String>) -> Result<Reply> {
    let certificate = match (&call.certificate, sent) {
        // Whoever is nobody can have no other certificate trusted than the one whose key he has.
        (Some(shown), None) => (**shown).clone(),
        (Some(shown), Some(text)) => {
            let named = ClientCertificate::parse(&text)?;
            if named.fingerprint != shown.fingerprint {
                let text = "a token is for the certificate of the connection that shows it";
                return Err(Error::invalid("certificate", text));
            }
            named
        }
        (None, _) => {
            let text = "a token needs a connection that shows a client certificate";
            return Err(Error::invalid("certificate", text));
        }
    };
    let (name, secret) =
        decode(token).ok_or_else(|| Error::forbidden("no matching token: it is malformed"))?;
    let new = NewCertificate { fingerprint: certificate.fingerprint.clone(), pem: certificate.pem() };
    call.engine().trust_token_redeem(&call.context, &name, &secret, new).await?;
    created(&format!("/1.0/certificates/{}", certificate.fingerprint))
}

async fn issue(call: Taken, settings: CertificateSettings) -> Result<Reply> {
    if !call.app.remote.listens() {
        // Nobody who may not issue tokens learns whether the server listens.
        call.context.demand_server(karst_model::access::Permission::ServerEdit)?;
        return Err(Error::conflict(
            "a token needs a server that listens on the network; set core.https_address first (such as :8443)",
        ));
    }
    let issued = call.engine().trust_token_issue(&call.context, settings).await?;
    let metadata = token_metadata(&call.app, &issued.operation, &issued.secret);
    accepted(&issued.operation.id.to_string(), &OperationView::of(&issued.operation).with_metadata(&metadata))
}

/// Metadata of a token's operation as clients make the token of it. The secret is known when it is issued and empty later.
pub fn token_metadata(app: &crate::App, operation: &Operation, secret: &str) -> Map<String, Value> {
    let mut metadata = Map::new();
    let of = |name: &str| operation.metadata.get(name).cloned().unwrap_or_default();
    metadata.insert("addresses".into(), json!(app.remote.addresses()));
    metadata.insert("secret".into(), secret.into());
    let fingerprint = app.info.identity.as_ref().map_or("", |i| i.fingerprint.as_str());
    metadata.insert("fingerprint".into(), fingerprint.into());
    metadata.insert(
        "request".into(),
        json!({
            "name": of("name"), "type": "client", "restricted": of("restricted"), "projects": of("projects"),
            "certificate": "", "description": "", "trust_token": "", "token": true,
        }),
    );
    if let Some(at) = operation.metadata.get("expiresAt") {
        metadata.insert("expiresAt".into(), at.clone());
    }
    metadata
}

/// `PUT` and `PATCH /1.0/certificates/{fingerprint}`
///
/// # Errors
/// Those of the engine.
pub async fn change(call: Call) -> Result<Reply> {
    let c = call.engine().certificate(&call.context, call.param(0))?;
    let mut if_version = call.expected(VIEW, c.id.uuid(), c.spec_version)?;
    let patch = call.request.method() == hyper::Method::PATCH;
    let (call, mut f) = call.fields().await?;
    let (name, description) = (f.text("name")?, f.text("description")?);
    let (kind, projects) = (kind(&mut f)?, f.texts("projects")?);
    let restricted = f.has("restricted").then(|| f.flag("restricted")).transpose()?;
    let certificate = f.text("certificate")?.filter(|t| !t.is_empty());
    f.finish(READ_ONLY)?;
    let old = |p: bool| patch.then_some(p);
    let settings = CertificateSettings {
        name: name.or(patch.then(|| c.name.clone())).unwrap_or_default(),
        description: description.or(patch.then(|| c.description.clone())).unwrap_or_default(),
        kind: kind.unwrap_or(c.kind),
        restricted: restricted.or(old(c.restricted)).unwrap_or_default(),
        projects: projects.or(patch.then(|| call.engine().certificate_projects(&c))).unwrap_or_default(),
    };
    if patch {
        if_version = if_version.or(Some(c.spec_version));
    }
    let certificate = certificate.map(|text| ClientCertificate::parse(&text)).transpose()?;
    let certificate = certificate.map(|c| NewCertificate { pem: c.pem(), fingerprint: c.fingerprint });
    call.engine().certificate_update(&call.context, call.param(0), settings, certificate, if_version).await?;
    Ok(empty())
}

/// `DELETE /1.0/certificates/{fingerprint}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    call.engine().certificate_delete(&call.context, call.param(0)).await?;
    Ok(empty())
}
