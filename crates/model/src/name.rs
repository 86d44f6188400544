//! Names of instances and other named things.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{borrow::Borrow, fmt, ops::Deref, str::FromStr};

/// A name: 1 to 63 of `[A-Za-z0-9._-]`, not starting or ending with `-` or `.`, case kept. Unique within its scope
/// (project and kind) without regard to nothing else; renamable.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// Checks and takes `s`; `field` is named in the error.
    pub fn parse(field: &str, s: &str) -> Result<Self> {
        let bad = |why: String| Err(Error::invalid(field, why));
        if s.is_empty() {
            return bad(format!("{field} must not be empty"));
        }
        if s.len() > 63 {
            return bad(format!("{field} has {} characters; at most 63 are allowed", s.len()));
        }
        if let Some(c) = s.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))) {
            return bad(format!("{field} {s:?} contains {c:?}; allowed are A-Z a-z 0-9 . _ -"));
        }
        if s.starts_with(['-', '.']) || s.ends_with(['-', '.']) {
            return bad(format!("{field} {s:?} must not start or end with '-' or '.'"));
        }
        Ok(Self(s.to_owned()))
    }

    /// The label under which it is found in DNS: lower case, `_` and `.` become `-`.
    pub fn dns_label(&self) -> String {
        self.0.to_ascii_lowercase().replace(['_', '.'], "-")
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Deref for Name {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}
impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl FromStr for Name {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        Self::parse("name", s)
    }
}
impl TryFrom<String> for Name {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        Self::parse("name", &s)
    }
}
impl From<Name> for String {
    fn from(n: Name) -> String {
        n.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_with_the_reason() {
        for (s, part) in
            [("", "empty"), ("a/b", "'/'"), ("..", "start or end"), ("-x", "start"), ("é", "'é'")]
        {
            let e = Name::parse("name", s).unwrap_err();
            assert!(e.message.contains(part), "{s}: {e}");
            assert_eq!(e.field.as_deref(), Some("name"));
        }
        assert!(Name::parse("name", &"x".repeat(64)).is_err());
    }

    proptest! {
        #[test]
        fn accepted_names_are_safe_path_components(s in "\\PC{0,70}") {
            if let Ok(n) = Name::parse("name", &s) {
                prop_assert!(!n.contains('/') && &*n != "." && &*n != ".." && n.len() <= 63 && !n.contains('\0'));
            }
        }
    }
}
