//! `/1.0/karst/registries`: who a project is at registries of the OCI. Passwords come in and are in no answer.

use crate::{
    app::Call,
    respond::{Reply, empty, sync},
};
use karst_engine::{images::registries::NewLogin, secrets::SecretValue};
use karst_model::Result;
use serde_json::{Value, json};

/// `GET /1.0/karst/registries`: `[{"host", "user", "certificate"}]`
///
/// # Errors
/// Not found, forbidden.
pub async fn list(call: Call) -> Result<Reply> {
    let all = call.engine().registry_logins(&call.context, call.project())?;
    let view = |l: &karst_model::registry::RegistryLogin| json!({"host": l.host, "user": l.user, "certificate": l.certificate});
    sync(&all.iter().map(view).collect::<Vec<Value>>())
}

/// `PUT /1.0/karst/registries/{host}`: `{"user", "password", "certificate"}`; the certificate (PEM) where no authority vouches for
/// the registry.
///
/// # Errors
/// Those of the engine.
pub async fn change(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let password = SecretValue::new(f.need_text("password")?.into_bytes())?;
    let new = NewLogin {
        host: call.param(0).to_owned(),
        user: f.need_text("user")?,
        password,
        certificate: f.text("certificate")?.filter(|c| !c.is_empty()),
    };
    f.finish(&[])?;
    let project = call.project().to_owned();
    call.engine().registry_login_set(&call.context, &project, new).await?;
    Ok(empty())
}

/// `DELETE /1.0/karst/registries/{host}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    call.engine().registry_login_remove(&call.context, call.project(), call.param(0)).await?;
    Ok(empty())
}
