//! `/1.0/warnings`.

use super::list as respond_list;
use crate::{
    app::Call,
    filter::Filter,
    respond::{Reply, empty, sync},
    wire::{NOWHERE, misc::WarningView},
};
use karst_engine::Engine;
use karst_model::{Error, Result, warning::Warning};

/// What views show of a warning and changes carry back without meaning.
const READ_ONLY: &[&str] = &[
    "uuid",
    "location",
    "project",
    "type",
    "count",
    "first_seen_at",
    "last_seen_at",
    "last_message",
    "severity",
    "entity_url",
];

fn view<'a>(engine: &Engine, w: &'a Warning) -> WarningView<'a> {
    WarningView {
        status: w.status.as_str(),
        uuid: w.id.to_string(),
        location: NOWHERE,
        project: w.project.map(|p| engine.inner().project_name(Some(p))).unwrap_or_default(),
        kind: &w.kind,
        count: w.count,
        first_seen_at: w.first_seen_at,
        last_seen_at: w.last_seen_at,
        last_message: &w.message,
        severity: w.severity.as_str(),
        entity_url: &w.entity,
    }
}

fn id(call: &Call) -> Result<uuid::Uuid> {
    let text = call.param(0);
    text.parse().map_err(|_| Error::not_found(format!("warning {text:?} not found")))
}

/// `GET /1.0/warnings`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let mut all = call.engine().warnings(&call.context)?;
    if let Some(name) = call.query.get("project") {
        let view = karst_model::access::Permission::ProjectView;
        let project = call.engine().project(&call.context, name, view)?.id;
        all.retain(|w| w.project == Some(project));
    }
    let path = |w: &Warning| format!("/1.0/warnings/{}", w.id);
    respond_list(recursion, &filter, all.iter().map(|w| (view(call.engine(), w), path(w))))
}

/// `GET /1.0/warnings/{uuid}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let warning = call.engine().warning(&call.context, id(&call)?)?;
    sync(&view(call.engine(), &warning))
}

/// `PUT` and `PATCH /1.0/warnings/{uuid}`: `status` is `new` or `acknowledged`.
///
/// # Errors
/// Those of the engine.
pub async fn change(call: Call) -> Result<Reply> {
    let id = id(&call)?;
    let (call, mut f) = call.fields().await?;
    let status = f.need_text("status")?;
    f.finish(READ_ONLY)?;
    let seen = match status.as_str() {
        "acknowledged" => true,
        "new" => false,
        other => {
            let text = format!("{other:?} is not a status to set; new and acknowledged are");
            return Err(Error::invalid("status", text));
        }
    };
    call.engine().warning_acknowledge(&call.context, id, seen).await?;
    Ok(empty())
}

/// `DELETE /1.0/warnings/{uuid}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    call.engine().warning_delete(&call.context, id(&call)?).await?;
    Ok(empty())
}
