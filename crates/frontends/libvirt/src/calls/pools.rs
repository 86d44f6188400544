//! Making, starting, stopping and removing pools. What is in a pool is made with it or found in it when it starts; it stays when its
//! definition goes, until the pool is deleted.

use super::{
    Answered, Named, nothing,
    power::ended,
    storage::{demand_active, find, find_uuid, one, pools},
    text,
};
use crate::{
    error::{Code, Part, VirError},
    session::Call,
    xml::{self, storage::NewPool},
};
use karst_engine::{Row, storage::CreatePool};
use karst_model::{
    Config, PoolId,
    pool_life::PoolChange,
    storage::{Pool, PoolKind},
};

fn failed(code: Code, text: impl Into<String>) -> VirError {
    VirError::new(code, Part::Storage, text)
}

fn still_active(pool: &Pool) -> VirError {
    failed(Code::OperationInvalid, format!("storage pool '{}' is still active", &*pool.name))
}

fn already_active(pool: &Pool) -> VirError {
    failed(Code::OperationInvalid, format!("storage pool '{}' is already active", &*pool.name))
}

/// The pool that a document is of, where there is one.
fn there(call: &Call, new: &NewPool) -> Result<Option<Row<Pool>>, VirError> {
    let all = pools(call)?;
    if let Some(other) = all.iter().find(|p| new.uuid == Some(p.id.uuid()) && *p.name != *new.name) {
        let text = format!("pool '{}' is already defined with uuid {}", &*other.name, other.id);
        return Err(failed(Code::OperationFailed, text));
    }
    let Some(there) = all.into_iter().find(|p| *p.name == *new.name) else { return Ok(None) };
    if new.uuid != Some(there.id.uuid()) {
        let text = format!("pool '{}' already exists with uuid {}", new.name, there.id);
        return Err(failed(Code::OperationFailed, text));
    }
    // What a pool is made of is decided when it is made: its own document changes nothing.
    // What is not told is not asked for either.
    let another = new.source.as_ref().is_some_and(|s| there.config.get("source") != Some(s));
    if there.kind.as_str() != new.driver || another {
        let text = "source: what a pool is made of is fixed since it was made";
        return Err(failed(Code::ConfigUnsupported, text));
    }
    Ok(Some(there))
}

/// Records a new pool that is not active.
async fn record(call: &Call, new: NewPool, transient: bool) -> Result<Row<Pool>, VirError> {
    let pairs = [
        new.source.map(|s| ("source".to_owned(), s)),
        new.size.map(|bytes| ("size".to_owned(), bytes.to_string())),
    ];
    let request = CreatePool {
        name: new.name.clone(),
        driver: new.driver,
        description: String::new(),
        config: pairs.into_iter().flatten().collect::<Config>(),
        id: new.uuid.map(PoolId),
        transient,
    };
    let session = &call.session;
    session.front.engine.pool_define(&session.context, request).await?;
    find(call, &new.name)
}

