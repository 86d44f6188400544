//! Secrets of the connection's project. The read-only socket lists and describes them; values are for who may change them.

use super::{Answered, int, listed, names as some_names, nothing, text};
use crate::{
    error::{Code, Part, VirError},
    session::Call,
    xdr::{Reader, Writer},
    xml::secret::{kind, number, read, write},
};
use karst_engine::secrets::SecretValue;
use karst_model::{
    Error, ErrorKind,
    secret::{Secret, VALUE_MAX},
};
use uuid::Uuid;

/// `VIR_CONNECT_LIST_SECRETS_EPHEMERAL` and its like.
const EPHEMERAL: u32 = 1;
const WRITTEN: u32 = 2;
const PRIVATE: u32 = 4;
const OPEN: u32 = 8;

fn failed(e: Error) -> VirError {
    let code = match (e.kind, e.field.as_deref()) {
        (ErrorKind::NotFound, _) => Code::NoSecret,
        (ErrorKind::Forbidden, Some("private")) => Code::InvalidSecret,
        _ => return VirError { part: Part::Secret, ..e.into() },
    };
    VirError::new(code, Part::Secret, e.message)
}

fn all(call: &Call) -> Result<Vec<Secret>, VirError> {
    let session = &call.session;
    session.front.engine.secrets(&session.context, &session.opened()?.project).map_err(failed)
}

fn find(call: &Call, uuid: Uuid) -> Result<Secret, VirError> {
    let session = &call.session;
    session.front.engine.secret(&session.context, &session.opened()?.project, uuid).map_err(failed)
}

/// Writes `remote_nonnull_secret`.
fn write_secret(w: &mut Writer, secret: &Secret) {
    w.uuid(secret.uuid).i32(number(secret.kind)).string(&secret.usage);
}

/// A secret as clients name it: by its UUID, whatever it is used with now.
pub(super) fn named(r: &mut Reader<'_>) -> Result<Uuid, VirError> {
    let uuid = r.uuid()?;
    r.i32()?;
    r.string()?;
    Ok(uuid)
}

fn one(secret: &Secret) -> Answered {
    let mut w = Writer::new();
    write_secret(&mut w, secret);
    Ok(w.finish().into())
}

/// `CONNECT_NUM_OF_SECRETS`
pub async fn count(call: Call) -> Answered {
    Ok(int(all(&call)?.len() as i32))
}

/// `CONNECT_LIST_SECRETS`: their UUIDs.
pub async fn uuids(call: Call) -> Answered {
    let max = call.arguments(|r| r.i32())?;
    let all: Vec<String> = all(&call)?.iter().map(|s| s.uuid.to_string()).collect();
    some_names(all.iter().map(String::as_str), max)
}

/// `CONNECT_LIST_ALL_SECRETS`
pub async fn list(call: Call) -> Answered {
    let (need_results, flags) = call.arguments(|r| Ok((r.i32()?, r.u32()?)))?;
    call.known_flags(flags, EPHEMERAL | WRITTEN | PRIVATE | OPEN)?;
    // Of a pair neither or both mean all.
    let wanted =
        |is: bool, yes: u32, no: u32| flags & (yes | no) == 0 || flags & (if is { yes } else { no }) != 0;
    let mut found = all(&call)?;
    found.retain(|s| wanted(s.ephemeral, EPHEMERAL, WRITTEN) && wanted(s.private, PRIVATE, OPEN));
    listed(found, need_results, |w, s| write_secret(w, &s))
}

/// `SECRET_LOOKUP_BY_UUID`
pub async fn by_uuid(call: Call) -> Answered {
    one(&find(&call, call.arguments(|r| r.uuid())?)?)
}

/// `SECRET_LOOKUP_BY_USAGE`
pub async fn by_usage(call: Call) -> Answered {
    let (number, usage) = call.arguments(|r| Ok((r.i32()?, r.string()?)))?;
    let kind = kind(number)
        .ok_or_else(|| VirError::argument(format!("unknown type of usage of secrets: {number}")))?;
    let session = &call.session;
    let (engine, project) = (&session.front.engine, &session.opened()?.project);
    one(&engine.secret_by_use(&session.context, project, kind, &usage).map_err(failed)?)
}

/// `SECRET_DEFINE_XML`
pub async fn define(call: Call) -> Answered {
    let (xml, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    // Checked against the schema.
    call.known_flags(flags, 1)?;
    let new = read(&xml)?;
    let session = &call.session;
    let (engine, project) = (&session.front.engine, &session.opened()?.project);
    one(&engine.secret_define(&session.context, project, new).await.map_err(failed)?)
}

/// `SECRET_GET_XML_DESC`
pub async fn xml(call: Call) -> Answered {
    let (uuid, flags) = call.arguments(|r| Ok((named(r)?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    Ok(text(&write(&find(&call, uuid)?)))
}

/// `SECRET_SET_VALUE`
pub async fn set_value(call: Call) -> Answered {
    let (uuid, value, flags) =
        call.arguments(|r| Ok((named(r)?, r.opaque(VALUE_MAX)?.to_vec(), r.u32()?)))?;
    let value = SecretValue::new(value).map_err(failed)?;
    call.known_flags(flags, 0)?;
    let session = &call.session;
    let (engine, project) = (&session.front.engine, &session.opened()?.project);
    engine.secret_set_value(&session.context, project, uuid, value).await.map_err(failed)?;
    Ok(nothing())
}

/// `SECRET_GET_VALUE`
pub async fn value(call: Call) -> Answered {
    let (uuid, flags) = call.arguments(|r| Ok((named(r)?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let session = &call.session;
    let (engine, project) = (&session.front.engine, &session.opened()?.project);
    let value = engine.secret_value(&session.context, project, uuid).map_err(failed)?;
    let mut w = Writer::new();
    w.opaque(value.bytes());
    Ok(w.finish().into())
}

/// `SECRET_UNDEFINE`
pub async fn undefine(call: Call) -> Answered {
    let uuid = call.arguments(named)?;
    let session = &call.session;
    let (engine, project) = (&session.front.engine, &session.opened()?.project);
    engine.secret_undefine(&session.context, project, uuid).await.map_err(failed)?;
    Ok(nothing())
}
