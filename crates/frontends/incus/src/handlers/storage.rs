//! `/1.0/storage-pools`; their volumes are in [`super::volumes`].

use super::list as respond_list;
use crate::{
    app::{Call, finished},
    filter::Filter,
    respond::{Etag, Reply, created, empty, sync, sync_etag},
    wire::{
        self,
        misc::{PoolResources, PoolView, UsedTotal},
    },
};
use karst_engine::storage::{CreatePool, UpdatePool};
use karst_model::{Result, access::Permission};

const VIEW: &str = "storage-pool";

/// Who may not inspect the server sees that a pool is there, not how it is made.
fn shown<'a>(call: &Call, view: PoolView<'a>) -> PoolView<'a> {
    static NOTHING: karst_model::Config = karst_model::Config::new();
    match call.context.principal().may(Permission::ServerInspect, None) {
        true => view,
        false => PoolView { config: &NOTHING, ..view },
    }
}

/// `GET /1.0/storage-pools`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let all = call.engine().pools(&call.context)?;
    respond_list(
        recursion,
        &filter,
        all.iter().map(|p| {
            let path = format!("/1.0/storage-pools/{}", wire::segment(&p.name));
            (shown(&call, PoolView::of(p, call.engine().pool_used_by(&call.context, p))), path)
        }),
    )
}

/// `GET /1.0/storage-pools/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let pool = call.engine().pool(&call.context, call.param(0))?;
    let view = shown(&call, PoolView::of(&pool, call.engine().pool_used_by(&call.context, &pool)));
    sync_etag(&view, &Etag::of(VIEW, pool.id.uuid(), pool.spec_version))
}

/// `GET /1.0/storage-pools/{name}/resources`
///
/// # Errors
/// Those of the engine.
pub async fn resources(call: Call) -> Result<Reply> {
    let usage = call.engine().pool_usage(&call.context, call.param(0)).await?;
    sync(&PoolResources {
        space: UsedTotal { used: usage.used, total: usage.total },
        inodes: UsedTotal { used: usage.inodes_used, total: usage.inodes_total },
    })
}

/// `GET /1.0/karst/storage-pools/{name}`: what Incus does not tell of a pool: `{"file_system"}` says of a pool in a directory what the
/// file system there can, as its host has tried: `owners`, `mapped`, `layers`, `limits`, `clones`, `links`, `holes`, `direct`,
/// `attributes`; `null` of other pools.
///
/// # Errors
/// Those of the engine.
pub async fn file_system(call: Call) -> Result<Reply> {
    let found = call.engine().pool_abilities(&call.context, call.param(0)).await?;
    sync(&serde_json::json!({ "file_system": found }))
}

/// `POST /1.0/storage-pools`
///
/// # Errors
/// Those of the engine.
pub async fn create(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let request = CreatePool {
        name: f.need_text("name")?,
        driver: f.need_text("driver")?,
        description: f.text("description")?.unwrap_or_default(),
        config: f.config("config")?.unwrap_or_default(),
        ..CreatePool::default()
    };
    f.finish(&[])?;
    let name = request.name.clone();
    let operation = call.engine().pool_create(&call.context, request).await?;
    finished(&operation).await?;
    created(&format!("/1.0/storage-pools/{}", wire::segment(&name)))
}

/// What a view of a pool has beside what can be changed.
const READ_ONLY: &[&str] = &["name", "driver", "used_by", "status", "locations"];

/// `PUT` and `PATCH /1.0/storage-pools/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn change(call: Call) -> Result<Reply> {
    let pool = call.engine().pool(&call.context, call.param(0))?;
    let if_version = call.expected(VIEW, pool.id.uuid(), pool.spec_version)?;
    let patch = call.request.method() == hyper::Method::PATCH;
    let (call, mut f) = call.fields().await?;
    let (description, config) = (f.text("description")?, f.config("config")?);
    f.finish(READ_ONLY)?;
    let mut request = UpdatePool {
        description: description.or(patch.then(|| pool.description.clone())).unwrap_or_default(),
        config: if patch { pool.config.clone() } else { Default::default() },
        if_version: if patch { if_version.or(Some(pool.spec_version)) } else { if_version },
    };
    request.config.extend(config.unwrap_or_default());
    if let Some(operation) = call.engine().pool_update(&call.context, call.param(0), request).await? {
        finished(&operation).await?;
    }
    Ok(empty())
}

/// `DELETE /1.0/storage-pools/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    let operation = call.engine().pool_delete(&call.context, call.param(0)).await?;
    finished(&operation).await?;
    Ok(empty())
}