/// `STORAGE_POOL_DEFINE_XML`
pub async fn define(call: Call) -> Answered {
    let (text, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    // Checked against the schema.
    call.known_flags(flags, 1)?;
    let new = xml::storage::read_pool(&text)?;
    match there(&call, &new)? {
        Some(there) => one(&there),
        None => one(&*record(&call, new, false).await?),
    }
}

/// `VIR_STORAGE_POOL_CREATE_WITH_BUILD`, with what comes of what is there: nothing of it is written over.
const WITH_BUILD: u32 = 1;
const NO_OVERWRITE: u32 = 4;

/// `STORAGE_POOL_CREATE_XML`: a transient pool; one that is defined is started by its own document.
pub async fn create_xml(call: Call) -> Answered {
    let (text, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    call.known_flags(flags, WITH_BUILD | NO_OVERWRITE)?;
    let new = xml::storage::read_pool(&text)?;
    let there = there(&call, &new)?;
    if let Some(active) = there.as_ref().filter(|p| !p.life.stopped) {
        let text = format!("pool is already active as '{}'", &*active.name);
        return Err(failed(Code::OperationInvalid, text));
    }
    let (pool, defined) = match there {
        Some(there) => (there, true),
        None => (record(&call, new, true).await?, false),
    };
    let started = start(&call, &pool, flags).await;
    if started.is_err() && !defined {
        let session = &call.session;
        // The error of the start is what is told; what is left of the record ends with the next start of the daemon.
        if let Err(error) = session.front.engine.pool_forget(&session.context, &pool.name).await {
            tracing::warn!(name = %pool.name, %error, "the record of a storage pool that does not start stays");
        }
    }
    started?;
    one(&*find(&call, &pool.name)?)
}

fn with_flags(call: &Call, known: u32) -> Result<(Row<Pool>, u32), VirError> {
    let (named, flags) = call.arguments(|r| Ok((Named::read(r)?, r.u32()?)))?;
    call.known_flags(flags, known)?;
    Ok((find_uuid(call, named.uuid)?, flags))
}

async fn change(call: &Call, pool: &Pool, change: PoolChange) -> Result<(), VirError> {
    let session = &call.session;
    ended(session.front.engine.pool_change(&session.context, &pool.name, change).await?).await
}

/// `STORAGE_POOL_BUILD`
pub async fn build(call: Call) -> Answered {
    // Not over what is there: never done.
    let (pool, _) = with_flags(&call, 1 | 4)?;
    if !pool.life.stopped {
        return Err(already_active(&pool));
    }
    // As a directory that is there.
    if pool.life.unbuilt {
        change(&call, &pool, PoolChange::Build).await?;
    }
    Ok(nothing())
}

/// A pool on a device is not made by its start: what is on the device may be another's.
async fn start(call: &Call, pool: &Pool, flags: u32) -> Result<(), VirError> {
    let device =
        pool.kind != PoolKind::Dir && pool.config.get("source").is_some_and(|source| source.starts_with('/'));
    if pool.life.unbuilt && device && flags & WITH_BUILD == 0 {
        let text = format!("storage pool '{}' is not built; build it first, or with its start", &*pool.name);
        return Err(failed(Code::OperationInvalid, text));
    }
    let session = &call.session;
    Ok(session.front.engine.pool_start(&session.context, &pool.name).await?)
}

/// `STORAGE_POOL_CREATE`
pub async fn create(call: Call) -> Answered {
    let (pool, flags) = with_flags(&call, WITH_BUILD | NO_OVERWRITE)?;
    if !pool.life.stopped {
        return Err(already_active(&pool));
    }
    start(&call, &pool, flags).await?;
    Ok(nothing())
}

/// `STORAGE_POOL_REFRESH`
pub async fn refresh(call: Call) -> Answered {
    let (pool, _) = with_flags(&call, 0)?;
    demand_active(&pool)?;
    let session = &call.session;
    session.front.engine.pool_refresh(&session.context, &pool.name).await?;
    // Nobody may listen.
    let _ = session.front.refreshed.send(pool.id.uuid());
    Ok(nothing())
}

/// `CONNECT_GET_STORAGE_POOL_CAPABILITIES`
pub async fn capabilities(call: Call) -> Answered {
    let flags = call.arguments(|r| r.u32())?;
    call.known_flags(flags, 0)?;
    call.opened()?;
    let facts = super::connect::facts(&call)?;
    let kinds: Vec<_> = facts.storage_kinds().map(|d| d.kind).collect();
    Ok(text(&xml::storage::capabilities(&kinds)))
}

/// `CONNECT_FIND_STORAGE_POOL_SOURCES`: volume groups and zpools that the host's policy grants. Servers elsewhere are not asked.
pub async fn find_sources(call: Call) -> Answered {
    let (kind, _, flags) = call.arguments(|r| Ok((r.string()?, r.option(|r| r.string())?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    call.opened()?;
    match xml::storage::kind_of(&kind) {
        Some(of @ (PoolKind::Lvm | PoolKind::Zfs)) => {
            let session = &call.session;
            let found = session.front.engine.pool_sources(&session.context, of).await?;
            Ok(text(&xml::storage::sources(of, &found)))
        }
        _ if xml::storage::is_kind(&kind) => {
            let text = format!("pool type '{kind}' does not support source discovery");
            Err(failed(Code::NoSupport, text))
        }
        _ => Err(failed(Code::InternalError, format!("unknown storage pool type {kind}"))),
    }
}

/// `STORAGE_POOL_DESTROY`
pub async fn destroy(call: Call) -> Answered {
    let pool = find_uuid(&call, call.arguments(Named::read)?.uuid)?;
    demand_active(&pool)?;
    let session = &call.session;
    session.front.engine.pool_stop(&session.context, &pool.name).await?;
    Ok(nothing())
}

/// `STORAGE_POOL_DELETE`: what is on the host for it; its definition stays.
pub async fn delete(call: Call) -> Answered {
    let (pool, _) = with_flags(&call, 0)?;
    if !pool.life.stopped {
        return Err(still_active(&pool));
    }
    change(&call, &pool, PoolChange::Clear).await?;
    Ok(nothing())
}

/// `STORAGE_POOL_UNDEFINE`: what is in it stays on the host.
pub async fn undefine(call: Call) -> Answered {
    let pool = find_uuid(&call, call.arguments(Named::read)?.uuid)?;
    if !pool.life.stopped {
        return Err(still_active(&pool));
    }
    let session = &call.session;
    session.front.engine.pool_forget(&session.context, &pool.name).await?;
    Ok(nothing())
}

/// `STORAGE_POOL_SET_AUTOSTART`
pub async fn set_autostart(call: Call) -> Answered {
    let (named, wanted) = call.arguments(|r| Ok((Named::read(r)?, r.i32()?)))?;
    let pool = find_uuid(&call, named.uuid)?;
    if pool.life.transient {
        return Err(failed(Code::InvalidArg, "pool has no config file"));
    }
    let session = &call.session;
    session.front.engine.pool_set_autostart(&session.context, &pool.name, wanted != 0).await?;
    Ok(nothing())
}
