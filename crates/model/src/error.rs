//! One neutral error for all layers: a kind that each front end maps onto its protocol, a public text for the user, and
//! a private context that never reaches a client.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Result with Karst's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The class of an error; decides the HTTP status, the libvirt code or the Proxmox answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The named thing does not exist, or the caller may not know that it does.
    NotFound,
    /// The name is taken, the state forbids it now, or somebody else holds the object.
    Conflict,
    /// The request is malformed; `field` says where.
    Invalid,
    /// If-Match did not match: the object changed since it was read.
    PreconditionFailed,
    /// The caller is not known.
    Unauthenticated,
    /// The caller is known and may not do this.
    Forbidden,
    /// A limit of the project, or the space of a pool, is used up.
    Quota,
    /// The request is larger than what is accepted.
    TooLarge,
    /// Well-formed, but not possible with this kind of object or on this host.
    Unsupported,
    /// A part that is needed (agent, store, guest agent) does not answer now; trying again may help.
    Unavailable,
    /// The deadline passed.
    Timeout,
    /// The user or a shutdown cancelled it.
    Cancelled,
    /// A defect or an unexpected failure of the machine.
    Internal,
}

/// What is not there, where clients decide by that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Missing {
    /// A network.
    Network,
    /// A storage pool.
    Pool,
    /// A volume of a pool.
    Volume,
}

/// An error with a public text, optionally the field at fault, and private context for the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// Class of the error.
    pub kind: ErrorKind,
    /// What the user reads: one line, names the fix where there is one.
    pub message: String,
    /// The field at fault in the user's vocabulary, such as `config.limits.memory`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// For the log only (argv, exit code, stderr, source chain). It stays on this machine's logs: front ends drop it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// Of [`ErrorKind::NotFound`]: what kind of thing, where that is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing: Option<Missing>,
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident),+ $(,)?) => {
        impl Error { $( $(#[$doc])* pub fn $name(message: impl Into<String>) -> Self { Self::new(ErrorKind::$kind, message) } )+ }
    };
}

constructors! {
    /// [`ErrorKind::NotFound`].
    not_found => NotFound,
    /// [`ErrorKind::Conflict`].
    conflict => Conflict,
    /// [`ErrorKind::Forbidden`].
    forbidden => Forbidden,
    /// [`ErrorKind::Unauthenticated`].
    unauthenticated => Unauthenticated,
    /// [`ErrorKind::PreconditionFailed`].
    precondition_failed => PreconditionFailed,
    /// [`ErrorKind::Quota`].
    quota => Quota,
    /// [`ErrorKind::TooLarge`].
    too_large => TooLarge,
    /// [`ErrorKind::Unsupported`].
    unsupported => Unsupported,
    /// [`ErrorKind::Unavailable`].
    unavailable => Unavailable,
    /// [`ErrorKind::Timeout`].
    timeout => Timeout,
    /// [`ErrorKind::Cancelled`].
    cancelled => Cancelled,
}

impl Error {
    /// An error of `kind` with its public text.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), field: None, context: None, missing: None }
    }

    /// [`ErrorKind::NotFound`] of a kind of things.
    pub fn missing(what: Missing, message: impl Into<String>) -> Self {
        Self { missing: Some(what), ..Self::new(ErrorKind::NotFound, message) }
    }

    /// [`ErrorKind::Invalid`] at `field`.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: Some(field.into()), ..Self::new(ErrorKind::Invalid, message) }
    }

    /// [`ErrorKind::Internal`]: `what` failed (public), `context` says how (private).
    pub fn internal(what: impl Into<String>, context: impl fmt::Display) -> Self {
        Self { context: Some(context.to_string()), ..Self::new(ErrorKind::Internal, what) }
    }

    /// Adds private context in front of what is there.
    pub fn with_context(mut self, context: impl fmt::Display) -> Self {
        self.context = Some(match self.context.take() {
            Some(inner) => format!("{context}: {inner}"),
            None => context.to_string(),
        });
        self
    }

    /// Names the field at fault.
    pub fn at(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// All of several failures as one, of the first one's kind; `Ok` when there are none.
    ///
    /// # Errors
    /// When there is one.
    pub fn together(all: Vec<Error>) -> Result<()> {
        let Some(kind) = all.first().map(|e| e.kind) else { return Ok(()) };
        let messages: Vec<_> = all.iter().map(Error::to_string).collect();
        let contexts: Vec<_> = all.into_iter().filter_map(|e| e.context).collect();
        let context = (!contexts.is_empty()).then(|| contexts.join("; "));
        Err(Self { context, ..Self::new(kind, messages.join("; ")) })
    }

    /// Is it of this kind?
    pub fn is(&self, kind: ErrorKind) -> bool {
        self.kind == kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.field {
            Some(field) if !self.message.contains(field.as_str()) => write!(f, "{field}: {}", self.message),
            _ => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        match e.kind() {
            Io::StorageFull | Io::QuotaExceeded => {
                Error::quota("no space left on the device").with_context(e)
            }
            Io::FileTooLarge => Error::quota("a file would be larger than it may be").with_context(e),
            Io::TimedOut => Error::timeout("timed out").with_context(e),
            _ => Error::internal("an operation of the system failed", e),
        }
    }
}

impl From<serde_json::Error> for Error {
    fn from(e: serde_json::Error) -> Self {
        Error::internal("a record could not be encoded or decoded", e)
    }
}

/// The nearest of `candidates` to `wrong`, when it is near enough to be what was meant.
pub fn nearest<'a>(wrong: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (strsim::damerau_levenshtein(wrong, c), c))
        .filter(|(d, c)| *d <= (wrong.len().max(c.len()) / 3).max(1))
        .min_by_key(|(d, _)| *d)
        .map(|(_, c)| c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_offers_only_what_is_near() {
        let keys = ["limits.memory", "limits.cpu", "security.nesting"];
        assert_eq!(nearest("limits.memry", keys), Some("limits.memory"));
        assert_eq!(nearest("frobnicate", keys), None);
    }

    #[test]
    fn several_failures_are_told_as_one() {
        Error::together(vec![]).unwrap();
        let all = vec![Error::conflict("in use").with_context("argv"), Error::timeout("slow").at("pool")];
        let one = Error::together(all).unwrap_err();
        assert!(one.is(ErrorKind::Conflict));
        assert_eq!((one.message.as_str(), one.context.as_deref()), ("in use; pool: slow", Some("argv")));
    }

    #[test]
    fn display_names_the_field_once() {
        assert_eq!(Error::invalid("config.x", "must be a number").to_string(), "config.x: must be a number");
        assert_eq!(Error::invalid("name", "name is empty").to_string(), "name is empty");
    }
}
