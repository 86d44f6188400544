//! `/1.0/operations`: lists, waiting, cancelling, websockets.

use super::certificates::token_metadata;
use crate::{
    app::Call,
    respond::{Reply, empty, sync},
    socket,
    wire::operation::OperationView,
};
use karst_model::{
    Error, Result,
    operation::{Operation, OperationClass},
};
use serde_json::Value;
use std::{collections::BTreeMap, time::Duration};

/// `GET /1.0/operations`: grouped by status in lower case.
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let project = if call.query.flag("all-projects") { None } else { Some(call.project()) };
    let all = call.engine().operations(&call.context, project)?;
    if recursion == 0 {
        let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for o in &all {
            let view = OperationView::of(o);
            groups
                .entry(view.status.to_lowercase())
                .or_default()
                .push(format!("/1.0/operations/{}", view.id));
        }
        return sync(&groups);
    }
    let mut groups: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for o in &all {
        let metadata = metadata(&call.app, o);
        let view = OperationView::of(o).with_metadata_if(metadata.as_ref());
        groups.entry(view.status.to_lowercase()).or_default().push(serde_json::to_value(&view)?);
    }
    sync(&groups)
}

/// What a trust token's operation shows; its secret is not known any more.
fn metadata(app: &crate::App, operation: &Operation) -> Option<serde_json::Map<String, Value>> {
    (operation.class == OperationClass::Token).then(|| token_metadata(app, operation, ""))
}

/// `GET /1.0/operations/{id}`
///
/// # Errors
/// Not found.
pub async fn get(call: Call) -> Result<Reply> {
    let record = call.engine().operation(&call.context, call.operation_id()?)?;
    let metadata = metadata(&call.app, &record);
    sync(&OperationView::of(&record).with_metadata_if(metadata.as_ref()))
}

/// `GET /1.0/operations/{id}/wait`: `timeout` in seconds, -1 for no limit.
///
/// # Errors
/// Not found.
pub async fn wait(call: Call) -> Result<Reply> {
    let timeout = match call.query.integer("timeout")? {
        Some(n @ 0..) => Some(Duration::from_secs(n.unsigned_abs())),
        _ => None,
    };
    let id = call.operation_id()?;
    // Who brought an image and is nobody here may wait for what becomes of it.
    let record = match call.query.get("secret").filter(|_| call.context.demand_known().is_err()) {
        Some(secret) => call.engine().image_came_wait(id, secret, timeout).await?,
        None => call.engine().operation_wait(&call.context, id, timeout).await?,
    };
    sync(&OperationView::of(&record))
}

/// `DELETE /1.0/operations/{id}`
///
/// # Errors
/// Those of the engine.
pub async fn cancel(call: Call) -> Result<Reply> {
    call.engine().operation_cancel(&call.context, call.operation_id()?).await?;
    Ok(empty())
}

/// `GET /1.0/operations/{id}/websocket?secret=…`
///
/// # Errors
/// Forbidden for a wrong secret.
pub async fn websocket(call: Call) -> Result<Reply> {
    let id = call.operation_id()?;
    let secret = call.query.get("secret").ok_or_else(|| Error::invalid("secret", "secret is missing"))?;
    if !socket::asks_for(&call.request, "websocket") {
        return Err(Error::invalid("Upgrade", "this path speaks websocket: the Upgrade header is missing"));
    }
    let slot = call.app.sessions.take(id, secret)?;
    socket::websocket(call.request, socket::STREAM, |socket| async move { slot.give(socket) })
}
