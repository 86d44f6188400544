//! `/1.0/karst/libvirt`: where libvirt's clients reach this server over TLS, and certificates for them.

use crate::{
    app::Call,
    respond::{Reply, sync},
};
use karst_engine::tenancy::trust::{CertificateSettings, NewCertificate};
use karst_model::{Error, Result, access::Permission, trust::CertificateKind};
use karst_tls::Authority;
use serde_json::json;
use std::sync::Arc;

fn authority(call: &Call) -> Result<(Arc<Authority>, jiff::civil::Date)> {
    let authority = call.app.info.authority.clone();
    let authority =
        authority.ok_or_else(|| Error::unsupported("this server has no authority of certificates"))?;
    let now = call.engine().inner().env.now();
    Ok((authority, now.to_zoned(jiff::tz::TimeZone::UTC).date()))
}

/// `GET /1.0/karst/libvirt`: the address that is listened on, empty for none, and the certificate of the authority.
///
/// # Errors
/// Forbidden; internal, when the authority cannot be read.
pub async fn get(call: Call) -> Result<Reply> {
    call.context.demand_server(Permission::ServerView)?;
    let (authority, today) = authority(&call)?;
    let settings = call.engine().server_settings();
    sync(&json!({
        "address": settings.libvirt_address.map(|a| a.to_string()).unwrap_or_default(),
        "certificate_authority": authority.certificate(today)?,
    }))
}

/// `POST /1.0/karst/libvirt/clients`: makes a key and a certificate for a client of libvirt, and trusts it:
/// `{"name", "description", "restricted", "projects"}`. The only time that the key is known.
///
/// # Errors
/// Those of the engine.
pub async fn create(call: Call) -> Result<Reply> {
    call.context.demand_server(Permission::ServerEdit)?;
    let (authority, today) = authority(&call)?;
    let (call, mut f) = call.fields().await?;
    let settings = CertificateSettings {
        name: f.need_text("name")?,
        description: f.text("description")?.unwrap_or_default(),
        kind: CertificateKind::Client,
        restricted: f.flag("restricted")?,
        projects: f.texts("projects")?.unwrap_or_default(),
    };
    f.finish(&[])?;
    let made = authority.client(&settings.name, today)?;
    let new = NewCertificate { fingerprint: made.fingerprint.clone(), pem: made.certificate.clone() };
    call.engine().certificate_add(&call.context, new, settings).await?;
    sync(&json!({
        "fingerprint": made.fingerprint,
        "certificate_authority": authority.certificate(today)?,
        "certificate": made.certificate,
        "key": made.key,
    }))
}
