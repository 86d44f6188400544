//! Secrets that users keep here for others to fetch: a passphrase of a volume, a key of Ceph, a password of an iSCSI target.
//! What is secret of one is sealed; the record says only what it is for.

use crate::{Error, ProjectId, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use uuid::Uuid;

/// Most bytes of a value.
pub const VALUE_MAX: usize = 64 << 10;
/// Most secrets of a project.
pub const SECRETS_MAX: usize = 1024;
/// Most bytes of a description, and of what a secret is used with.
pub const TEXT_MAX: usize = 1024;

/// What a secret is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretUse {
    /// Nothing in particular: it is found by its UUID alone.
    None,
    /// Opens an encrypted volume.
    Volume,
    /// A key of Ceph.
    Ceph,
    /// The password of an iSCSI target.
    Iscsi,
    /// The passphrase of a private key for TLS.
    Tls,
    /// Opens the state of a virtual TPM.
    Vtpm,
}

impl SecretUse {
    /// All of them.
    pub const ALL: &[SecretUse] = &[Self::None, Self::Volume, Self::Ceph, Self::Iscsi, Self::Tls, Self::Vtpm];

    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Volume => "volume",
            Self::Ceph => "ceph",
            Self::Iscsi => "iscsi",
            Self::Tls => "tls",
            Self::Vtpm => "vtpm",
        }
    }
}

/// A sealed value, base64. It says nothing without the key, and is not shown all the same.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sealed(pub String);

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealed(..)")
    }
}

/// A secret, without its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret {
    /// Chosen by who defined it; unique in the project.
    pub uuid: Uuid,
    /// Project.
    pub project: ProjectId,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// What it is for.
    pub kind: SecretUse,
    /// With what it is used: a path, a name. Unique in the project among those of its kind; empty for none.
    #[serde(default)]
    pub usage: String,
    /// Its value never leaves.
    pub private: bool,
    /// It is kept in memory only; such records are never written.
    pub ephemeral: bool,
    /// The value, once it was set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<Sealed>,
    /// Grows with each change.
    pub spec_version: u64,
}

fn text(field: &str, text: &str) -> Result<()> {
    if text.len() > TEXT_MAX {
        return Err(Error::invalid(field, format!("has {} bytes; at most {TEXT_MAX} are taken", text.len())));
    }
    if let Some(c) = text.chars().find(|c| c.is_control() && !(field == "description" && *c == '\n')) {
        return Err(Error::invalid(field, format!("holds the control character {:#x}", u32::from(c))));
    }
    Ok(())
}

impl Secret {
    /// Checks what a user says of it.
    ///
    /// # Errors
    /// Invalid, at `description` or `usage`.
    pub fn check(&self) -> Result<()> {
        text("description", &self.description)?;
        text("usage", &self.usage)?;
        match (self.kind, self.usage.is_empty()) {
            (SecretUse::None, false) => {
                Err(Error::invalid("usage", "is given although the secret is for nothing in particular"))
            }
            (SecretUse::None, true) | (_, false) => Ok(()),
            (kind, true) => Err(Error::invalid(
                "usage",
                format!("is missing: say with what the secret of type {:?} is used", kind.as_str()),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_secret_is_checked() {
        let good = Secret {
            uuid: Uuid::from_u128(1),
            project: ProjectId(Uuid::from_u128(2)),
            description: "two\nlines".into(),
            kind: SecretUse::Ceph,
            usage: "client.admin secret".into(),
            private: false,
            ephemeral: false,
            sealed: Some(Sealed("c2VjcmV0".into())),
            spec_version: 1,
        };
        good.check().unwrap();
        assert!(!format!("{good:?}").contains("c2VjcmV0"));
        type Change = fn(&mut Secret);
        let bad: [(Change, &str); 5] = [
            (|s| s.usage = String::new(), "usage"),
            (|s| s.usage = "a\nb".into(), "usage"),
            (|s| s.usage = "x".repeat(TEXT_MAX + 1), "usage"),
            (|s| s.kind = SecretUse::None, "usage"),
            (|s| s.description = "\u{7}".into(), "description"),
        ];
        for (change, field) in bad {
            let mut secret = good.clone();
            change(&mut secret);
            let e = secret.check().unwrap_err();
            assert_eq!(e.field.as_deref(), Some(field), "{e}");
        }
    }
}
