//! Making and removing pools. A pool of Karst is active from the moment it is defined, on every start of the host, and holds
//! its volumes' space until it is deleted: what libvirt tells apart (defined, built, started) is one here.

use super::{
    Answered, Named, nothing,
    power::ended,
    storage::{find, find_uuid, one, pools},
    text,
};
use crate::{
    error::{Code, Part, VirError},
    session::Call,
    xml,
};
use karst_engine::{Row, storage::CreatePool};
use karst_model::{Config, storage::Pool};

fn failed(code: Code, text: impl Into<String>) -> VirError {
    VirError::new(code, Part::Storage, text)
}

/// `STORAGE_POOL_DEFINE_XML`
pub async fn define(call: Call) -> Answered {
    let (text, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    // Checked against the schema.
    call.known_flags(flags, 1)?;
    let new = xml::storage::read_pool(&text)?;
    if let Some(there) = pools(&call)?.into_iter().find(|p| *p.name == *new.name) {
        if new.uuid.is_some_and(|u| u != there.id.uuid()) || new.uuid.is_none() {
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
        return one(&there);
    }
    if new.uuid.is_some() {
        return Err(failed(
            Code::ConfigUnsupported,
            "uuid: that of a new pool is chosen by the host; leave it out",
        ));
    }
    let pairs = [
        new.source.map(|s| ("source".to_owned(), s)),
        new.size.map(|bytes| ("size".to_owned(), bytes.to_string())),
    ];
    let request = CreatePool {
        name: new.name.clone(),
        driver: new.driver,
        description: String::new(),
        config: pairs.into_iter().flatten().collect::<Config>(),
    };
    let session = &call.session;
    ended(session.front.engine.pool_create(&session.context, request).await?).await?;
    one(&*find(&call, &new.name)?)
}

/// `STORAGE_POOL_CREATE_XML`: there are no transient ones.
pub async fn create_xml(call: Call) -> Answered {
    call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    Err(failed(Code::OperationUnsupported, "pools are persistent here; define one"))
}

fn with_flags(call: &Call, known: u32) -> Result<Row<Pool>, VirError> {
    let (named, flags) = call.arguments(|r| Ok((Named::read(r)?, r.u32()?)))?;
    call.known_flags(flags, known)?;
    find_uuid(call, named.uuid)
}

/// `STORAGE_POOL_BUILD`: it is, since it was defined.
pub async fn build(call: Call) -> Answered {
    // Not over what is there: never done.
    with_flags(&call, 1 | 4)?;
    Ok(nothing())
}

/// `STORAGE_POOL_CREATE`: it is active already, which is what is asked for.
pub async fn create(call: Call) -> Answered {
    with_flags(&call, 1 | 4)?;
    Ok(nothing())
}

/// `STORAGE_POOL_REFRESH`: nothing here is read once and kept.
pub async fn refresh(call: Call) -> Answered {
    let pool = with_flags(&call, 0)?;
    // Nobody may listen.
    let _ = call.session.front.refreshed.send(pool.id.uuid());
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

/// `CONNECT_FIND_STORAGE_POOL_SOURCES`: no kind of pool is looked for on the host or elsewhere.
pub async fn find_sources(call: Call) -> Answered {
    let (kind, _, flags) = call.arguments(|r| Ok((r.string()?, r.option(|r| r.string())?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    Err(match xml::storage::is_kind(&kind) {
        true => failed(Code::NoSupport, format!("pool type '{kind}' does not support source discovery")),
        false => failed(Code::InternalError, format!("unknown storage pool type {kind}")),
    })
}

/// `STORAGE_POOL_DESTROY`
pub async fn destroy(call: Call) -> Answered {
    find_uuid(&call, call.arguments(Named::read)?.uuid)?;
    Err(failed(Code::OperationUnsupported, "pools are always active here; delete removes one that is empty"))
}

/// `STORAGE_POOL_DELETE`: with its record, for a pool without space is none.
pub async fn delete(call: Call) -> Answered {
    let pool = with_flags(&call, 0)?;
    let session = &call.session;
    ended(session.front.engine.pool_delete(&session.context, &pool.name).await?).await?;
    Ok(nothing())
}

/// `STORAGE_POOL_UNDEFINE`
pub async fn undefine(call: Call) -> Answered {
    let pool = find_uuid(&call, call.arguments(Named::read)?.uuid)?;
    let text = format!("storage pool '{}' is still active; delete removes one that is empty", &*pool.name);
    Err(failed(Code::OperationInvalid, text))
}

/// `STORAGE_POOL_SET_AUTOSTART`
pub async fn set_autostart(call: Call) -> Answered {
    let (named, wanted) = call.arguments(|r| Ok((Named::read(r)?, r.i32()?)))?;
    find_uuid(&call, named.uuid)?;
    match wanted {
        0 => Err(failed(Code::OperationUnsupported, "pools begin with their host")),
        _ => Ok(nothing()),
    }
}
