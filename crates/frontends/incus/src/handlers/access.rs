//! Who has which role, and why somebody may or may not do something.

use crate::{
    app::{Call, Taken},
    respond::{Reply, empty, sync},
};
use karst_model::{
    Error, Result,
    access::{Permission, Role},
};
use serde_json::{Value, json};

/// As Incus writes it: who may edit a project is its operator.
fn entries(call: &Call, project: &str) -> Result<Reply> {
    let all = call.engine().access(&call.context, Some(project))?;
    let view = |e: &karst_engine::tenancy::access::AccessEntry| json!({"identifier": e.identifier, "role": e.role, "provider": e.provider});
    sync(&all.iter().map(view).collect::<Vec<Value>>())
}

/// `GET /1.0/projects/{name}/access`
///
/// # Errors
/// Those of the engine.
pub async fn project(call: Call) -> Result<Reply> {
    let name = call.param(0).to_owned();
    call.engine().project(&call.context, &name, Permission::ProjectView)?;
    entries(&call, &name)
}

/// `GET /1.0/instances/{name}/access`: whoever has a role in its project.
///
/// # Errors
/// Those of the engine.
pub async fn instance(call: Call) -> Result<Reply> {
    call.engine().instance(&call.context, call.project(), call.param(0))?;
    let project = call.project().to_owned();
    entries(&call, &project)
}

/// `GET /1.0/karst/access`: every role that somebody has; `project` of the query chooses.
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    sync(&call.engine().access(&call.context, call.query.get("project"))?)
}

/// `GET /1.0/karst/access/why?principal=…&permission=…&object=…`; without a principal it is who asks.
///
/// # Errors
/// Those of the engine; invalid by parameter.
pub async fn why(call: Call) -> Result<Reply> {
    let need = |name: &str| {
        call.query.get(name).ok_or_else(|| Error::invalid(name, format!("the parameter {name} is missing")))
    };
    let permission = Permission::parse(need("permission")?)?;
    let principal = call.query.get("principal").unwrap_or("me");
    sync(&call.engine().access_why(&call.context, principal, permission, need("object")?)?)
}

async fn body(call: Call) -> Result<(Taken, String, Role, Option<String>)> {
    let (call, mut f) = call.fields().await?;
    let (principal, role) = (f.need_text("principal")?, Role::parse(&f.need_text("role")?)?);
    let project = f.text("project")?.filter(|p| !p.is_empty());
    f.finish(&[])?;
    Ok((call, principal, role, project))
}

/// `POST /1.0/karst/access`: gives a role: `{"principal", "role", "project"}`.
///
/// # Errors
/// Those of the engine.
pub async fn grant(call: Call) -> Result<Reply> {
    let (call, principal, role, project) = body(call).await?;
    call.engine().access_grant(&call.context, &principal, role, project.as_deref()).await?;
    Ok(empty())
}

/// `DELETE /1.0/karst/access`: takes one away, as it was given.
///
/// # Errors
/// Those of the engine.
pub async fn revoke(call: Call) -> Result<Reply> {
    let (call, principal, role, project) = body(call).await?;
    call.engine().access_revoke(&call.context, &principal, role, project.as_deref()).await?;
    Ok(empty())
}
