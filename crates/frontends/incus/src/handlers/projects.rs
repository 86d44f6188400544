//! `/1.0/projects`.

use super::list as respond_list;
use crate::{
    app::Call,
    filter::Filter,
    respond::{Etag, Reply, created, empty, sync, sync_etag},
    wire::{
        self,
        misc::{LimitUsage, ProjectStateView, ProjectView},
    },
};
use karst_engine::{NewOperation, Row};
use karst_model::{Result, access::Permission, project::Project};

const VIEW: &str = "project";

fn find(call: &Call) -> Result<Row<Project>> {
    call.engine().project(&call.context, call.param(0), Permission::ProjectView)
}

/// `GET /1.0/projects`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let all = call.engine().projects(&call.context);
    respond_list(
        recursion,
        &filter,
        all.iter().map(|p| {
            let path = format!("/1.0/projects/{}", wire::segment(&p.name));
            (ProjectView::of(p, call.engine().project_used_by(p)), path)
        }),
    )
}

/// `GET /1.0/projects/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let project = find(&call)?;
    let view = ProjectView::of(&project, call.engine().project_used_by(&project));
    sync_etag(&view, &Etag::of(VIEW, project.id.uuid(), project.spec_version))
}

/// `GET /1.0/projects/{name}/state`: use of a project beside its limits (-1: none).
///
/// # Errors
/// Those of the engine.
pub async fn state(call: Call) -> Result<Reply> {
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let all = call.engine().project_state(&call.context, call.param(0))?;
    sync(&ProjectStateView {
        resources: all
            .into_iter()
            .map(|(name, limit, usage)| {
                (name, LimitUsage { limit: limit.map_or(-1, number), usage: number(usage) })
            })
            .collect(),
    })
}

/// `POST /1.0/projects`
///
/// # Errors
/// Those of the engine.
pub async fn create(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let name = f.need_text("name")?;
    let description = f.text("description")?.unwrap_or_default();
    let config = f.config("config")?.unwrap_or_default();
    f.finish(&[])?;
    call.engine().project_create(&call.context, &name, &description, config).await?;
    created(&format!("/1.0/projects/{}", wire::segment(&name)))
}

/// `PUT` and `PATCH /1.0/projects/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn change(call: Call) -> Result<Reply> {
    let project = find(&call)?;
    let mut if_version = call.expected(VIEW, project.id.uuid(), project.spec_version)?;
    let patch = call.request.method() == hyper::Method::PATCH;
    let (call, mut f) = call.fields().await?;
    let (mut description, mut config) = (String::new(), karst_model::Config::new());
    if patch {
        description = project.description.clone();
        config = project.config.clone();
        if_version = if_version.or(Some(project.spec_version));
    }
    if let Some(text) = f.text("description")? {
        description = text;
    }
    config.extend(f.config("config")?.unwrap_or_default());
    config.retain(|_, v| !v.is_empty());
    f.finish(&["name", "used_by"])?;
    call.engine().project_update(&call.context, call.param(0), &description, config, if_version).await?;
    Ok(empty())
}

/// `POST /1.0/projects/{name}`: rename; Incus answers with an operation.
///
/// # Errors
/// Those of the engine.
pub async fn rename(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let new = f.need_text("name")?;
    f.finish(&[])?;
    call.engine().project_rename(&call.context, call.param(0), &new).await?;
    let path = format!("/1.0/projects/{}", wire::segment(&new));
    let operations = &call.engine().inner().operations;
    let live =
        operations.begin(&call.context, NewOperation::task("Renaming project", None, "projects", path));
    operations.end(&live, Ok(Default::default()));
    crate::app::running(&live)
}

/// `DELETE /1.0/projects/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    call.engine().project_delete(&call.context, call.param(0)).await?;
    Ok(empty())
}
