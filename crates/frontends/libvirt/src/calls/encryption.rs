//! Secrets that documents name by what they are used with, found among those of the connection's project. What is kept names them by
//! their UUID, which stays theirs.

use crate::{
    error::{Code, Part, VirError},
    session::Call,
    xml::{encryption, read},
};
use karst_model::{Error, ErrorKind, encryption::SECRET, secret::SecretUse};
use std::borrow::Cow;

/// A document with all secrets of its encryptions named by their UUIDs.
///
/// # Errors
/// NO_SECRET, naming what it is used with, where there is none.
pub(super) fn by_uuid<'a>(call: &Call, text: &'a str) -> Result<Cow<'a, str>, VirError> {
    // Most have none; those need not be read twice.
    if !text.contains("<encryption") || !text.contains("usage") {
        return Ok(Cow::Borrowed(text));
    }
    let mut document = read::document(text)?;
    let session = &call.session;
    let project = &session.opened()?.project;
    let mut find = |usage: &str| {
        let found = session.front.engine.secret_by_use(&session.context, project, SecretUse::Volume, usage);
        found.map(|secret| secret.uuid).map_err(|e| match e.kind {
            ErrorKind::NotFound => VirError::new(Code::NoSecret, Part::Secret, e.message),
            _ => e.into(),
        })
    };
    Ok(match encryption::by_uuid(&mut document, &mut find)? {
        true => Cow::Owned(document.document()),
        false => Cow::Borrowed(text),
    })
}

/// What the engine says of a volume that is to be encrypted, by libvirt's numbers.
pub(super) fn refused(e: Error) -> VirError {
    let of_secret = e.field.as_deref() == Some(format!("config.{SECRET}").as_str());
    match e.kind {
        ErrorKind::NotFound if of_secret => VirError::new(Code::NoSecret, Part::Secret, e.message),
        _ => e.into(),
    }
}
