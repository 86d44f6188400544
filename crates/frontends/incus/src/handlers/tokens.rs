//! `/1.0/karst/tokens`: secrets that programs show with each request over HTTPS (`Authorization: Bearer`).

use crate::{
    app::Call,
    respond::{Reply, empty, sync},
};
use karst_engine::{Engine, tenancy::tokens::NewApiToken};
use karst_model::{Error, Result, access::Role, trust::ApiToken};
use serde_json::{Value, json};

fn view(engine: &Engine, t: &ApiToken) -> Value {
    let grants: Vec<Value> = t
        .grants
        .iter()
        .map(|g| json!({"role": g.role.as_str(), "project": g.project.map(|p| engine.inner().project_name(Some(p)))}))
        .collect();
    json!({
        "name": t.name, "description": t.description, "grants": grants, "created_at": t.created_at,
        "expires_at": t.expires_at,
    })
}

/// `GET /1.0/karst/tokens`
///
/// # Errors
/// Forbidden.
pub async fn list(call: Call) -> Result<Reply> {
    let all = call.engine().api_tokens(&call.context)?;
    sync(&all.iter().map(|t| view(call.engine(), t)).collect::<Vec<_>>())
}

/// `POST /1.0/karst/tokens`: `{"name", "role", "projects", "expires_at", "description"}`; answers `{"name", "token"}`.
///
/// # Errors
/// Those of the engine.
pub async fn create(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let expires_at = f.text("expires_at")?.filter(|t| !t.is_empty());
    let new = NewApiToken {
        name: f.need_text("name")?,
        description: f.text("description")?.unwrap_or_default(),
        role: Role::parse(&f.need_text("role")?)?,
        projects: f.texts("projects")?.unwrap_or_default(),
        expires_at: expires_at
            .map(|t| {
                t.parse().map_err(|_| Error::invalid("expires_at", format!("{t:?} is not a time (RFC 3339)")))
            })
            .transpose()?,
    };
    f.finish(&[])?;
    let name = new.name.clone();
    let token = call.engine().api_token_create(&call.context, new).await?;
    sync(&json!({"name": name, "token": token}))
}

/// `DELETE /1.0/karst/tokens/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    call.engine().api_token_delete(&call.context, call.param(0)).await?;
    Ok(empty())
}
