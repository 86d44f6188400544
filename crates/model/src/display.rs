//! Displays of virtual machines: what they speak, and their passwords: the secret that a viewer proves to know by the protocol's
//! own authentication. In clear it is on its way only; what is written is sealed.

use crate::{Error, InstanceId, Result, secret::Sealed};
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;

/// How a screen is spoken of between QEMU and a viewer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DisplayProtocol {
    /// RFB: one connection a viewer. Every display has it.
    Vnc,
    /// SPICE: a connection for each of a viewer's channels. Those that were made with it, where QEMU can do it.
    Spice,
}

impl DisplayProtocol {
    /// QEMU's and libvirt's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vnc => "vnc",
            Self::Spice => "spice",
        }
    }
}

/// Most bytes of a password: RFB's authentication takes no more into account.
pub const PASSWORD_MAX: usize = 8;

/// A password in clear. It is not shown, and overwritten when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct DisplayPassword(String);

impl DisplayPassword {
    /// Of its text; `field` is named in the error, which says nothing of the text.
    ///
    /// # Errors
    /// Invalid, when it is empty, longer than [`PASSWORD_MAX`], or holds what keyboards and viewers disagree about.
    pub fn parse(field: &str, text: String) -> Result<Self> {
        let password = Self(text);
        let text = password.text();
        if text.is_empty() {
            return Err(Error::invalid(
                field,
                "the password is empty: give 1 to 8 characters, or take it away",
            ));
        }
        if !text.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            return Err(Error::invalid(
                field,
                "the password may hold letters, digits and signs of ASCII only",
            ));
        }
        if text.len() > PASSWORD_MAX {
            return Err(Error::invalid(
                field,
                format!(
                    "the password has {} characters; VNC takes {PASSWORD_MAX} at most and ignores those behind them",
                    text.len()
                ),
            ));
        }
        Ok(password)
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for DisplayPassword {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DisplayPassword(..)")
    }
}

impl Drop for DisplayPassword {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.0).into_bytes();
        bytes.fill(0);
        // Nobody reads it any more, which a compiler takes for a reason not to write it.
        std::hint::black_box(&bytes);
    }
}

impl Serialize for DisplayPassword {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for DisplayPassword {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Self::parse("password", String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// What viewers of a display have to know, on its way to the host or from who set it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DisplayGuard {
    /// The password.
    pub password: DisplayPassword,
    /// From when on it lets nobody in any more; in whole seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_to: Option<Timestamp>,
}

/// The record of the password of a machine's display; a machine without one has no record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DisplayLock {
    /// Whose display.
    pub instance: InstanceId,
    /// The password.
    pub sealed: Sealed,
    /// See [`DisplayGuard::valid_to`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_to: Option<Timestamp>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_checked_and_not_shown() {
        let good = DisplayPassword::parse("password", "pa55 w~d".into()).unwrap();
        let guard = DisplayGuard { password: good, valid_to: None };
        let wire = serde_json::to_string(&guard).unwrap();
        assert_eq!(wire, r#"{"password":"pa55 w~d"}"#);
        assert_eq!(serde_json::from_str::<DisplayGuard>(&wire).unwrap(), guard);
        assert!(!format!("{guard:?}").contains("pa55"));
        for (bad, word) in [("", "empty"), ("ninechars", "9 characters"), ("a\nb", "ASCII"), ("pä", "ASCII")]
        {
            let e = DisplayPassword::parse("passwd", bad.into()).unwrap_err();
            assert_eq!(e.field.as_deref(), Some("passwd"));
            assert!(e.message.contains(word) && (bad.is_empty() || !e.message.contains(bad)), "{e}");
            let wire = serde_json::json!({"password": bad}).to_string();
            assert!(serde_json::from_str::<DisplayGuard>(&wire).is_err());
        }
    }
}
