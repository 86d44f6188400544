//! Short texts that a device shows of itself, such as a serial number: they lie where they are, so that what has them can be copied.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes of the longest.
pub const LONGEST: usize = 36;

/// A text of printable ASCII without a comma, which ends lists of options, and not empty.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Label {
    bytes: [u8; LONGEST],
    length: u8,
}

impl Label {
    /// One of at most so many bytes; `None` of what is none.
    pub fn parse(text: &str, most: usize) -> Option<Self> {
        let printable = text.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b',');
        let good = !text.is_empty() && text.len() <= most.min(LONGEST) && printable && !text.ends_with(' ');
        good.then(|| {
            let mut bytes = [0; LONGEST];
            bytes[..text.len()].copy_from_slice(text.as_bytes());
            Self { bytes, length: text.len() as u8 }
        })
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        // Of ASCII alone, as it was made.
        std::str::from_utf8(&self.bytes[..usize::from(self.length)]).unwrap_or_default()
    }
}

impl std::fmt::Debug for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_str().fmt(f)
    }
}

impl Serialize for Label {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Label {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::parse(&text, LONGEST).ok_or_else(|| serde::de::Error::custom("no text of a device"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_devices() {
        let one = Label::parse("  WD-WMAP9A966149", 20).unwrap();
        assert_eq!(
            (one.as_str(), format!("{one:?}").as_str()),
            ("  WD-WMAP9A966149", "\"  WD-WMAP9A966149\"")
        );
        assert_eq!(serde_json::from_str::<Label>(&serde_json::to_string(&one).unwrap()).unwrap(), one);
        assert!(Label::parse(&"x".repeat(36), 99).is_some());
        for bad in ["", "a,b", "a\nb", "ä", "a ", &"x".repeat(37)] {
            assert!(Label::parse(bad, 99).is_none(), "{bad:?}");
        }
        assert!(Label::parse("123456789", 8).is_none());
        assert!(serde_json::from_str::<Label>("\"a,b\"").is_err());
    }
}
