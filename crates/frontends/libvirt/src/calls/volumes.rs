//! Making, copying, growing and deleting volumes. A volume that an instance owns is changed by the instance.

use super::{
    Answered, Named, encryption, nothing,
    power::ended,
    storage::{Found, VolumeName, by_path, demand_active, find_uuid, volume, volumes_of},
};
use crate::{
    error::{Code, Part, VirError},
    session::Call,
    xml::{
        self,
        storage::{FORMAT, NewVolume, QCOW2},
    },
};
use karst_engine::volumes::{copy::CopyVolume, create::CreateVolume, update::UpdateVolume};
use karst_model::{
    Config,
    encryption::SECRET,
    storage::{Pool, VolumeOwner},
};

pub(super) fn failed(code: Code, text: impl Into<String>) -> VirError {
    VirError::new(code, Part::Storage, text)
}

/// One that a user made.
pub(super) fn own(found: &Found) -> Result<(), VirError> {
    match found.volume.owner {
        VolumeOwner::Custom => Ok(()),
        _ => {
            let text = format!("volume '{}' is a part of the domain of that name", found.name);
            Err(failed(Code::OperationInvalid, text))
        }
    }
}

fn made(call: &Call, pool: &Pool, name: &str) -> Answered {
    let found = volumes_of(call, pool)?.into_iter().find(|f| f.name == name);
    found
        .ok_or_else(|| failed(Code::NoStorageVol, format!("no storage vol with matching name '{name}'")))?
        .answer()
}

fn demand_free(call: &Call, pool: &Pool, name: &str) -> Result<(), VirError> {
    match volumes_of(call, pool)?.iter().any(|f| f.name == name) {
        false => Ok(()),
        true => Err(failed(Code::StorageVolExist, format!("'{name}'"))),
    }
}

/// What a document says of a new volume, as its keys.
fn config_of(new: &NewVolume, size: Option<u64>) -> Config {
    let size = size.map(|s| ("size".to_owned(), s.to_string()));
    let format = new.image.then(|| (FORMAT.to_owned(), QCOW2.to_owned()));
    let mut config: Config = size.into_iter().chain(format).collect();
    if let Some((secret, made)) = &new.encryption {
        config.extend(made.keys());
        config.insert(SECRET.into(), secret.to_string());
    }
    config
}

/// `STORAGE_VOL_CREATE_XML`: space is taken when it is written, whatever is said of allocation. One over another begins as a copy of it:
/// blocks are shared where the pool can, and what becomes of the other later changes nothing.
pub async fn create(call: Call) -> Answered {
    let (named, text, flags) = call.arguments(|r| Ok((Named::read(r)?, r.string()?, r.u32()?)))?;
    // With metadata allocated, by reference, checked against the schema.
    call.known_flags(flags, 1 | 2 | 4)?;
    let pool = find_uuid(&call, named.uuid)?;
    demand_active(&pool)?;
    let new = xml::storage::read_volume(&encryption::by_uuid(&call, &text)?)?;
    if let Some(path) = &new.backing {
        let from = by_path(&call, path)?;
        own(&from)?;
        return copy(&call, &pool, &from, &new).await;
    }
    let size = new.capacity.ok_or_else(|| failed(Code::XmlError, "missing capacity element"))?;
    demand_free(&call, &pool, &new.name)?;
    let request = CreateVolume {
        name: new.name.clone(),
        content: new.content,
        description: String::new(),
        config: config_of(&new, Some(size)),
    };
    let session = &call.session;
    let project = &session.opened()?.project;
    let begun = session.front.engine.volume_create(&session.context, project, &pool.name, request).await;
    ended(begun.map_err(encryption::refused)?).await?;
    made(&call, &pool, &new.name)
}

/// `STORAGE_VOL_CREATE_XML_FROM`: a copy, also of another pool's volume; blocks are shared where the pool can.
pub async fn create_from(call: Call) -> Answered {
    let (named, text, from, flags) =
        call.arguments(|r| Ok((Named::read(r)?, r.string()?, VolumeName::read(r)?, r.u32()?)))?;
    call.known_flags(flags, 1 | 2 | 4)?;
    let pool = find_uuid(&call, named.uuid)?;
    demand_active(&pool)?;
    let from = volume(&call, &from)?;
    own(&from)?;
    let new = xml::storage::read_volume(&encryption::by_uuid(&call, &text)?)?;
    copy(&call, &pool, &from, &new).await
}

