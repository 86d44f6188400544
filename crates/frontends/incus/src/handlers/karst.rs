//! `/1.0/karst`: what Incus lacks.

use crate::{
    app::Call,
    respond::{Reply, sync},
};
use karst_model::{Result, access::Permission};
use serde_json::json;

/// `GET /1.0/karst/host`: the nodes, as their agents last described them.
///
/// # Errors
/// Forbidden.
pub async fn host(call: Call) -> Result<Reply> {
    call.context.demand_server(Permission::ServerInspect)?;
    let inner = call.engine().inner();
    let nodes: Vec<_> = inner
        .inventory
        .read()
        .nodes
        .values()
        .map(|n| json!({"name": &*n.name, "id": n.id, "this": n.id == inner.node, "facts": n.facts}))
        .collect();
    sync(
        &json!({"version": call.app.info.version, "epoch": inner.epoch, "daemon_id": inner.daemon_id, "nodes": nodes}),
    )
}

/// `GET /1.0/karst/check`: what disagrees between the records and the hosts: `{"leaks": […], "sagas": […]}`, in words.
///
/// # Errors
/// Forbidden; unavailable when a host does not answer.
pub async fn check(call: Call) -> Result<Reply> {
    sync(&call.engine().health(&call.context).await?)
}

/// `GET /1.0/karst/status`: this daemon, and whether its host answers now:
/// `{"daemon", "pid", "hosts", "instances", "host": facts or {"error"}}`.
///
/// # Errors
/// Forbidden.
pub async fn status(call: Call) -> Result<Reply> {
    call.context.demand_server(Permission::ServerInspect)?;
    let engine = call.engine();
    let host = match engine.probe_host(&call.context).await {
        Ok(facts) => serde_json::to_value(facts)?,
        Err(e) => json!({"error": e.message}),
    };
    let inner = engine.inner();
    sync(&json!({
        "daemon": inner.daemon_id,
        "pid": std::process::id(),
        "hosts": inner.agents.nodes().len(),
        "instances": engine.instances_all(&call.context).len(),
        "host": host,
    }))
}

/// `GET /1.0/karst/instances/{name}/pending`: what of a running instance waits for its next start:
/// `[{"key", "live", "configured"}]`, where `null` is a value that is not there.
///
/// # Errors
/// Not found, forbidden.
pub async fn pending(call: Call) -> Result<Reply> {
    sync(&call.engine().instance_pending(&call.context, call.project(), call.param(0))?)
}

/// `GET /1.0/karst/openapi`: the API as an OpenAPI document, as it is in `docs/openapi.json`.
///
/// # Errors
/// Internal, when it cannot be encoded.
pub async fn openapi(_: Call) -> Result<Reply> {
    sync(&crate::openapi::document())
}
