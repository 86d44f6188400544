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

/// `GET /1.0/karst/storage-pools/{name}`: what Incus does not tell of a pool. `active`: its hosts have it open; `autostart`: it begins
/// with them; `persistent`: its record outlives its stop; `built`: something of it is on its hosts. `file_system` says of an active
/// pool in a directory what the file system there can, as its host has tried: `owners`, `mapped`, `layers`, `limits`, `clones`,
/// `links`, `holes`, `direct`, `attributes`; `null` of other pools.
///
/// # Errors
/// Those of the engine.
pub async fn life(call: Call) -> Result<Reply> {
    let life = call.engine().pool(&call.context, call.param(0))?.life;
    let found = match life.stopped {
        true => None,
        false => call.engine().pool_abilities(&call.context, call.param(0)).await?,
    };
    sync(&serde_json::json!({
        "active": !life.stopped, "autostart": !life.manual, "persistent": !life.transient,
        "built": !life.unbuilt, "file_system": found,
    }))
}

/// `PUT /1.0/karst/storage-pools/{name}`: starts or stops it by `active`, and says by `autostart` whether it begins with its hosts;
/// what is not named stays.
///
/// # Errors
/// Those of the engine; conflict when it is as it is wanted already.
pub async fn change_life(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let (has_active, has_autostart) = (f.has("active"), f.has("autostart"));
    let (active, autostart) = (f.flag("active")?, f.flag("autostart")?);
    f.finish(&["persistent", "built", "file_system"])?;
    let (engine, name) = (call.engine(), call.param(0));
    if has_autostart {
        engine.pool_set_autostart(&call.context, name, autostart).await?;
    }
    match (has_active, active) {
        (true, true) => engine.pool_start(&call.context, name).await?,
        (true, false) => engine.pool_stop(&call.context, name).await?,
        (false, _) => {}
    }
    Ok(empty())
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