async fn copy(call: &Call, pool: &Pool, from: &Found, new: &NewVolume) -> Answered {
    demand_free(call, pool, &new.name)?;
    // A smaller one is made as large as the original, as libvirt does.
    let size = new.capacity.filter(|c| from.volume.size.is_none_or(|s| *c > s.bytes()));
    let mut told = config_of(new, size);
    if !new.image {
        // Not the original's either.
        told.insert(FORMAT.to_owned(), String::new());
    }
    let request = CopyVolume {
        project: call.opened()?.project.clone(),
        pool: from.pool.clone(),
        name: from.name.clone(),
        snapshot: None,
        volume_only: true,
        refresh: false,
        exclude_older: false,
        copy: CreateVolume {
            name: new.name.clone(),
            content: from.volume.content,
            description: String::new(),
            config: told,
        },
    };
    let session = &call.session;
    let project = &session.opened()?.project;
    ended(session.front.engine.volume_copy(&session.context, project, &pool.name, request).await?).await?;
    made(call, pool, &new.name)
}

/// `STORAGE_VOL_DELETE`
pub async fn delete(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((VolumeName::read(r)?, r.u32()?)))?;
    // With its snapshots, with which it always goes.
    call.known_flags(flags, 2)?;
    let found = volume(&call, &named)?;
    own(&found)?;
    let session = &call.session;
    let project = &session.opened()?.project;
    let deleted =
        session.front.engine.volume_delete(&session.context, project, &found.pool, &found.name).await;
    ended(deleted?).await?;
    Ok(nothing())
}

/// `VIR_STORAGE_VOL_WIPE_ALG_*`: zeros, and given back.
const ZERO: u32 = 0;
const TRIM: u32 = 9;

async fn wipe_volume(call: &Call, named: &VolumeName, algorithm: u32, flags: u32) -> Answered {
    call.known_flags(flags, 0)?;
    if algorithm > TRIM {
        return Err(failed(Code::InvalidArg, format!("wiping algorithm {algorithm} not supported")));
    }
    if !matches!(algorithm, ZERO | TRIM) {
        let text =
            "a wiped volume reads as zeros, its space given back to the pool; patterns are not written";
        return Err(failed(Code::OperationUnsupported, text));
    }
    let found = volume(call, named)?;
    own(&found)?;
    let session = &call.session;
    let project = &session.opened()?.project;
    ended(session.front.engine.volume_wipe(&session.context, project, &found.pool, &found.name).await?)
        .await?;
    Ok(nothing())
}

/// `STORAGE_VOL_WIPE`
pub async fn wipe(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((VolumeName::read(r)?, r.u32()?)))?;
    wipe_volume(&call, &named, ZERO, flags).await
}

/// `STORAGE_VOL_WIPE_PATTERN`
pub async fn wipe_pattern(call: Call) -> Answered {
    let (named, algorithm, flags) = call.arguments(|r| Ok((VolumeName::read(r)?, r.u32()?, r.u32()?)))?;
    wipe_volume(&call, &named, algorithm, flags).await
}

/// `VIR_STORAGE_VOL_RESIZE_*`
const ALLOCATE: u32 = 1;
const DELTA: u32 = 2;
const SHRINK: u32 = 4;

/// `STORAGE_VOL_RESIZE`
pub async fn resize(call: Call) -> Answered {
    let (named, capacity, flags) = call.arguments(|r| Ok((VolumeName::read(r)?, r.u64()?, r.u32()?)))?;
    call.known_flags(flags, ALLOCATE | DELTA | SHRINK)?;
    let found = volume(&call, &named)?;
    own(&found)?;
    let now = found.volume.size.map_or(0, |s| s.bytes());
    let wanted = match (flags & DELTA != 0, flags & SHRINK != 0) {
        // As libvirt has it: by no more than there is.
        (true, true) => Some(now.saturating_sub(capacity)),
        (true, false) => now.checked_add(capacity),
        (false, _) => Some(capacity),
    };
    let wanted = wanted.ok_or_else(|| failed(Code::InvalidArg, "the capacity is out of range"))?;
    if wanted < now && flags & SHRINK == 0 {
        let text = "Can't shrink capacity below current capacity unless shrink flag explicitly specified";
        return Err(failed(Code::InvalidArg, text));
    }
    if wanted < now {
        return Err(failed(
            Code::OperationUnsupported,
            "volumes cannot shrink: what is beyond their end would be lost",
        ));
    }
    let mut config = found.volume.config.clone();
    config.insert("size".into(), wanted.to_string());
    let request = UpdateVolume {
        description: found.volume.description.clone(),
        config,
        if_version: Some(found.volume.spec_version),
    };
    let session = &call.session;
    let project = &session.opened()?.project;
    let updated = session
        .front
        .engine
        .volume_update(&session.context, project, &found.pool, &found.name, request)
        .await;
    ended(updated?).await?;
    Ok(nothing())
}
