//! Objects of a pool by their names there, which say all that a crash leaves to be known.

use karst_model::{ImageId, SnapshotId, VolumeId};
use uuid::Uuid;

/// Something that a pool keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A volume.
    Volume(VolumeId),
    /// A snapshot of a volume.
    Snapshot(VolumeId, SnapshotId),
    /// What volumes of an image are cloned from.
    Image(ImageId),
    /// In the making.
    Work(Uuid),
    /// Whole, about to take the volume's place.
    Next(VolumeId),
    /// On its way out.
    Trash(Uuid),
    /// The texts that say what the pool and its volumes are.
    Descriptions,
}

const DESCRIPTIONS: &str = "descriptions";

impl Object {
    /// A fresh name for what goes.
    pub fn trash() -> Self {
        Self::Trash(Uuid::new_v4())
    }

    /// Its name: letters, digits and underscores, at most 74.
    pub fn text(self) -> String {
        match self {
            Self::Volume(v) => format!("volume_{}", v.0.simple()),
            Self::Snapshot(v, s) => format!("snapshot_{}_{}", v.0.simple(), s.0.simple()),
            Self::Image(i) => format!("image_{}", i.0.simple()),
            Self::Work(u) => format!("work_{}", u.simple()),
            Self::Next(v) => format!("next_{}", v.0.simple()),
            Self::Trash(u) => format!("trash_{}", u.simple()),
            Self::Descriptions => DESCRIPTIONS.to_owned(),
        }
    }

    /// Reads [`Self::text`]; anything else is not ours.
    pub fn parse(text: &str) -> Option<Self> {
        if text == DESCRIPTIONS {
            return Some(Self::Descriptions);
        }
        let (kind, rest) = text.split_once('_')?;
        let id = |text: &str| if text.len() == 32 { text.parse::<Uuid>().ok() } else { None };
        Some(match kind {
            "volume" => Self::Volume(VolumeId(id(rest)?)),
            "snapshot" => {
                let (volume, snapshot) = rest.split_once('_')?;
                Self::Snapshot(VolumeId(id(volume)?), SnapshotId(id(snapshot)?))
            }
            "image" => Self::Image(ImageId(id(rest)?)),
            "work" => Self::Work(id(rest)?),
            "next" => Self::Next(VolumeId(id(rest)?)),
            "trash" => Self::Trash(id(rest)?),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_they_name() {
        let (u, v) = (Uuid::new_v4(), VolumeId(Uuid::new_v4()));
        for object in [
            Object::Volume(v),
            Object::Snapshot(v, SnapshotId(u)),
            Object::Image(ImageId(u)),
            Object::Work(u),
            Object::Next(v),
            Object::Trash(u),
            Object::Descriptions,
        ] {
            assert_eq!(Object::parse(&object.text()), Some(object));
            assert!(object.text().len() <= 74);
        }
        for other in [
            "",
            "volume",
            "volume_1",
            "lost_0123",
            &format!("volume_{u}"),
            &format!("snapshot_{}", u.simple()),
        ] {
            assert_eq!(Object::parse(other), None, "{other}");
        }
    }
}
